"""What a network is made of: layers, output sizes, parameters, multiply-adds.

Nothing is computed: the network is built and run on the meta device, which knows shapes alone.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.models.build import build_model
from resnet_dist.models.catalog.names import input_size
from resnet_dist.models.layers import BlurConv2d


@dataclass(frozen=True)
class LayerSummary:
    """One convolution, linear, normalisation or pooling layer, in the order of execution."""

    name: str
    kind: str
    output: tuple[int, ...]  # without the batch dimension
    parameters: int
    flops: int  # multiply-adds of convolutions and linear layers, as the papers count


@dataclass(frozen=True)
class ModelSummary:
    name: str
    input: tuple[int, int, int]
    layers: tuple[LayerSummary, ...]
    parameters: int
    flops: int
    depth: int  # convolutions and linear layers outside shortcuts and gates: the number in the name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize_name(name: str, *, num_classes: int = 1000, **options: Any) -> ModelSummary:
    """Summary of `build_model(name, ...)` at its published input size."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, **options)
    return summarize(model, name, input_size(name))


def summarize(model: nn.Module, name: str, side: int) -> ModelSummary:
    """Summary of `model` for one image of `side` x `side` pixels; the model is left as it was."""
    names = {module: path for path, module in model.named_modules()}
    layers: list[LayerSummary] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        layers.append(LayerSummary(names[module], type(module).__name__, tuple(output.shape[1:]),
                                   parameters, _flops(module, inputs[0], output)))

    leaves = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d,
              nn.AdaptiveAvgPool2d)
    hooks = [m.register_forward_hook(record) for m in names if isinstance(m, leaves)]
    device = next(model.parameters()).device
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(torch.empty(1, 3, side, side, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    depth = sum(layer.flops > 0 and not _is_side_path(layer.name) for layer in layers)
    return ModelSummary(name, (3, side, side), tuple(layers),
                        sum(p.numel() for p in model.parameters()),
                        sum(layer.flops for layer in layers), depth)


def _flops(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        per_output = module.weight[0].numel()
        blur = 9 * x.numel() if isinstance(module, BlurConv2d) else 0
        return y.numel() * per_output + blur
    return 0


def _is_side_path(name: str) -> bool:
    return any(part in ("downsample", "se", "gate") for part in name.split("."))


def format_summary(summary: ModelSummary) -> str:
    """The summary as text, one line a layer and the totals last."""
    rows = [("layer", "kind", "output", "parameters", "mult-adds")]
    rows += [(layer.name, layer.kind, "x".join(map(str, layer.output)), f"{layer.parameters:,}",
              f"{layer.flops:,}") for layer in summary.layers]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["  ".join(cell.ljust(w) if k < 3 else cell.rjust(w)
                       for k, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in rows]
    side = "x".join(map(str, summary.input))
    lines.append(f"{summary.name}, input {side}: {summary.depth} weighted layers, "
                 f"{summary.parameters:,} parameters, {summary.flops / 1e9:.3f}e9 multiply-adds")
    return "\n".join(lines)


if __name__ == "__main__":
    shown = summarize_name(sys.argv[1])
    sys.stdout.write((json.dumps(shown.to_json()) if "--json" in sys.argv
                      else format_summary(shown)) + "\n")
