"""How strongly each layer responds: the 2015 paper's Figure 7 for any network.

A layer's response is the output of its BatchNorm, before ReLU and addition; in networks without
BatchNorm, the output of its convolution. Normalisations on shortcuts are not layers of the paper
and are left out.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.norm import GhostBatchNorm2d


@dataclass(frozen=True)
class LayerResponse:
    name: str
    std: float  # over all images, channels and positions


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose responses count, in network order."""
    on_path = {name: m for name, m in model.named_modules()
               if not {"downsample", "se", "gate"} & set(name.split("."))}
    has_norms = any(isinstance(m, GhostBatchNorm2d) for m in on_path.values())
    kind = GhostBatchNorm2d if has_norms else nn.Conv2d
    return {name: m for name, m in on_path.items() if isinstance(m, kind)}


def layer_responses(
    model: nn.Module, batches: Iterable[Tensor], *, batch_statistics: bool = False
) -> list[LayerResponse]:
    """Standard deviation of every layer's response over all `batches` of normalised images.

    Args:
        model: on the device of the batches; its mode and statistics are left as they were.
        batches: images [n, 3, h, w].
        batch_statistics: normalise by each batch's own statistics, for networks at initialisation,
            whose running statistics mean nothing yet; False: by the running ones.

    Raises:
        ValueError: no images were given.

    Source: He et al. 2015, section 4.2 and figure 7.
    """
    layers = _layers(model)
    totals = {name: [0.0, 0.0, 0.0] for name in layers}  # count, sum, sum of squares

    def record(name: str, response: Tensor) -> None:
        wide = response.double()
        total = totals[name]
        total[0] += wide.numel()
        total[1] += wide.sum().item()
        total[2] += wide.square().sum().item()

    def watch(name: str, layer: nn.Module) -> Any:
        if not isinstance(layer, GhostBatchNorm2d):
            return layer.register_forward_hook(lambda _m, _i, output: record(name, output))

        # Addition and ReLU are fused into the layer, so its response is computed once more.
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            record(name, F.batch_norm(
                inputs[0], None if batch_statistics else layer.running_mean,
                None if batch_statistics else layer.running_var, layer.weight, layer.bias,
                batch_statistics, 0.0, layer.eps))

        return layer.register_forward_pre_hook(before)

    modes = {m: m.training for m in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
    kept = [(m, m.stat_sums.clone(), m.stat_groups.clone(), m.bn_batch) for m in norms]
    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        model.eval()
        if batch_statistics:
            for norm in norms:
                norm.train()
                norm.bn_batch = None
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for norm, sums, groups, bn_batch in kept:
            norm.stat_sums.copy_(sums)
            norm.stat_groups.copy_(groups)
            norm.bn_batch = bn_batch
    if any(total[0] == 0 for total in totals.values()):
        raise ValueError("layer responses need at least one batch of images; the split is empty")
    return [LayerResponse(name, math.sqrt(max(0.0, squares / count - (total / count) ** 2)))
            for name, (count, total, squares) in totals.items()]


def write_responses(curves: dict[str, list[LayerResponse]], folder: Path) -> dict[str, Path]:
    """responses.json and responses.png in `folder`; returns {"json": path, "png": path}.

    Args:
        curves: one list of responses per network, under the name shown in the legend.
    """
    paths = {"json": folder / "responses.json", "png": folder / "responses.png"}
    record = {label: {"network_order": [asdict(r) for r in responses],
                      "sorted": [asdict(r) for r in _by_size(responses)]}
              for label, responses in curves.items()}
    paths["json"].write_text(json.dumps(record, indent=1) + "\n")
    figure = plot_responses(curves)
    figure.savefig(paths["png"], dpi=100)
    return paths


def log_responses(curves: dict[str, list[LayerResponse]], writer: Any, step: int) -> None:
    """The figure, and each curve as a histogram, to a TensorBoard SummaryWriter."""
    writer.add_figure("responses", plot_responses(curves), step)
    for label, responses in curves.items():
        writer.add_histogram(f"responses/{label}", torch.tensor([r.std for r in responses]), step)


def plot_responses(curves: dict[str, list[LayerResponse]]) -> Any:
    """A matplotlib Figure: network order above, sorted by size below."""
    from matplotlib.figure import Figure  # its import takes longer than most commands

    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    above, below = figure.subplots(2, 1)
    for label, responses in curves.items():
        above.plot(range(1, len(responses) + 1), [r.std for r in responses], label=label, lw=1)
        below.plot(range(1, len(responses) + 1), [r.std for r in _by_size(responses)], lw=1)
    above.set(xlabel="layer, in network order", ylabel="standard deviation")
    below.set(xlabel="layer, sorted by size", ylabel="standard deviation")
    above.legend()
    return figure


def _by_size(responses: list[LayerResponse]) -> list[LayerResponse]:
    return sorted(responses, key=lambda r: -r.std)
