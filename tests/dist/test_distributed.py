"""Sums in a fixed order, decisions at the same step, and a lost rank noticed at once."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.ranks import distributed
from resnet_dist.config.schema import Config
from resnet_dist.ranks.distributed import World, all_sum, init_world, shutdown, tree_sum
from resnet_dist.ranks.preemption import SignalFlag
from tests.dist.harness import RankFailed, run_ranks
from tests.dist.runs import join, make_config

LENGTHS = (1, 2, 3, 5, 8, 1000, 1_000_003)


def leaf(index: int, length: int = 64) -> torch.Tensor:
    """Numbers of very different size, so that every order of additions rounds differently."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(length, generator=generator) * 10.0 ** (index % 7)


@given(st.integers(0, 4), st.integers(1, 6))
def test_the_trees_of_ranks_are_the_branches_of_the_whole_tree(levels: int, per_rank: int) -> None:
    ranks = 2 ** levels
    whole = tree_sum(leaf, 0, ranks * per_rank)
    parts = [tree_sum(leaf, rank * per_rank, (rank + 1) * per_rank) for rank in range(ranks)]
    assert torch.equal(whole, tree_sum(lambda rank: parts[rank].clone(), 0, ranks))


def test_another_order_of_additions_gives_other_bits() -> None:
    in_sequence = leaf(0)
    for index in range(1, 16):
        in_sequence = in_sequence + leaf(index)
    assert not torch.equal(in_sequence, tree_sum(leaf, 0, 16))


def butterflies() -> list[torch.Tensor]:
    world = join(make_config(1))
    return [distributed.butterfly_all_reduce(leaf(world.rank, length), world)
            for length in LENGTHS]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_butterfly_is_the_tree_over_ranks_to_the_bit(world: int) -> None:
    results = run_ranks(butterflies, world)
    for index, length in enumerate(LENGTHS):
        expected = tree_sum(partial(leaf, length=length), 0, world)
        assert all(torch.equal(result[index], expected) for result in results)


def test_the_butterfly_refuses_what_is_no_power_of_two() -> None:
    world = World(rank=0, size=3, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="world size = 3"):
        distributed.butterfly_all_reduce(torch.zeros(4), world)


def collectives() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, int]:
    world = join(make_config(1))
    row = torch.full((2, 3), float(world.rank))
    weights = row.clone().to(torch.float32)[None, None].expand(4, 1, 2, 3).contiguous(
        memory_format=torch.channels_last)
    distributed.broadcast_from_zero([weights], world)
    assert not weights.any()
    return (distributed.all_sum(row.clone(), world), distributed.gather_rows(row, world),
            distributed.gather_to_zero(row, world), distributed.agree_max(world.rank, world),
            distributed.broadcast_int(world.rank + 7, world))


def test_collectives_do_what_they_say_in_a_world_of_three() -> None:
    rows = torch.stack([torch.full((2, 3), float(rank)) for rank in range(3)])
    for rank, (total, gathered, at_zero, largest, first) in enumerate(run_ranks(collectives, 3)):
        assert torch.equal(total, rows.sum(0))
        assert torch.equal(gathered, rows)
        assert (at_zero is None) == (rank > 0)
        assert (largest, first) == (2, 7)
    assert torch.equal(run_ranks(collectives, 1)[0][1], rows[:1])


def steps_until_stop(signalled: int, at_step: int) -> tuple[int, int]:
    """Step over a gradient-like all-reduce until the ranks agree; (step, signal)."""
    world = join(make_config(1))
    with SignalFlag() as flag:
        for step in range(1, 1000):
            if world.rank == signalled and step == at_step:
                os.kill(os.getpid(), signal.SIGUSR2)
            distributed.all_sum(torch.ones(1000), world)
            if stop := flag.should_stop(world):
                flag.settle()
                return step, stop
    return -1, 0


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    results = run_ranks(steps_until_stop, 3, 1, 20)
    assert results == [(21, signal.SIGUSR2)] * 3


def lose_rank(victim: int) -> None:
    world = join(make_config(1))
    for step in range(1000):
        if world.rank == victim and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_sum(torch.ones(1_000_000), world)


def test_a_killed_rank_ends_the_others_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 died|Connection"):
        run_ranks(lose_rank, 2, 1, timeout=60)
    assert time.monotonic() - began < 30  # not the process group's timeout of many minutes


def listening(config: Config) -> list[str]:
    world = init_world(config)
    all_sum(torch.ones(1), world)
    own = psutil.Process().net_connections("inet")
    addresses = [each.laddr.ip for each in own if each.status == psutil.CONN_LISTEN]
    shutdown()
    return addresses


def test_ranks_listen_on_the_interface_where_they_meet_alone() -> None:
    found = run_ranks(listening, 2, make_config(2))
    assert found[0], "rank 0 keeps the store"
    assert {address for rank in found for address in rank} == {"127.0.0.1"}
