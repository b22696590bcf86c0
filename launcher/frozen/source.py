"""The code a run was submitted with: copied into its directory, and run from there.

A job may start days after it was queued, and again after every requeue. It imports what stood in
the checkout when it was submitted, whatever has been edited since.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.run.paths import RunPaths

SOURCE_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("launcher", "resnet_dist", "data_prep")
_SUFFIXES = (".py", ".so")  # what is imported and loaded; C++ sources only matter when building


def code_fingerprint(root: Path = SOURCE_ROOT) -> str:
    """SHA-256 over names and contents of the product's modules and native libraries under `root`.

    By default of the code that is running; a frozen copy has the fingerprint of what was copied.
    """
    return _fingerprint((name, (root / name).read_bytes()) for name in _names(root))


def freeze_code(run: RunPaths) -> str:
    """Copy the running code to `run.code`, replacing what is there; its fingerprint.

    What is hashed is what was written: an edit in between cannot tell them apart.
    """
    temporary = run.code.with_name(".code.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copied = []
    for name in _names(SOURCE_ROOT):
        content = (SOURCE_ROOT / name).read_bytes()
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o444)  # edited by nobody by mistake
        copied.append((name, content))
    if run.code.exists():
        shutil.rmtree(run.code)
    os.replace(temporary, run.code)
    return _fingerprint(iter(copied))


def share_code(run: RunPaths, other: RunPaths) -> None:
    """Give the run the copy that another has, as links to its files where the disk has links."""
    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(other.code, run.code, copy_function=link)


def frozen_environment(run: RunPaths) -> dict[str, str]:
    """What makes Python import the run's copy: before the installed package and instead of the
    folder in which a job happens to start."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1",
            "PYTHONPATH": str(run.code) + (os.pathsep + others if others else "")}


def frozen_exports(code: str) -> list[str]:
    """The same as lines of a batch script; `code` is a shell word that names the copy."""
    return ["export PYTHONSAFEPATH=1", f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def quoted(run: RunPaths) -> str:
    """The run's copy as a shell word."""
    return shlex.quote(str(run.code))


def runs_the_copy(run: RunPaths) -> bool:
    """Whether this process imports the run's own copy."""
    return run.code.resolve() == SOURCE_ROOT


def _names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for package in _PACKAGES
                  for path in (root / package).rglob("*")
                  if path.suffix in _SUFFIXES and "__pycache__" not in path.parts)


def _fingerprint(files: Iterator[tuple[str, bytes]]) -> str:
    whole = hashlib.sha256()
    for name, content in files:
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()
