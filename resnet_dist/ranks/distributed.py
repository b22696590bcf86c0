"""The ranks of a run: who they are, how they sum, how they agree.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment (without them:
one process, no group). Out: a `World`, reductions whose order of additions is fixed, and
`Agreement`, which lets every rank take the same decision at the same step without waiting for it.

Data travels over NCCL on GPUs and gloo on CPUs. Decisions travel over a gloo group of their own, so
that they neither queue behind gradients nor synchronise a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from resnet_dist.config.schema import Config
from resnet_dist.ranks.devices import (
    agree,
    choose_device,
    environment_int,
    keep_freed_memory,
    order_of_sums,
    seat,
    settle_cuda,
    take_cores,
)
from resnet_dist.ranks.rendezvous import meet


@dataclass(frozen=True)
class World:
    """One rank's place in the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)), compare=False)
    sums: str = ""  # see `order_of_sums`


def init_world(config: Config) -> World:
    """Join the run's process group, choose the device and its settings.

    Collective: every rank of the job. Raises: ConfigError where the environment or the device does
    not fit the configuration.
    """
    rank, size, local_rank = (environment_int(key, default) for key, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(config, local_rank)
    own = seat(device)
    # The last resort, far above `launch.hang_s`, within which the supervisor ends the ranks of an
    # attempt that stands still. Over gloo a lost peer is noticed at once, by its closed socket;
    # NCCL's kernels may wait for one until they are ended.
    timeout = timedelta(seconds=2 * config.launch.hang_s)
    store = meet(rank, size, timeout) if size > 1 else None
    seats = [own] if store is None else agree(own, store, rank, size, config)
    cores = take_cores(own, seats, config)
    torch.set_num_threads(config.threads or (1 if config.mode == "exact" else cores))
    if device.type == "cuda":
        settle_cuda(config)
    else:
        keep_freed_memory()
    if store is None:
        return World(rank, size, local_rank, device, None, cores)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store,
                            device_id=device if backend == "nccl" else None)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return World(rank, size, local_rank, device, control, cores, order_of_sums(seats))


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# -- Sums in a fixed order -------------------------------------------------------------------------

def tree_sum(leaf: Callable[[int], torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Sum `leaf(start) ... leaf(stop - 1)` along a binary tree whose left half is the first half.

    `leaf` is called once per index, in rising order, and gives up its tensor: the sum is taken in
    place. At most 1 + log2(stop - start) tensors are alive.

    Halving the leaves of the whole run reaches the contiguous leaves of every rank after log2(size)
    levels, for any power-of-two size that divides their number. So the tree of one rank over all
    leaves is the trees of many ranks with `butterfly_all_reduce` on top: the same additions.
    """
    if stop - start == 1:
        return leaf(start)
    middle = start + (stop - start) // 2
    left = tree_sum(leaf, start, middle)
    left += tree_sum(leaf, middle, stop)
    return left


def butterfly_all_reduce(vector: torch.Tensor, world: World) -> torch.Tensor:
    """Sum a flat tensor over ranks along the binary tree over ranks, in place; returns it.

    Every element is summed as ((r0 + r1) + (r2 + r3)) + ...; adding two numbers commutes, so all
    ranks compute the same bits. Reduce-scatter by pairwise exchange of halves, then the same pairs
    backwards: each rank sends 2 (1 - 1/size) of the vector instead of log2(size) of it.

    Collective. Raises: ValueError where the world is not a power of two.
    """
    if world.size & (world.size - 1):
        raise ValueError(f"world size = {world.size}: the tree over ranks needs a power of two")
    assert vector.dim() == 1
    assert vector.is_contiguous()
    start, stop = 0, vector.numel()
    ranges: list[tuple[int, int, int]] = []
    scratch = torch.empty(stop - stop // 2 if world.size > 1 else 0,
                          dtype=vector.dtype, device=vector.device)
    distance = 1
    while distance < world.size:
        ranges.append((distance, start, stop))
        middle = start + (stop - start) // 2
        keep, give = (start, middle), (middle, stop)
        if world.rank & distance:
            keep, give = give, keep
        received = scratch[:keep[1] - keep[0]]
        _exchange(vector[give[0]:give[1]], received, world.rank ^ distance)
        vector[keep[0]:keep[1]] += received
        start, stop = keep
        distance *= 2
    for distance, whole_start, whole_stop in reversed(ranges):
        other = (stop, whole_stop) if start == whole_start else (whole_start, start)
        _exchange(vector[start:stop], vector[other[0]:other[1]], world.rank ^ distance)
        start, stop = whole_start, whole_stop
    return vector


def _exchange(outgoing: torch.Tensor, incoming: torch.Tensor, peer: int) -> None:
    """Swap tensors with one rank; either may be empty, and then is empty on the other side too."""
    operations = []
    if outgoing.numel():
        operations.append(dist.P2POp(dist.isend, outgoing, peer))
    if incoming.numel():
        operations.append(dist.P2POp(dist.irecv, incoming, peer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def all_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, in place; returns it. The order of additions is the backend's. Collective."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(row: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's flat tensor as [size, ...] on every rank. Collective."""
    if world.size == 1:
        return row.detach().clone()[None]
    rows = torch.empty((world.size, *row.shape), dtype=row.dtype, device=row.device)
    dist.all_gather(list(rows.unbind(0)), row.contiguous())
    return rows


def broadcast_from_zero(tensors: Sequence[torch.Tensor], world: World) -> None:
    """Give every rank rank 0's values, in place. Collective."""
    if world.size > 1:
        for tensor in tensors:
            # NCCL and gloo want dense memory; channels_last weights are dense in another order,
            # the same on every rank, so their storage order may travel as it is.
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            dist.broadcast(flat, src=0)


# -- Decisions -------------------------------------------------------------------------------------

class Agreement:
    """The largest flag that any rank raised, known to all ranks at the same step, for free.

    `exchange(flag)` at step k starts the reduction of this step's flags and returns the result of
    step k - 1's, which had a whole step to travel. Every rank must call it equally often.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._work: dist.Work | None = None
        self._flag = torch.zeros(1, dtype=torch.int64)

    def exchange(self, flag: int) -> int:
        """Raise `flag` (0: nothing) and learn the previous call's maximum. Collective."""
        decided = self.settle()
        self._flag = torch.tensor([flag], dtype=torch.int64)
        if self._world.size > 1:
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX,
                                         group=self._world.control, async_op=True)
        return decided

    def settle(self) -> int:
        """Wait for the flags that are under way, without raising another. Collective."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        decided, self._flag = int(self._flag), torch.zeros(1, dtype=torch.int64)
        return decided


def agree_max(value: int, world: World) -> int:
    """The largest of the ranks' values, at once. Collective."""
    agreement = Agreement(world)
    agreement.exchange(value)
    return agreement.settle()


def broadcast_int(value: int, world: World) -> int:
    """Rank 0's value on every rank. Collective."""
    flag = torch.tensor([value], dtype=torch.int64)
    if world.size > 1:
        dist.broadcast(flag, src=0, group=world.control)
    return int(flag)
