"""A file system that fails for a while under the loader."""

from __future__ import annotations

import errno
import os

import pytest

from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import AugmentConfig, ConfigError
from resnet_dist.data.loader import DataError, TrainLoader
from resnet_dist.data.shards.manifest import check_dataset, load_manifest
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.run.file_errors import errno_of, node_at_fault, waited_out
from resnet_dist.train import BAD_INPUT, CRASHED, NODE, failure_code
from tests.unit.data.samples import jpeg_sample, write_dataset

RRC = AugmentConfig(name="random_resized_crop", size=32)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "d", {"train": [[jpeg_sample(i, 0, 60, 60) for i in range(8)]]})


def test_a_handle_that_went_stale_is_opened_again(dataset):
    """A read of /proc/self/mem at a place without memory answers EIO."""
    with TrainLoader(dataset, "train", RRC, seed=3, batch_size=4, threads=1, read_ahead=0,
                     prefetch=1) as loader:
        batches = iter(loader)
        next(batches)
        broken = os.open("/proc/self/mem", os.O_RDONLY)
        os.dup2(broken, int(loader.reader.files[0]))
        for _ in range(4):
            next(batches)
        os.close(broken)


def test_a_shard_that_is_not_there_is_the_nodes_fault_and_no_bad_input(dataset):
    manifest = load_manifest(dataset)
    (shard,) = dataset.glob("train/*.beton")
    shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(DataError) as opened:
        ShardReader(dataset, "train", manifest=manifest)
    config = config_from_dict({"name": "x", "data": str(dataset), "eval": {"split": "train"},
                               "augment": "random_resized_crop"})
    with pytest.raises(ConfigError) as checked:
        check_dataset(config)
    dataset.rename(dataset.with_name("unmounted"))
    with pytest.raises(ConfigError) as absent:
        load_manifest(dataset)
    for caught in (opened, checked, absent):
        assert errno_of(caught.value) == errno.ENOENT
        assert failure_code(caught.value, BAD_INPUT) == NODE


def test_what_no_errno_stands_behind_stays_what_it_was():
    assert failure_code(DataError("cut off"), BAD_INPUT) == BAD_INPUT
    assert failure_code(OSError(errno.ENOSPC, "full"), BAD_INPUT) == CRASHED
    assert not node_at_fault(OSError("no errno"))


def test_waiting_has_an_end_and_only_what_may_pass_is_waited_for():
    tries = []

    def act(number: int, times: int) -> str:
        tries.append(number)
        if len(tries) <= times:
            raise OSError(number, os.strerror(number))
        return "done"

    assert waited_out(lambda: act(errno.ESTALE, 2)) == "done"
    tries.clear()
    with pytest.raises(OSError, match="Stale"):
        waited_out(lambda: act(errno.ESTALE, 1000), 0.3)
    assert len(tries) < 5
    tries.clear()
    with pytest.raises(PermissionError):
        waited_out(lambda: act(errno.EACCES, 1))
    assert len(tries) == 1
