"""Weak and strong scaling measured on gloo ranks of this machine, and the model fitted to it.

    python -m resnet_dist.bench.scaling [--worlds 1,2,4 --unseen 8]
    python -m resnet_dist.bench.scaling --plan

Every rank is a process with one thread and its share of the batch, as in training. The model is
fitted to `--worlds` and then judged on `--unseen`, which it has not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_dist.bench.plan import Machine, Point, Recipe, fit, plan, stops_scaling

GPUS = tuple(2**k for k in range(3, 13))  # 8 ... 4,096
IMAGES_A_GPU = 32  # weak scaling: the paper's share


def bench_scaling(args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measured points, the fitted model, and its error where it was fitted and where not.

    Raises: RuntimeError where ranks fail.
    """
    worlds, unseen = [[int(n) for n in text.split(",") if n]
                      for text in (args.worlds, args.unseen)]
    points: dict[str, list[Point]] = {"seen": [], "unseen": []}
    gradient_bytes = 0
    rounds: dict[tuple[int, int], list[float]] = {}
    for number in range(args.rounds):
        for world in worlds + unseen:
            found = _run_world(world, args)
            gradient_bytes = found["gradient_bytes"]
            for images, seconds in found["step_s"]:
                rounds.setdefault((world, images), []).append(seconds)
                progress(f"round {number + 1}/{args.rounds}: {world} ranks of {images} images: "
                         f"{1e3 * seconds:,.0f} ms")
    for (world, images), seconds_seen in rounds.items():
        # The fastest round: whatever else runs on a machine only ever adds.
        points["unseen" if world in unseen else "seen"].append(
            Point(world, images, min(seconds_seen)))
    cores = len(os.sched_getaffinity(0))
    model = fit(points["seen"], cores, gradient_bytes)
    rows = [{**dataclasses.asdict(p), "seen": kind == "seen",
             "scaling": "weak" if p.images == args.images else "strong",
             "images_per_s": p.ranks * p.images / p.step_s,
             "model_s": model.step_s(p.ranks, p.images),
             "error": model.step_s(p.ranks, p.images) / p.step_s - 1,
             "spread": [min(rounds[p.ranks, p.images]), max(rounds[p.ranks, p.images])]}
            for kind, group in points.items() for p in group]
    return {"model": args.model, "size": args.size, "batch": args.batch, "images": args.images,
            "cores": cores, "rounds": args.rounds, "points": rows,
            "fit": dataclasses.asdict(model)}


def plan_tables() -> dict[str, Any]:
    """The plan for ResNet-50 from 8 to 4,096 GPUs, strong and weak; every assumption beside it."""
    machine, recipe = Machine(), Recipe()
    strong = plan(machine, recipe, GPUS)
    return {"machine": dataclasses.asdict(machine), "recipe": dataclasses.asdict(recipe),
            "strong": strong, "weak": plan(machine, recipe, GPUS, images_a_rank=IMAGES_A_GPU),
            "weak_256": plan(machine, recipe, GPUS, images_a_rank=256),
            "batch_stops_scaling_at": stops_scaling(strong)}


def draw(result: dict[str, Any], tables: dict[str, Any], file: Path) -> None:
    """Measured points beside the model, and the plan, as one PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for kind, colour in (("weak", "tab:blue"), ("strong", "tab:orange")):
        rows = sorted((r for r in result["points"] if r["scaling"] == kind),
                      key=lambda r: r["ranks"])
        ranks = [r["ranks"] for r in rows]
        left.plot(ranks, [1e3 * r["model_s"] for r in rows], "--", color=colour,
                  label=f"{kind}, model")
        for r in rows:
            left.plot(r["ranks"], 1e3 * r["step_s"], "o", color=colour,
                      markerfacecolor=colour if r["seen"] else "white")
    left.set(xscale="log", yscale="log", xlabel="gloo ranks (hollow: not fitted)",
             ylabel="step, ms", title=f"measured on {result['cores']} cores")
    left.set_xticks(sorted({r["ranks"] for r in result["points"]}))
    left.set_yticks([100 * 2**power for power in range(8)])
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ticker.ScalarFormatter())
        axis.set_minor_locator(ticker.NullLocator())
    times = [1e3 * r[key] for r in result["points"] for key in ("step_s", "model_s")]
    left.set_ylim(0.8 * min(times), 1.25 * max(times))
    for key, name in (("strong", "batch 256"), ("weak", "32 images a GPU"),
                      ("weak_256", "256 images a GPU")):
        rows = tables[key]
        right.plot([r["gpus"] for r in rows], [r["images_per_s"] for r in rows], "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s",
              title="planned, ResNet-50 on H100")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


# -- Ranks -----------------------------------------------------------------------------------------

def _run_world(world: int, args: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = json.dumps({key: getattr(args, key) for key in
                           ("model", "size", "batch", "images", "steps")})
    command = [sys.executable, "-m", "resnet_dist.bench.scaling", "--rank", settings]
    ranks = [subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
             "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}) for rank in range(world)]
    try:
        outcomes = [process.communicate(timeout=600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, outcomes, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of {world} failed:\n{errors[-2000:]}")
    found: dict[str, Any] = json.loads(outcomes[0][0])
    return found


def _rank(settings: dict[str, Any]) -> None:
    """One rank: both kinds of scaling, one after the other; rank 0 tells the median step."""
    import numpy as np
    import torch

    from resnet_dist.config.load import config_from_dict
    from resnet_dist.engine.ddp import make_engine
    from resnet_dist.models.build import build_model
    from resnet_dist.ranks import distributed

    ranks = int(os.environ["WORLD_SIZE"])
    shape, found = (1, 3, 1, 1), []
    world, parameters = None, 0
    for batch in (settings["images"] * ranks, settings["batch"]):
        share = batch // ranks
        config = config_from_dict({
            "name": "bench", "batch_size": batch, "bn_batch": min(32, share), "threads": 1,
            "device": "cpu", "model": {"name": settings["model"]},
            "augment": {"name": "random_resized_crop", "size": settings["size"]},
            "schedule": {"name": "constant"}, "launch": {"ranks_per_node": ranks}})
        world = world or distributed.init_world(config)
        torch.manual_seed(0)
        model = build_model(settings["model"], num_classes=1000, bn_batch=min(32, share))
        parameters = sum(p.numel() for p in model.parameters())
        engine = make_engine(model, config, world, (np.full(shape, 0.45, np.float32),
                                                    np.full(shape, 4.4, np.float32)))
        images = torch.randint(256, (share, settings["size"], settings["size"], 3),
                               dtype=torch.uint8)
        labels, times = torch.randint(1000, (share,)), []
        for step in range(settings["steps"] + 2):
            began = time.perf_counter()
            engine.train_step(images, labels, None, 0.01)
            if step >= 2:  # the first ones allocate
                times.append(time.perf_counter() - began)
        found.append((share, statistics.median(times)))
    if world is not None and world.rank == 0:
        sys.stdout.write(json.dumps({"step_s": found, "gradient_bytes": 4 * parameters}) + "\n")
    distributed.shutdown()


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return _rank(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description="Scaling, measured here and planned.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=16, help="of a rank, weak scaling")
    parser.add_argument("--batch", type=int, default=128, help="of all ranks, strong scaling")
    parser.add_argument("--worlds", default="1,2,4")
    parser.add_argument("--unseen", default="8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plan", action="store_true", help="only plan; measure nothing")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    tables = plan_tables()
    if args.plan:
        sys.stdout.write(json.dumps(tables, indent=1) + "\n")
        return
    result = bench_scaling(args, lambda line: print(line, file=sys.stderr))  # noqa: T201
    if args.figure is not None:
        draw(result, tables, args.figure)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
