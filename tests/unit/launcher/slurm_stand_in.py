"""SLURM's client programs as shell scripts that answer for a cluster with GPUs.

Real output of `sinfo`, `scontrol show config` and `sacctmgr` in the formats that are asked for;
every call is noted in `calls`.
"""

from __future__ import annotations

from pathlib import Path

SINFO = """\
cpu*|infinite|up|40|64|257000|(null)|amd,rome
gpu|2-00:00:00|up|12|96|1031000|gpu:a100:8(S:0-1)|ib,zen3
gpu|2-00:00:00|up|4|64|515000|gpu:v100:4|skylake
debug|30:00|up|2|16|64000|gpu:2|(null)
old|1-00:00:00|drain|3|16|64000|(null)|(null)
"""
CONFIG = """\
Configuration data as of 2026-11-21T13:00:00
AccountingStorageEnforce = associations,limits,qos
JobRequeue              = 1
SLURM_VERSION           = 23.11.4
"""
ASSOCIATIONS = """\
vision||normal,long
speech|gpu|normal
"""
ANSWERS = {
    "sinfo": SINFO, "scontrol": CONFIG, "sacctmgr": ASSOCIATIONS, "srun": "", "squeue": "",
    "sacct": "", "scancel": "",
}


def install(folder: Path, **answers: str) -> Path:
    """Write the programs into `folder` and return it; `answers` replaces what they say."""
    folder.mkdir(exist_ok=True)
    for name, text in {**ANSWERS, **answers}.items():
        (folder / f"{name}.answer").write_text(text)
        program(folder, name, f"cat {folder}/{name}.answer")
    program(folder, "sbatch", "echo 'sbatch: Job 9 to start at 2026-11-22T03:00:00 using 8 "
                              "processors on nodes g1 in partition gpu' >&2")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n{body}\n')
    path.chmod(0o755)
