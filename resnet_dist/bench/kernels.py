"""Each kernel beside torch and its plain meaning, eager and compiled, at the shapes of ResNet-50.

    python -m resnet_dist.bench.kernels [--batch 256] [--rounds 5] [--compiled]

What dispatch chooses on this device is measured: Triton on GPUs, our loops or the library on CPUs.
Bytes are what the kernel must read and write (each operand once a pass); their rate is given as a
share of a large copy's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_dist.bench.step import ceilings, device_name, the_device
from resnet_dist.config.load import config_from_dict
from resnet_dist.engine.precision import native
from resnet_dist.kernels import batch_norm, reference
from resnet_dist.kernels import dispatch as kernels
from resnet_dist.ranks.distributed import init_world

# Channels and side of ResNet-50's activations by stage, as its BatchNorms see them.
SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
          (2048, 7))
NHWC = torch.channels_last
REPEATS = 32  # some 500 launches, which a stream takes without waiting
PAUSE_CYCLES = 40_000_000  # 20 ms at 2 GHz: longer than the host takes for so many


def cases(batch: int, bn_batch: int, dtype: torch.dtype,
          device: torch.device) -> list[tuple[str, str, float, Callable[[Any], object]]]:
    """(kernel, shape, bytes, run): `run(room)` does it by `room`, `kernels` or `reference`."""
    made: list[tuple[str, str, float, Callable[[Any], object]]] = []
    element = dtype.itemsize

    def draw(channels: int, side: int) -> Tensor:
        x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        return x.contiguous(memory_format=NHWC).requires_grad_()

    def norm(channels: int, side: int, with_residual: bool) -> None:
        x, residual = draw(channels, side), draw(channels, side) if with_residual else None
        weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
        wanted = [x, weight, bias] + ([residual] if residual is not None else [])
        grad = torch.randn_like(x)

        def run(room: Any) -> object:
            y = room.ghost_batch_norm(x, weight, bias, bn_batch, 1e-5, residual, True)[0]
            return torch.autograd.grad(y, wanted, grad)

        # Forward reads x twice, writes y; backward reads g and x, and both again, writes dx. With a
        # residual: read and its mask written; mask read, its gradient written.
        passes = 8 + (with_residual * 2)
        made.append(("batch_norm+add+relu" if with_residual else "batch_norm+relu",
                     f"{channels} x {side}^2", x.numel() * passes * element, run))

    for channels, side in SHAPES:
        norm(channels, side, False)
    for channels, side in SHAPES[2::2]:
        norm(channels, side, True)

    pooled, last = draw(64, 112), draw(2048, 7)

    def max_pool(room: Any) -> object:
        return torch.autograd.grad(room.max_pool(pooled, 3, 2, 1).sum(), pooled)

    def average_pool(room: Any) -> object:
        return torch.autograd.grad(room.average_pool(last).sum(), last)

    images = torch.randint(256, (batch, 224, 224, 3), device=device).to(torch.uint8)
    scale, shift = (torch.full((1, 3, 1, 1), value, device=device) for value in (1 / 58, -2.0))

    def normalize(room: Any) -> object:
        return room.normalize(images, scale, shift, dtype)

    quarter = pooled.numel() / 4
    made += [("max_pool", "64 x 112^2", 2 * (pooled.numel() + quarter) * element + 2 * quarter,
              max_pool),
             ("average_pool", "2048 x 7^2", 2 * last.numel() * element, average_pool),
             ("normalize", "3 x 224^2", images.numel() * (1 + element * 4 / 3), normalize)]
    return made


def _torch() -> SimpleNamespace:
    """torch's own kernels, eager: its BatchNorm a group at a time, then addition and ReLU."""
    return SimpleNamespace(ghost_batch_norm=batch_norm.ghost_batch_norm,
                           max_pool=reference.max_pool, average_pool=reference.average_pool,
                           normalize=reference.normalize)


def _compiled() -> SimpleNamespace:
    """torch's operations through torch.compile, forward and backward, each shape on its own.

    Unfair to the compiler on CPUs: alone, its BatchNorm takes several times what it takes inside a
    compiled network (2026-11-25, AVX2), where `bench step` has it.
    """
    def ghost_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, bn_batch: int, eps: float,
                         residual: Tensor | None, relu: bool) -> tuple[Tensor]:
        # As networks have it: what the compiler knows best.
        groups = [F.batch_norm(group, None, None, weight, bias, True, 0.0, eps)
                  for group in x.split(bn_batch)]
        y = groups[0] if len(groups) == 1 else torch.cat(groups)
        y = y if residual is None else y + residual
        return (F.relu(y) if relu else y,)

    meanings: dict[str, Callable[..., Any]] = {
        "ghost_batch_norm": ghost_batch_norm, "max_pool": reference.max_pool,
        "average_pool": reference.average_pool, "normalize": reference.normalize}
    return SimpleNamespace(**{name: torch.compile(meaning, dynamic=False)
                              for name, meaning in meanings.items()})


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """One `work()` on the device. On a GPU without the host's 100 to 200 us of Python, which would
    be most of it: the kernels of `REPEATS` calls wait behind a pause until all are launched."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)
    start.record()
    for _ in range(REPEATS):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / REPEATS


def bench_kernels(args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds of forward and backward, medians of alternating rounds, and bytes/s."""
    device = the_device()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    torch.manual_seed(0)
    copy, _ = ceilings(args.precision, torch.get_num_threads())
    rooms = {"ours": kernels, "torch": _torch(), "plain": reference,
             **({"compiled": _compiled()} if args.compiled else {})}
    rows = []
    for kernel, shape, size, run in cases(args.batch, args.bn_batch, dtype, device):
        competitors = {name: partial(run, room) for name, room in rooms.items()}
        times: dict[str, list[float]] = {name: [] for name in competitors}
        for number in range(args.rounds + 1):
            for name, work in competitors.items():
                taken = milliseconds(work, device)
                if number:  # the first compiles and allocates
                    times[name].append(taken)
        median = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"kernel": kernel, "shape": shape, "bytes": size, "ms": median, "rounds": times,
                     "bytes_per_s": size / median["ours"] * 1e3,
                     "of_copy": size / median["ours"] * 1e3 / copy,
                     "ours_is": {name: value / median["ours"] for name, value in median.items()
                                 if name != "ours"}})
        progress(f"{kernel} {shape}: {median['ours']:.2f} ms")
    return {"device": device_name(), "batch": args.batch, "bn_batch": args.bn_batch,
            "precision": args.precision, "copy_bytes_per_s": copy, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Each kernel beside its plain meaning.")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bn-batch", type=int, default=32)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compiled", action="store_true",
                        help="also torch.compile")
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = native(the_device())
    # A training process's settings, for all competitors alike: threads, kept memory.
    init_world(config_from_dict({"name": "bench", "threads": args.threads}))
    torch._dynamo.config.cache_size_limit = 64  # a shape each, all through one function
    result = bench_kernels(args, lambda line: print(line, file=sys.stderr))  # noqa: T201
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
