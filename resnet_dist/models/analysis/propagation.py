"""How signal and gradient travel through a network before any training.

Right after initialisation every BatchNorm response has variance one by construction; what tells
architectures apart is the variance of what each block hands on, and the gradient that comes back.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.build import build_model
from resnet_dist.models.catalog.names import input_size
from resnet_dist.models.keyed import set_sample_keys
from resnet_dist.models.layers import Stage

NAMES = ("plain56", "resnet56", "preresnet164")


@dataclass(frozen=True)
class BlockSignal:
    name: str
    variance: float  # of the block's output, over images, channels and positions
    gradient: float  # mean square of the loss gradient with respect to that output


def signal_propagation(model: nn.Module, images: Tensor, labels: Tensor) -> list[BlockSignal]:
    """Forward variance and gradient mean square after every block, in training mode.

    Args:
        model: freshly built; its gradients and BatchNorm accumulators are disturbed.
        images: [n, 3, h, w]; labels: int64 [n].
    """
    seen: dict[str, list[float]] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        values = seen.setdefault(name, [output.detach().double().var(correction=0).item()])
        output.register_hook(lambda g: values.append(g.double().square().mean().item()))

    names = {module: name for name, module in model.named_modules()}
    blocks = [b for s in model.modules() if isinstance(s, Stage) for b in s]
    hooks = [b.register_forward_hook(functools.partial(record, names[b])) for b in blocks]
    try:
        model.train()
        set_sample_keys(model, torch.arange(len(images)))
        F.cross_entropy(model(images), labels).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return [BlockSignal(name, *values) for name, values in seen.items()]


def measure(
    names: Sequence[str] = NAMES, *, seeds: int = 3, batch: int = 32
) -> dict[str, list[BlockSignal]]:
    """The geometric mean over `seeds` initialisations, on white-noise images, per architecture."""
    curves = {}
    for name in names:
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            side = input_size(name)
            model = build_model(name, num_classes=10)
            labels = torch.arange(batch) % 10
            runs.append(signal_propagation(model, torch.randn(batch, 3, side, side), labels))
        logs = torch.tensor([[(s.variance, s.gradient) for s in run] for run in runs]).log()
        means = logs.mean(0).exp().tolist()
        curves[name] = [BlockSignal(s.name, *pair) for s, pair in zip(runs[0], means, strict=True)]
    return curves


def plot(curves: dict[str, list[BlockSignal]]) -> Any:
    """A matplotlib Figure: variance forward and gradient backward, against relative depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, signals in curves.items():
        depth = [(k + 1) / len(signals) for k in range(len(signals))]
        left.semilogy(depth, [s.variance for s in signals], label=name, lw=1.2)
        right.semilogy(depth, [s.gradient / signals[-1].gradient for s in signals], lw=1.2)
    left.set(xlabel="depth of block / blocks", ylabel="variance of block output")
    right.set(xlabel="depth of block / blocks", ylabel="gradient mean square (last block = 1)")
    right.yaxis.label.set_size(8)
    left.legend()
    return figure
