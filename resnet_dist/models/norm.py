"""BatchNorm over groups of `bn_batch` images, whatever the local batch is.

In: activations and, once a step, `commit_running_stats`. Out: normalised activations, and running
statistics that do not depend on how a step was cut into micro-batches or ranks.

A training forward never touches the running statistics. It adds each group's mean and unbiased
variance to accumulators, and the engine commits their average once per optimizer step. Accumulators
and running statistics of all layers are views of three flat tensors, so that a commit is a handful
of operations and not several per layer.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels

_recomputing = threading.local()  # autograd recomputes on its own threads on GPUs


@contextmanager
def without_statistics() -> Iterator[None]:
    """Inside, training forwards leave the accumulators alone: a recomputed forward counts once."""
    before = getattr(_recomputing, "active", False)
    _recomputing.active = True
    try:
        yield
    finally:
        _recomputing.active = before


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of `bn_batch` consecutive images.

    Same parameters and state dict as `nn.BatchNorm2d`. `forward(x, residual, relu)` returns
    `relu?(norm(x) + residual?)` with x's shape, dtype and memory format; x is [n, c, h, w].

    Args:
        bn_batch: images per group; None: the whole input is one group.

    Raises:
        ValueError: in training, the number of images is not a multiple of `bn_batch`.

    Source: He et al. 2015 trained 8 GPUs with 32 images each, statistics per GPU.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    stat_sums: Tensor  # [2, c]: sums of the groups' means and unbiased variances since a commit
    stat_groups: Tensor  # []: number of groups summed

    def __init__(
        self,
        num_features: int,
        *,
        bn_batch: int | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.bn_batch = bn_batch
        self.register_buffer("stat_sums", torch.zeros(2, num_features), persistent=False)
        self.register_buffer("stat_groups", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if not self.training:
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        bn_batch = x.shape[0] if self.bn_batch is None else self.bn_batch
        y, mean, var = kernels.ghost_batch_norm(
            x, self.weight, self.bias, bn_batch, self.eps, residual, relu
        )
        if not getattr(_recomputing, "active", False):
            self.stat_sums[0].add_(mean.sum(0))
            self.stat_sums[1].add_(var.sum(0))
            self.stat_groups.add_(mean.shape[0])
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bn_batch={self.bn_batch}"


class _FlatStats:
    """The flat tensors behind every GhostBatchNorm2d of one model, in `modules()` order.

    running: [sum of 2c], per layer mean then variance. sums: [sum of 2c + layers], the same order
    and then the group counts. tracked: int64 [layers].
    """

    def __init__(self, layers: list[GhostBatchNorm2d]) -> None:
        self.layers = layers
        widths = [2 * layer.num_features for layer in layers]
        first = layers[0].running_mean
        self.running = first.new_empty(sum(widths))
        self.sums = first.new_empty(sum(widths) + len(layers))
        self.tracked = first.new_empty(len(layers), dtype=torch.int64)
        self.layer_of = torch.repeat_interleave(torch.tensor(widths)).to(first.device)
        self.momentum = first.new_tensor([layer.momentum for layer in layers])[self.layer_of]
        self.counts = self.sums[sum(widths):]
        start = 0
        for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
            running = self.running[start : start + width].view(2, -1)
            sums = self.sums[start : start + width].view(2, -1)
            self._adopt(layer, "running_mean", running[0])
            self._adopt(layer, "running_var", running[1])
            self._adopt(layer, "stat_sums", sums)
            self._adopt(layer, "stat_groups", self.counts[index])
            self._adopt(layer, "num_batches_tracked", self.tracked[index])
            start += width

    @staticmethod
    def _adopt(layer: GhostBatchNorm2d, name: str, view: Tensor) -> None:
        view.copy_(getattr(layer, name))
        setattr(layer, name, view)

    def check(self) -> None:
        """Raises RuntimeError if a layer's buffers are no longer views of these tensors."""
        pairs = (("running_mean", self.running), ("stat_sums", self.sums))
        homes = [(name, flat.untyped_storage().data_ptr()) for name, flat in pairs]
        for layer in self.layers:
            for name, home in homes:
                if getattr(layer, name).untyped_storage().data_ptr() != home:
                    raise RuntimeError(
                        "BatchNorm buffers were replaced after flatten_bn_stats (by .to(), .half() "
                        "or load_state_dict(assign=True)); call flatten_bn_stats(model) again"
                    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, a DeepSpeed engine or torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _stats(model: nn.Module) -> _FlatStats | None:
    model = _unwrapped(model)
    stats = model.__dict__.get("_flat_bn_stats")
    if stats is None:
        if not any(isinstance(m, GhostBatchNorm2d) for m in model.modules()):
            return None
        raise RuntimeError("call flatten_bn_stats(model) once, after the model is on its device")
    stats.check()
    return stats


@torch.no_grad()
def flatten_bn_stats(model: nn.Module) -> None:
    """Move every layer's statistics into flat tensors; buffers become views, values stay.

    Call once, when the model has its device and dtype; again after anything that replaces buffers.
    """
    model = _unwrapped(model)
    layers = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
    if layers:
        model.__dict__["_flat_bn_stats"] = _FlatStats(layers)


@torch.no_grad()
def commit_running_stats(model: nn.Module, momentum: float | None = None) -> None:
    """running <- (1 - m) * running + m * (average over the groups since the last commit); clear.

    A layer that saw no group is left as it is. Call once per optimizer step. `momentum` replaces
    the layers' own: 1.0 makes the running statistics the plain average of all groups since the last
    commit, which is how the statistics of the 2015 released models were computed after training.
    """
    stats = _stats(model)
    if stats is None:
        return
    counts = stats.counts[stats.layer_of]
    rate = stats.momentum if momentum is None else torch.full_like(stats.momentum, momentum)
    average = stats.sums[: counts.numel()] / counts.clamp(min=1)
    stats.running.lerp_(average, rate * (counts > 0))
    stats.tracked.add_(stats.counts > 0)
    stats.sums.zero_()


def bn_stat_vector(model: nn.Module) -> Tensor:
    """Copy of all accumulators: [sum of 2c + layers], sums in layer order, then group counts.

    Vectors of disjoint groups add up: `set_bn_stat_vector(model, a + b)` is as if this model had
    seen the groups of both.
    """
    stats = _stats(model)
    return _nothing(model) if stats is None else stats.sums.clone()


@torch.no_grad()
def set_bn_stat_vector(model: nn.Module, vector: Tensor) -> None:
    """Replace the accumulators, e.g. by the sum over all ranks; see `bn_stat_vector`."""
    stats = _stats(model)
    if stats is not None:
        stats.sums.copy_(_checked(vector, stats.sums))


def bn_running_vector(model: nn.Module) -> Tensor:
    """Copy of all running means and variances: [sum of 2c], per layer mean then variance."""
    stats = _stats(model)
    return _nothing(model) if stats is None else stats.running.clone()


@torch.no_grad()
def set_bn_running_vector(model: nn.Module, vector: Tensor) -> None:
    """Replace the running statistics, e.g. by the average over all ranks."""
    stats = _stats(model)
    if stats is not None:
        stats.running.copy_(_checked(vector, stats.running))


def _nothing(model: nn.Module) -> Tensor:
    """The vector of a network without BatchNorm, where its weights are: ranks exchange it, too."""
    return torch.zeros(0, device=next(model.parameters()).device)


def _checked(vector: Tensor, like: Tensor) -> Tensor:
    if vector.shape != like.shape:
        raise ValueError(
            f"a BatchNorm vector of {tuple(vector.shape)} for a model that needs "
            f"{tuple(like.shape)}; it comes from another architecture"
        )
    return vector
