"""Can these processes train together? One rank of `resnet-dist doctor --slurm`.

RANK and company are in the environment, as for a training rank, and the ranks meet as those do, by
the configuration of the job: the same device, interface and group.

`python -m resnet_dist.ranks.probe FOLDER`, which all nodes share and which holds config.yaml: rank
0 writes one JSON object to standard output: how fast an all-reduce is, how far the clocks are
apart, what FOLDER promises.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resnet_dist.config.load import load_frozen
from resnet_dist.ranks.distributed import init_world, shutdown

GRADIENT_BYTES = 25_557_032 * 4  # ResNet-50's in float32
_ROUNDS = 5
_PATIENCE_S = 20.0
_INFINIBAND = Path("/sys/class/infiniband")


def probe(folder: Path) -> dict[str, Any]:
    """Everything between the ranks. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    seconds = all_reduce_s(GRADIENT_BYTES)
    found: dict[str, Any] = {
        "backend": dist.get_backend(), "ranks": size, "nodes": _gathered(socket.gethostname()),
        "gradient_s": seconds,
        # As NVIDIA's nccl-tests count it: what passes through one rank's link.
        "bus_gb_per_s": 2 * (size - 1) / size * GRADIENT_BYTES / seconds / 1e9,
        "link_gb_per_s": _gathered(link_gb_per_s()), "clock_skew_s": clock_skew_s(),
        "folder": folder_findings(folder, rank)}
    return found


def all_reduce_s(count_bytes: int) -> float:
    """Median seconds of one all-reduce. Collective."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.zeros(count_bytes // 4, device=device)

    def once() -> float:
        dist.barrier()
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(data)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    once()  # connections are made and buffers allocated
    return statistics.median(once() for _ in range(_ROUNDS))


def clock_skew_s() -> float:
    """Largest difference of two ranks' clocks, less what a barrier itself takes. Collective."""
    differences = []
    for _ in range(_ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        times = _gathered(time.time())
        took = time.perf_counter() - began
        differences.append(max(0.0, max(times) - min(times) - took))
    return min(differences)


def link_gb_per_s() -> float | None:
    """What the slowest link towards other nodes could carry; None where the kernel does not say.

    InfiniBand where NCCL would use it, else the interface that leads to MASTER_ADDR.
    """
    ports = [path.read_text().split()[0] for path in _INFINIBAND.glob("*/ports/*/rate")
             if "ACTIVE" in path.with_name("state").read_text().split()]
    if ports and dist.get_backend() == "nccl":
        return sum(float(rate) for rate in ports) / 8
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
        address = towards.getsockname()[0]
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            speed = psutil.net_if_stats()[name].speed  # megabits; 0: unknown
            return speed / 8000 or None
    return None


def folder_findings(folder: Path, rank: int) -> dict[str, Any]:
    """What checkpoints and leases rely on, between nodes. Collective.

    "seen_s": until every rank saw a file that rank 0 had renamed into place; None: not at all.
    "lock": whether rank 0's lock kept the others out, and let them in when it was gone.
    """
    before, after = folder / f".probe-{os.environ['MASTER_PORT']}", folder / "probe"
    word = f"{os.environ['MASTER_PORT']} {os.getpid()}"
    if rank == 0:
        after.write_text("old")
    dist.barrier()
    seen_old = _until(lambda: after.read_text() == "old")
    words: list[Any] = [word]
    dist.broadcast_object_list(words, src=0)
    dist.barrier()
    if rank == 0:
        with open(before, "w") as file:
            file.write(word)
            file.flush()
            os.fsync(file.fileno())
        os.replace(before, after)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    dist.barrier()
    seen = _until(lambda: after.read_text() == words[0])
    waits = _gathered(None if seen is None or seen_old is None else seen)
    return {"seen_s": None if None in waits else max(waits), "lock": _lock(folder / "lock", rank)}


def _lock(path: Path, rank: int) -> bool:
    path.touch()
    dist.barrier()
    with open(path, "r+") as file:
        mine = _locked(file.fileno()) if rank == 0 else False
        dist.barrier()
        kept_out = rank == 0 or not _locked(file.fileno())
        dist.barrier()
        if rank == 0:
            fcntl.flock(file, fcntl.LOCK_UN)
        dist.barrier()
        # One after the other, because each holds what it gets.
        let_in = True
        for other in range(1, dist.get_world_size()):
            if rank == other:
                let_in = _until(lambda: _locked(file.fileno())) is not None
                fcntl.flock(file, fcntl.LOCK_UN)
            dist.barrier()
    return all(_gathered((mine or rank > 0) and kept_out and let_in))


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _until(true: Callable[[], bool]) -> float | None:
    """Seconds until it is so; None where it does not become so."""
    began = time.perf_counter()
    while True:
        try:
            if true():
                return time.perf_counter() - began
        except OSError:
            pass  # not there yet
        if time.perf_counter() - began > _PATIENCE_S:
            return None
        time.sleep(0.01)


def _gathered(value: Any) -> list[Any]:
    """Every rank's value. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(folder: Path) -> None:
    world = init_world(load_frozen(folder / "config.yaml"))
    if world.size == 1:  # which needs no group to train
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", rank=0,
                                world_size=1,
                                store=dist.HashStore())  # type: ignore[attr-defined]
    found = probe(folder)
    if world.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
