"""Is this machine ready? One finding a line: ok, problem or note, and what to do about it.

Imports no torch itself: packages that load native libraries are tried in a child process, so that a
broken one is a finding and not a crash.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

Finding = dict[str, str]

_APT = "sudo apt-get install -y --no-install-recommends"
_NATIVE = {
    "torch": ("import torch; print(torch.__version__)", "run `make quickstart` again"),
    "ffcv": ("import ffcv._libffcv, ffcv; print(ffcv.__version__)",
             f"{_APT} libopencv-dev libturbojpeg0-dev pkg-config, then "
             "`pip install --force-reinstall --no-deps ffcv==1.0.2`"),
    "deepspeed": ("import deepspeed; print(deepspeed.__version__)", "run `make quickstart` again"),
    "decoder": ("from resnet_dist.data.native import library; print(library()._name)",
                f"{_APT} g++ libjpeg-dev libxxhash-dev, then `pip install -e .`"),
}
_GPU = ("import torch; n = torch.cuda.device_count(); "
        "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) if n else 'none')")
# What a run relies on when it is preempted: key of `scontrol show config` -> why it matters.
_SLURM_SETTINGS = {
    "JobRequeue": "0 means that a preempted job is not queued again",
    "KillWait": "seconds between SIGTERM and SIGKILL: a checkpoint must fit in",
    "PreemptMode": "REQUEUE keeps a preempted job; CANCEL ends it",
    "PreemptParameters": "send_user_signal warns before a preemption",
}


def examine(folder: Path = Path()) -> list[Finding]:
    """All findings, cheapest first. `folder` is where runs would be written."""
    findings = [_finding("ok", "python", platform.python_version()),
                *(_package(name) for name in ("submitit", "tensorboard", "numpy"))]
    findings += [_child(name, code, remedy) for name, (code, remedy) in _NATIVE.items()]
    findings += [_cpus(), _gpus(), *_slurm(), *_file_system(folder)]
    return findings


def show(console: Console, findings: list[Finding]) -> None:
    table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "problem": "[red]problem[/]", "note": "[yellow]note[/]"}
    for finding in findings:
        table.add_row(marks[finding["state"]], finding["what"], finding["found"],
                      finding["remedy"])
    console.print(table)


def _finding(state: str, what: str, found: str, remedy: str = "") -> Finding:
    return {"state": state, "what": what, "found": found, "remedy": remedy}


def _package(name: str) -> Finding:
    try:
        return _finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _finding("problem", name, "not installed", "run `make quickstart` again")


def _child(what: str, code: str, remedy: str) -> Finding:
    """Run `code` in a fresh interpreter; what it prints last is what was found."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              timeout=120)
    except subprocess.TimeoutExpired:
        return _finding("problem", what, "does not load within 120 s", remedy)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return _finding("problem", what, reason[:120], remedy)
    return _finding("ok", what, done.stdout.strip().splitlines()[-1])


def _cpus() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return _finding("ok", "cpus", f"{usable} usable of {present}")


def _gpus() -> Finding:
    found = _child("gpus", _GPU, "check the driver with `nvidia-smi`")
    if found["found"] == "none":
        if shutil.which("nvidia-smi"):
            return _finding("problem", "gpus", "nvidia-smi is here but torch sees none",
                            "install a CUDA build of torch")
        return _finding("note", "gpus", "none", "training runs on the CPUs")
    return found


def _slurm() -> list[Finding]:
    if not shutil.which("sbatch"):
        return [_finding("note", "slurm", "no sbatch here", "`submit` runs jobs on this machine")]
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return [_finding("problem", "slurm", "scontrol does not answer", "is slurmctld running?")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        return [_finding("problem", "slurm", reason, "is slurmctld running? or use --local")]
    settings = {key.strip(): value.strip() for key, _, value in
                (line.partition("=") for line in done.stdout.splitlines())}
    findings = [_finding("ok", "slurm", settings.get("SLURM_VERSION", "unknown version"))]
    for key, why in _SLURM_SETTINGS.items():
        findings.append(_finding("ok", f"slurm {key}", settings.get(key, "unset"), why))
    if settings.get("JobRequeue") == "0":
        findings[1]["state"] = "note"
    if not shutil.which("sacct"):
        findings.append(_finding("problem", "slurm sacct", "missing", "submitit needs it"))
    return findings


def _file_system(folder: Path) -> list[Finding]:
    """Do rename, fsync and locks work where runs would be written?"""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            before, after = Path(scratch, "before"), Path(scratch, "after")
            after.write_text("old")
            with open(before, "w") as file:
                file.write("new" * 1_000_000)
                file.flush()
                began = time.perf_counter()
                os.fsync(file.fileno())
                fsync_s = time.perf_counter() - began
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(before, after)
            directory = os.open(scratch, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
            assert after.read_text().startswith("new")
    except OSError as error:
        return [_finding("problem", "file system", str(error)[:120],
                         "write runs to another file system with runs=DIR")]
    free_gb = shutil.disk_usage(folder).free / 1e9
    return [_finding("ok", "file system", f"rename, fsync (3 MB in {fsync_s * 1e3:.0f} ms), locks"),
            _finding("ok" if free_gb > 5 else "note", "disk", f"{free_gb:.0f} GB free",
                     "" if free_gb > 5 else "a ResNet-50 checkpoint takes 0.2 GB")]
