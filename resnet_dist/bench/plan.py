"""How long a step takes on N ranks: a model, its fit to measurements, and plans made with it.

In: measured steps, or a machine's published figures. Out: seconds, images/s, hours, bytes/s. Pure;
imports no torch.

A step is  fixed + images / rate + what of the gradient's all-reduce is not hidden + stragglers.
A ring moves 2 (N - 1) / N of the gradient through every rank in 2 (N - 1) hops; a tree takes
2 log2 N hops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# -- Measured: ranks that share a machine's cores --------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One measured step: `ranks` ranks of one thread each, `images` images a rank."""

    ranks: int
    images: int
    step_s: float


@dataclass(frozen=True)
class SharedCores:
    """Ranks on one machine, nothing hidden: whoever sums gradients does not compute.

    fixed_s: a step without images; image_s: one image on a core of its own; byte_s: one byte of
    gradient through a rank; hop_s: one message. With more ranks than cores, all work of a rank
    takes `crowding` times as long.
    """

    fixed_s: float
    image_s: float
    byte_s: float
    hop_s: float
    cores: int
    gradient_bytes: int

    def step_s(self, ranks: int, images: int) -> float:
        return sum(value * times for value, times in zip(
            (self.fixed_s, self.image_s, self.byte_s, self.hop_s),
            _shares(ranks, images, self.cores, self.gradient_bytes), strict=True))


def _shares(ranks: int, images: int, cores: int, gradient_bytes: int) -> list[float]:
    """What multiplies each of the four costs."""
    crowding = max(1.0, ranks / cores)
    return [crowding, images * crowding, 2 * (ranks - 1) / ranks * gradient_bytes * crowding,
            2.0 * (ranks - 1)]


def fit(points: Iterable[Point], cores: int, gradient_bytes: int) -> SharedCores:
    """The costs with the least relative error over `points`; none is negative."""
    points = list(points)
    rows = np.array([_shares(p.ranks, p.images, cores, gradient_bytes) for p in points])
    rows /= np.array([[p.step_s] for p in points])
    active = list(range(4))
    while True:  # drop what comes out negative, worst first
        found, *_ = np.linalg.lstsq(rows[:, active], np.ones(len(points)), rcond=None)
        if (found >= 0).all():
            break
        active.pop(int(found.argmin()))
    costs = np.zeros(4)
    costs[active] = found
    fixed_s, image_s, byte_s, hop_s = costs.tolist()
    return SharedCores(fixed_s, image_s, byte_s, hop_s, cores, gradient_bytes)


# -- Planned: one GPU a rank -----------------------------------------------------------------------

@dataclass(frozen=True)
class Machine:
    """A cluster of GPUs, and where each figure comes from.

    fixed_s and images_per_s: ResNet-50 on H100 at 224 pixels, from two published steps of the same
    code: 7,006 images/s a GPU at 400 images and 4,604 at 50 (MLPerf training v3.0, NVIDIA, DGX
    H100, 8 and 64 GPUs): 400 / 7,006 - 50 / 4,604 seconds for 350 images, the rest is fixed.
    Bandwidths and hops: assumed, for NVLink and for one 400 Gbit/s adapter a GPU.
    gpu_hours_per_failure: 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et
    al. 2024, "The Llama 3 herd of models", sec. 3.3.4).
    """

    fixed_s: float = 50 / 4604 - 50 * (400 / 7006 - 50 / 4604) / 350
    images_per_s: float = 350 / (400 / 7006 - 50 / 4604)
    gpus_per_node: int = 8
    node_bytes_per_s: float = 350e9
    network_bytes_per_s: float = 45e9
    hop_s: float = 5e-6
    straggle: float = 0.01  # standard deviation of a rank's step, as a part of it; assumed
    gpu_hours_per_failure: float = 16384 * 54 * 24 / 419
    restart_s: float = 60.0  # from a dead rank to its next step; assumed
    storage_bytes_per_s: float = 1e9  # of one writer; assumed

    def all_reduce_s(self, ranks: int, size: float) -> float:
        """Seconds to sum `size` bytes over `ranks` ranks, ring or tree, whichever is faster."""
        if ranks == 1:
            return 0.0
        speed = (self.node_bytes_per_s if ranks <= self.gpus_per_node
                 else self.network_bytes_per_s)
        ring = 2 * (ranks - 1) / ranks * size / speed + 2 * (ranks - 1) * self.hop_s
        tree = 2 * size / speed + 2 * math.ceil(math.log2(ranks)) * self.hop_s
        return min(ring, tree)

    def step_s(self, ranks: int, images: float, gradient_bytes: float, buckets: int = 5) -> float:
        """One step: forward, then backward with all but the first bucket's wait hidden in it."""
        compute = images / self.images_per_s
        forward, backward = compute / 3, 2 * compute / 3
        reduce = buckets * self.all_reduce_s(ranks, gradient_bytes / buckets)
        step = self.fixed_s + forward + max(backward, backward / buckets + reduce)
        return step * (1 + self.straggle * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 1.0)


@dataclass(frozen=True)
class Recipe:
    """What is trained: ResNet-50 for 600,000 steps of 256 images, unless said otherwise."""

    parameters: int = 25_557_032
    images: int = 600_000 * 256
    batch_size: int = 256
    bn_batch: int = 32
    gradient_element: int = 2  # bytes: bf16 gradients
    checkpoint_steps: int = 1000
    image_bytes: float = 110e3  # the mean file of ImageNet's training set
    loader_images_per_s: float = 1740.0  # of one core: RESULTS.md, Loader

    @property
    def gradient_bytes(self) -> float:
        return float(self.parameters * self.gradient_element)

    @property
    def checkpoint_bytes(self) -> float:
        return 8.0 * self.parameters  # weight and momentum in float32


def plan(machine: Machine, recipe: Recipe, worlds: Iterable[int], *,
         images_a_rank: int | None = None) -> list[dict[str, Any]]:
    """A row for each world: strong scaling (the batch stays), or weak with `images_a_rank`.

    Efficiency is of images/s a GPU, against one GPU with the first row's images. Worlds with less
    than one image a rank are left out.
    """
    rows: list[dict[str, Any]] = []
    for ranks in worlds:
        images = images_a_rank or recipe.batch_size / ranks
        if images < 1:
            continue
        step = machine.step_s(ranks, images, recipe.gradient_bytes)
        rate = ranks * images / step
        alone = (rows[0]["images_a_rank"] if rows else images)
        best = alone / machine.step_s(1, alone, recipe.gradient_bytes)
        hours = recipe.images / rate / 3600
        failures = ranks * hours / machine.gpu_hours_per_failure
        lost_s = machine.restart_s + recipe.checkpoint_steps * step / 2
        rows.append({
            "gpus": ranks, "images_a_rank": images, "batch_size": round(ranks * images),
            "step_ms": 1e3 * step, "images_per_s": rate, "efficiency": rate / ranks / best,
            "hours": hours, "bn_batch": min(recipe.bn_batch, int(images)),
            "loader_cores_a_gpu": rate / ranks / recipe.loader_images_per_s,
            "data_bytes_per_s": rate * recipe.image_bytes,
            "checkpoint_every_s": recipe.checkpoint_steps * step,
            "checkpoint_bytes_per_s": recipe.checkpoint_bytes / (recipe.checkpoint_steps * step),
            "checkpoint_write_s": recipe.checkpoint_bytes / machine.storage_bytes_per_s,
            "failures": failures, "lost_minutes_a_failure": lost_s / 60,
            "lost_share": failures * lost_s / (hours * 3600)})
    return rows


def stops_scaling(rows: list[dict[str, Any]], least: float = 0.5) -> int:
    """The largest world for which doubling to it still gained `least` of what it could have."""
    last: int = rows[0]["gpus"]
    for before, after in itertools.pairwise(rows):
        if after["images_per_s"] / before["images_per_s"] < 1 + least:
            return last
        last = after["gpus"]
    return last
