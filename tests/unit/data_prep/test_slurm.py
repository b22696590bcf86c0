"""What a conversion asks of SLURM, read from what it hands to sbatch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.slurm import job_folder, submit_conversion
from tests.unit.data_prep.material import make_tree, options


def test_a_task_gets_a_core_for_each_of_its_processes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\ncp \"$1\" \"$0.$$.sh\"\necho Submitted batch job 7$$\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    submitted = submit_conversion(str(make_tree(tmp_path / "source")), tmp_path / "dst",
                                  options("workers=3", "slurm_tasks=2"))
    assert submitted is not None
    assert job_folder(tmp_path / "dst").is_dir()
    scripts = [path.read_text() for path in sbatch.parent.glob("*.sh")]
    (converting,) = [text for text in scripts if "convert-dst" in text]
    # Where a site binds, a step has the cores that srun itself was asked for, whatever the job has.
    assert "#SBATCH --cpus-per-task=3" in converting
    (step,) = re.findall("^srun .*", converting, re.MULTILINE)
    assert "--cpus-per-task=3" in step
