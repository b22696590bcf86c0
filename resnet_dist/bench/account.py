"""What a training step launches and moves, by kind of work, for our step and for torch's eager one.

    python -m resnet_dist.bench.account --model resnet50 --batch 256

No GPU: the engine's own step runs on the meta device, which knows shapes alone, and every operation
and every launch of a Triton kernel is written down as it comes. A launch moves each of its tensors
once, and nothing stays in a cache between two launches; it takes as long as its bytes, its
arithmetic or a launch that does nothing, whichever is longest. So the sum is a floor of this very
sequence of launches, not a forecast: kernels reach 70 to 90% of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_dist.bench.peer import classes, plain_model
from resnet_dist.config.load import config_from_dict
from resnet_dist.engine.ddp import make_engine
from resnet_dist.engine.precision import AUTOCAST_DTYPES
from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.build import build_model
from resnet_dist.ranks.distributed import World

META = torch.device("meta")
# Operations of torch by the kind of work they are; others by their size.
_KINDS = {
    "convolution": "convolution", "convolution_backward": "convolution",
    "native_batch_norm": "batch_norm", "native_batch_norm_backward": "batch_norm",
    "max_pool2d_with_indices": "pool", "max_pool2d_with_indices_backward": "pool", "mean": "pool",
    "_to_copy": "casts", "mm": "head", "addmm": "head",
}
_MODULES = {"batch_norm": "batch_norm", "max_pool": "pool", "average_pool": "pool",
            "normalize": "input"}
_LARGE = 2**20  # elements: of an activation


@dataclass(frozen=True)
class Launch:
    kind: str
    name: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a device can do, measured or assumed."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: float  # a kernel that does nothing, one after another

    def seconds(self, launch: Launch) -> float:
        return max(launch.bytes / self.bytes_per_s, launch.flops / self.flops_per_s, self.launch_s)


def our_step(model: str, *, batch: int, bn_batch: int, size: int, precision: str) -> list[Launch]:
    """Every launch of one step of `engine.ddp`, in order; the optimizer's as one, last."""
    config = config_from_dict({
        "name": "account", "batch_size": batch, "bn_batch": bn_batch, "precision": precision,
        "threads": 1, "model": {"name": model}, "schedule": {"name": "constant"},
        "augment": {"name": "random_resized_crop", "size": size}})
    with META:
        network = build_model(model, num_classes=classes(size), bn_batch=bn_batch)
        images, labels = _batch(batch, size)
    shape = (1, 3, 1, 1)
    engine = make_engine(network, config, World(0, 1, 0, META), (
        np.full(shape, 0.45, np.float32), np.full(shape, 4.4, np.float32)))
    engine.autocast = lambda: _Casts(precision)  # type: ignore[assignment,method-assign,return-value]
    engine._update = lambda lr: None  # type: ignore[method-assign]
    with kernels.as_on_a_gpu():
        found = _launches(lambda: engine.train_step(images, labels, None, 0.1), triton=True)
    return [*found, _optimizer(network)]


def eager_step(model: str, *, batch: int, size: int, precision: str) -> list[Launch]:
    """The same of torch's own modules, channels_last, with autocast, as in `bench.step`."""
    with META:
        network = plain_model(model, classes(size))
        images, labels = _batch(batch, size)
        mean = torch.empty(1, 3, 1, 1)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step() -> None:
        network.zero_grad(set_to_none=True)
        x = images.permute(0, 3, 1, 2).float().sub_(mean).mul_(0.02)
        x = x.contiguous(memory_format=torch.channels_last)
        with _Casts(precision):
            logits = network(x)
        F.cross_entropy(logits.float(), labels).backward()

    return [*_launches(step, triton=False), _optimizer(network)]


def _batch(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return (torch.empty((batch, size, size, 3), dtype=torch.uint8),
            torch.empty(batch, dtype=torch.int64))


def _optimizer(network: nn.Module) -> Launch:
    """Fused SGD: weight and momentum read and written, gradient read; float32. Some five launches,
    which take hundreds of tensors each, count as one."""
    return Launch("optimizer", "sgd", 5 * 4.0 * sum(p.numel() for p in network.parameters()))


def by_kind(launches: Iterable[Launch], rates: Rates) -> dict[str, dict[str, float]]:
    """kind -> launches, bytes, flops and seconds; "all" is their sum."""
    found: dict[str, dict[str, float]] = {}
    for launch in launches:
        for kind in (launch.kind, "all"):
            row = found.setdefault(kind, dict.fromkeys(("launches", "bytes", "flops", "s"), 0.0))
            row["launches"] += 1
            row["bytes"] += launch.bytes
            row["flops"] += launch.flops
            row["s"] += rates.seconds(launch)
    return {kind: found[kind] for kind in (*sorted(found.keys() - {"all"}), "all")}


# -- Writing down ----------------------------------------------------------------------------------

def _launches(step: Callable[[], object], *, triton: bool) -> list[Launch]:
    """What `step` launches once it has settled: its second run."""
    found: list[Launch] = []

    def once() -> list[Launch]:
        step()
        found.clear()
        with _Operations(found):
            step()
        return found

    if not triton:
        return once()
    from triton.runtime.jit import JITFunction

    def note(kernel: Any, *arguments: Any, **others: Any) -> None:
        module = kernel.__module__.rpartition(".")[2]
        tensors = _tensors((arguments, others))
        found.append(Launch(_MODULES.get(module, module), f"{module}.{kernel.__name__}",
                            sum(map(_size, tensors))))

    run = JITFunction.run
    JITFunction.run = note  # where `kernel[grid](...)` ends: nothing is compiled, nothing runs
    try:
        return once()
    finally:
        JITFunction.run = run


class _Casts(TorchFunctionMode):
    """What autocast does, which does not know the meta device: 16-bit convolutions and products,
    each weight cast once."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (),
                           keywords: Any = None) -> Any:
        if function in (torch.conv2d, F.linear):
            arguments = [self._cast(each) if isinstance(each, Tensor) else each
                         for each in arguments]
        return function(*arguments, **(keywords or {}))

    def _cast(self, x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            return x.to(self._dtype)
        if id(x) not in self._weights:
            self._weights[id(x)] = x.to(self._dtype)
        return self._weights[id(x)]


class _Operations(TorchDispatchMode):
    """Writes torch's own operations down, as the kernels they are on a GPU."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found
        self._backward = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (),
                           keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name.removeprefix("aten::")
        if name.startswith("convolution"):  # cuDNN's are channels_last as what they are given
            result = tree_map_only(Tensor, _as_cudnn_lays_it_out, result)
        given, made = _tensors((arguments, keywords)), _tensors(result)
        if name.startswith("profiler") or "empty" in name or not made or (
                made[0].device != META or self._is_view(function, given, made)):
            return result
        self._backward |= name == "nll_loss_backward"
        if name == "convolution":
            self._convolution(name, arguments, result)
        elif name == "convolution_backward":
            self._convolution_backward(arguments, result)
        else:
            self._add(name, given, made)
        return result

    @staticmethod
    def _is_view(function: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        storages = {t.untyped_storage()._cdata for t in given}
        return (not function._schema.is_mutable
                and all(t.untyped_storage()._cdata in storages for t in made))

    def _add(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        size = sum(map(_size, given)) + sum(map(_size, made))
        large = max(t.numel() for t in [*given, *made]) >= _LARGE
        kind = _KINDS.get(name, "elementwise" if large else "small")
        if name in ("add", "add_") and large and self._backward:
            kind = "gradient_sums"
        if kind == "batch_norm":  # two kernels, of which the first reads what the second reads
            again = sum(_size(t) for t in given if t.dim() == 4)
            self._found.append(Launch(kind, name, again))
        self._found.append(Launch(kind, name, size, _products(name, given)))

    def _convolution(self, name: str, arguments: Any, y: Tensor) -> None:
        x, weight, _, stride, *_ = arguments
        self._found.append(Launch("convolution", name, _sampled(x, weight, stride) + _size(weight)
                                  + _size(y), _flops(y, weight)))

    def _convolution_backward(self, arguments: Any, result: Any) -> None:
        grad, x, weight, _, stride, *_ = arguments
        grad_x, grad_weight, _ = result
        flops = _flops(grad, weight)
        if grad_weight is not None:
            self._found.append(Launch("convolution", "of the weight", _size(grad) + _size(weight)
                                      + _sampled(x, weight, stride), flops))
        if grad_x is not None:
            self._found.append(Launch("convolution", "of the input", _size(grad) + _size(weight)
                                      + _size(x), flops))


def _as_cudnn_lays_it_out(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(t: Tensor) -> float:
    return float(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()))  # expanded ones less


def _sampled(x: Tensor, weight: Tensor, stride: list[int]) -> float:
    """A strided 1x1 convolution touches the pixels it samples."""
    return _size(x) / (stride[0] * stride[1] if weight.shape[2:] == (1, 1) else 1)


def _flops(y: Tensor, weight: Tensor) -> float:
    return 2.0 * y.numel() * weight[0].numel()


def _products(name: str, given: list[Tensor]) -> float:
    if name not in ("mm", "addmm"):
        return 0.0
    a, b = given[-2:]
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches and bytes of a step; no GPU needed.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bn-batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", default="auto", choices=["auto", *AUTOCAST_DTYPES, "fp32"])
    parser.add_argument("--bytes-per-s", type=float, default=4.3e12)
    parser.add_argument("--flops-per-s", type=float, default=790e12)
    parser.add_argument("--launch-us", type=float, default=2.2)
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = "bf16"  # any GPU's since Ampere
    rates = Rates(args.bytes_per_s, args.flops_per_s, args.launch_us * 1e-6)
    common = {"batch": args.batch, "size": args.size, "precision": args.precision}
    steps = {"ours": our_step(args.model, bn_batch=args.bn_batch, **common),
             "eager": eager_step(args.model, **common)}
    sys.stdout.write(json.dumps({
        **vars(args), "steps": {who: by_kind(found, rates) for who, found in steps.items()},
        "launches": {who: [asdict(launch) for launch in found] for who, found in steps.items()},
    }) + "\n")


if __name__ == "__main__":
    main()
