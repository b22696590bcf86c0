"""Is this machine ready? One finding a line: ok, problem or note, and what to do about it.

Imports no torch itself: packages that load native libraries are tried in a child process, so that a
broken one is a finding and not a crash.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher.doctor.slurm import Finding, finding, slurm_findings, verdict
from launcher.slurm.scheduler import ask
from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.run.atomic import write_atomically

_AGAIN = "run `./install.sh` again"
_NATIVE = {
    "torch": "import torch; print(torch.__version__)",
    "ffcv": "import importlib.metadata as m, ffcv._libffcv, ffcv; print(m.version('ffcv'))",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "decoder": "from resnet_dist.data.decode.decoder import library; print(library()._name)",
}
# What a library that is not found comes with, by the beginning of its name.
_LIBRARIES = {"libopencv_": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev",
              "libjpeg": "libjpeg-dev", "libGL.": "libgl1", "libgthread": "libglib2.0-0",
              "libglib": "libglib2.0-0", "libtbb": "libtbb12", "libstdc++": "libstdc++6"}
_LOST = re.compile(r"(lib[\w+.-]+): cannot open shared object file")
_GPU = ("import torch; n = torch.cuda.device_count(); "
        "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) if n else 'none')")

# Of today's loader, for ResNet-50 on an H200, by recipe: docs/scaling.md.
_CORES_LEAST, _CORES_ENOUGH = 4, 10


def examine(folder: Path = Path(), *, slurm: bool = True, data: str | None = None
            ) -> list[Finding]:
    """All findings, cheapest first.

    Args:
        folder: where runs would be written.
        slurm: also ask the cluster how it is set up.
        data: a data set that should be usable here.
    """
    findings = [finding("ok", "python", platform.python_version()),
                *(_package(name) for name in ("submitit", "tensorboard", "numpy"))]
    findings += [_with_package(_child(name, code, _AGAIN)) for name, code in _NATIVE.items()]
    findings += [_cpus(), *_gpus(), *(slurm_findings() if slurm else ()), *_file_system(folder)]
    return findings + ([_dataset(data)] if data is not None else [])


def show(console: Console, findings: list[Finding]) -> None:
    table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
    many = any("where" in each for each in findings)
    if many:
        table.add_column("nodes")
    marks = {"ok": "[green]ok[/]", "problem": "[red]problem[/]", "note": "[yellow]note[/]"}
    for each in findings:
        table.add_row(marks[each["state"]], each["what"], each["found"], each["remedy"],
                      *([each.get("where", "")] if many else []))
    console.print(table)


def _package(name: str) -> Finding:
    try:
        return finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return finding("problem", name, "not installed", _AGAIN)


def _child(what: str, code: str, remedy: str) -> Finding:
    """Run `code` in a fresh interpreter; what it prints last is what was found."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              timeout=120)
    except subprocess.TimeoutExpired:
        return finding("problem", what, "does not load within 120 s", remedy)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return finding("problem", what, reason[:120], remedy)
    return finding("ok", what, done.stdout.strip().splitlines()[-1])


def _with_package(tried: Finding) -> Finding:
    """Name the package of a shared library that was not found, and the way without root."""
    lost = _LOST.search(tried["found"])
    if tried["state"] != "problem" or not lost:
        return tried
    package = next((package for start, package in _LIBRARIES.items()
                    if lost[1].startswith(start)), None)
    install = (f"`sudo apt-get install -y --no-install-recommends {package}`, or without root "
               if package else "")
    return {**tried, "found": f"{lost[1]} is missing",
            "remedy": f"{install}`./install.sh` again (docs/install.md)"}


def _cpus() -> Finding:
    found = f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        return finding("ok", "cpus", f"{found}, OMP_NUM_THREADS={threads}",
                       "the key `threads` decides for training")
    return finding("ok", "cpus", found)


def _gpus() -> list[Finding]:
    """What torch sees, and the driver under it."""
    found = _child("gpus", _GPU, "check the driver with `nvidia-smi`")
    if found["state"] == "problem":
        return [found, *_driver()]
    if found["found"] != "none":
        return [found, *_driver(), _feeding(found["found"].count(",") + 1,
                                            len(os.sched_getaffinity(0)))]
    if shutil.which("nvidia-smi") or any(Path("/dev").glob("nvidia[0-9]*")):
        return [finding("problem", "gpus", "the machine has some but torch sees none",
                         "install a CUDA build of torch that fits the driver; a run refuses to "
                         "start here without device=cpu"), *_driver()]
    return [finding("note", "gpus", "none", "training runs on the CPUs")]


def _feeding(gpus: int, cores: int) -> Finding:
    """Whether the loader can keep the GPUs busy with the cores that are here."""
    each = cores / gpus
    found = f"{each:.0f} cores a GPU" if each >= 1 else f"{cores} cores for {gpus} GPUs"
    if each >= _CORES_ENOUGH:
        return finding("ok", "feeding", f"{found}: enough for every ResNet-50 recipe")
    what = ("an H200 would wait for images with heavy augmentation or small pictures"
            if each >= _CORES_LEAST else "an H200 would wait for images of any ResNet-50 recipe")
    return finding("note", "feeding", f"{found}: {what}",
                    f"{_CORES_LEAST} to {_CORES_ENOUGH} cores a GPU feed it (docs/scaling.md): "
                    "launch.cpus_per_rank asks SLURM for more")


def _driver() -> list[Finding]:
    said = ask(["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"],
               30)
    if said is None:
        return [finding("problem", "gpu driver", "nvidia-smi failed", "is the driver loaded?")]
    return [finding("ok", "gpu driver", "; ".join(sorted(set(said.splitlines()))))]


def _dataset(path: str) -> Finding:
    """Manifest and sizes of the shards; contents are `resnet-dist verify`'s."""
    try:
        manifest = check_dataset(config_from_dict({"name": "doctor", "data": path}))
    except ConfigError as error:
        return finding("problem", "data set", str(error), "")
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    return finding("ok", "data set", f"{manifest.name}: {counts}, {manifest.num_classes} classes")


def _file_system(folder: Path) -> list[Finding]:
    """Do rename, fsync and locks work where runs would be written?"""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            began = time.perf_counter()
            for text in ("old", "new" * 1_000_000):
                write_atomically(Path(scratch, "file"), text)
            fsync_s = time.perf_counter() - began
            with open(Path(scratch, "file")) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert file.read(3) == "new"
    except OSError as error:
        return [finding("problem", "file system", str(error)[:120],
                         "write runs to another file system with runs=DIR")]
    free_gb = shutil.disk_usage(folder).free / 1e9
    return [finding("ok", "file system", f"rename, fsync (3 MB in {fsync_s * 1e3:.0f} ms), locks"),
            verdict(free_gb > 5, "disk", f"{free_gb:.0f} GB free",
                    "a ResNet-50 checkpoint takes 0.2 GB", "note")]
