"""A conversion as a job array of a real SLURM gives the bytes of a conversion in one process."""

from __future__ import annotations

import pytest

from data_prep.convert import ConvertError, convert
from data_prep.slurm import convert_slurm
from data_prep.verify import verify
from tests.unit.data_prep.material import hashes, make_tree, options


@pytest.mark.slow
def test_three_tasks_give_the_bytes_of_one_worker(slurm, tmp_path):
    source = str(make_tree(tmp_path / "source", per_class=20))
    wanted = ("shard_samples=7", "slurm_tasks=3", "slurm_mem_gb=0.5")
    convert(source, tmp_path / "here" / "dst", options(*wanted, "workers=1"))
    (tmp_path / "there").mkdir()
    manifest = convert_slurm(source, tmp_path / "there" / "dst", options(*wanted, "workers=1"))
    assert manifest is not None
    made = hashes(tmp_path / "there")
    assert hashes(tmp_path / "here") == {name: made[name] for name in made if "-jobs" not in name}
    assert verify(tmp_path / "there" / "dst").ok


@pytest.mark.slow
def test_bad_images_end_the_jobs_with_their_reason(slurm, tmp_path):
    source = make_tree(tmp_path / "source", per_class=3)
    (source / "train" / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"1 of 18 images could not be used"):
        convert_slurm(str(source), tmp_path / "dst", options("workers=1", "slurm_tasks=2",
                                                             "slurm_mem_gb=0.5"))
    manifest = convert_slurm(str(source), tmp_path / "dst", options(
        "workers=1", "slurm_tasks=2", "slurm_mem_gb=0.5", "max_rejected=1"))
    assert manifest is not None
    assert manifest.source["rejected"] == 1
