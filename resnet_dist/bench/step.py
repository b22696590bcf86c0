"""The training step beside what a user would write with torch alone.

    python -m resnet_dist.bench.step --model resnet50 --batch 32 [--rounds 5] [--steps 3]

Peers: the same network with `nn.BatchNorm2d` over the whole batch, addition and ReLU on their own,
torch's AMP and its fused SGD; eager in NCHW and NHWC, and compiled. All take the same uint8 images
and return after the weights have moved. Everyone is a process of its own; rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_dist.bench.account import Rates, by_kind, eager_step, our_step
from resnet_dist.bench.peer import classes, plain_model
from resnet_dist.bench.rounds import Competitor, Numbers, alternate, serve, summary
from resnet_dist.config.load import config_from_dict
from resnet_dist.engine.ddp import make_engine
from resnet_dist.engine.precision import AUTOCAST_DTYPES, native
from resnet_dist.models.build import build_model
from resnet_dist.ranks.devices import allow_tf32
from resnet_dist.ranks.distributed import init_world

COMPETITORS = {
    "ours": "this project's step",
    "eager_nchw": "torch, NCHW, AMP",
    "eager_nhwc": "torch, channels_last, AMP",
    "compiled_nhwc": "torch.compile, channels_last, AMP",
}
GRAPHS = "ours_graphs"  # our step replayed from a CUDA graph: GPUs only


def bench_step(args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Images/s of every competitor over alternating rounds, and shares of the floor.

    Raises: CompetitorFailed.
    """
    names = [name for name in COMPETITORS if name not in args.without]
    if torch.cuda.is_available():
        names.insert(1, GRAPHS)
    settings = json.dumps({key: getattr(args, key) for key in
                           ("model", "batch", "bn_batch", "size", "precision", "threads", "steps")})

    def begin(name: str) -> Callable[[], Competitor]:
        return lambda: Competitor(name, ["resnet_dist.bench.step", "--serve", name, settings],
                                  os.environ)

    found = alternate({name: begin(name) for name in names}, args.rounds, progress)
    result: dict[str, Any] = {
        **{key: getattr(args, key) for key in ("model", "batch", "bn_batch", "size", "precision",
                                               "threads", "rounds", "steps")},
        "device": device_name(), "torch": torch.__version__, "rounds_measured": found,
        "competitors": {name: {key: summary(values) for key, values in numbers.items()}
                        for name, numbers in found.items()},
    }
    ours = result["competitors"]["ours"]["images_per_s"]["median"]
    result["ours_is"] = {name: ours / numbers["images_per_s"]["median"] for name, numbers in
                         result["competitors"].items() if name in COMPETITORS and name != "ours"}
    progress("measuring this device's memory and arithmetic")
    copy, arithmetic = ceilings(args.precision, args.threads)
    result["bytes_per_s"], result["flops_per_s"] = copy, arithmetic
    rates, result["levels"] = Rates(copy, arithmetic, 0.0), {}
    common = {"batch": args.batch, "size": args.size, "precision": args.precision}
    levels = {"eager": eager_step(args.model, **common)}
    if the_device().type == "cuda":
        levels["ours"] = our_step(args.model, bn_batch=args.bn_batch, **common)
    for level, launches in levels.items():
        whole = by_kind(launches, rates)["all"]
        rate = args.batch / whole["s"]
        result["levels"][level] = {"bytes": whole["bytes"], "flops": whole["flops"],
                                   "images_per_s": rate, "ours": ours / rate}
    return result


def ceilings(precision: str, threads: int) -> tuple[float, float]:
    """Measured bytes/s of a large copy (read and write) and FLOP/s of a large matrix product."""
    device = the_device()
    torch.set_num_threads(threads)
    count, side = (2**28, 8192) if device.type == "cuda" else (2**26, 2048)
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def best_s(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            work()
            wait_for(device)
            times.append(time.perf_counter() - began)
        return min(times)

    return (2 * 4 * count / best_s(lambda: target.copy_(source)),
            2 * side**3 / best_s(lambda: a @ b))


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo")  # noqa: SIM115
             if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {model[0] if model else 'a CPU'}"


# -- One competitor --------------------------------------------------------------------------------

def _serve(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    device = the_device()
    batch, size = settings["batch"], settings["size"]
    images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(classes(size), (batch,))
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    if name in ("ours", GRAPHS):
        step = _our_step(settings, images, labels, graphs=name == GRAPHS)
    else:
        step = _plain_step(name, settings, images, labels, device)

    serve(lambda: _turn(step, settings["steps"], batch, device))


def _turn(step: Callable[[], None], steps: int, batch: int, device: torch.device) -> Numbers:
    """One competitor's numbers of one round; on a GPU it leaves room for the next one's."""
    step()  # the first after a pause finds cold caches, and on a GPU no memory
    wait_for(device)
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    wait_for(device)
    took, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()  # else five networks' activations lie there: 75 GB at 256 images
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images_per_s": steps * batch / took, "cpu_ms_an_image": 1e3 * cpu_s / (steps * batch),
            "peak_mb": peak / 1e6}


def _our_step(settings: dict[str, Any], images: Tensor, labels: Tensor, *,
              graphs: bool) -> Callable[[], None]:
    config = config_from_dict({
        "name": "bench", "batch_size": settings["batch"], "bn_batch": settings["bn_batch"],
        "precision": settings["precision"], "threads": settings["threads"],
        "cuda_graphs": graphs,
        "model": {"name": settings["model"]}, "schedule": {"name": "constant"},
        "augment": {"name": "random_resized_crop", "size": settings["size"]}})
    world = init_world(config)
    model = build_model(settings["model"], num_classes=classes(settings["size"]),
                        bn_batch=settings["bn_batch"])
    shape = (1, 3, 1, 1)
    engine = make_engine(model, config, world, (np.full(shape, 0.45, np.float32),
                                                np.full(shape, 4.4, np.float32)))
    return lambda: engine.train_step(images, labels, None, 0.01)


def _plain_step(name: str, settings: dict[str, Any], images: Tensor, labels: Tensor,
                device: torch.device) -> Callable[[], None]:
    torch.set_num_threads(settings["threads"])
    allow_tf32(settings["precision"] == "tf32")
    layout = torch.contiguous_format if name == "eager_nchw" else torch.channels_last
    model = plain_model(settings["model"], classes(settings["size"])).to(device)
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4,
                                fused=True)
    run = torch.compile(model) if name == "compiled_nhwc" else model
    dtype = AUTOCAST_DTYPES.get(settings["precision"])
    mean = torch.full((1, 3, 1, 1), 0.45 * 255, device=device)

    def step() -> None:
        x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        x = x.sub_(mean).mul_(4.4 / 255).contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits = run(x)
        loss = F.cross_entropy(logits.float(), labels.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return _serve(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description="The training step beside torch's own.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bn-batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--without", action="append", default=[], choices=list(COMPETITORS))
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = native(the_device())
    result = bench_step(args, lambda line: print(line, file=sys.stderr))  # noqa: T201
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
