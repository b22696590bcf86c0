"""One optimizer step, whoever computes it: images in, updated weights out.

In: a rank's uint8 images, labels and sample keys, and the learning rate. Out: weights that moved by
the gradient of the mean loss over the global batch, and sums of loss and hits in a window that
stays on the device until a logging step reads it.

fast: a rank runs its whole share at once (or in micro-batches) and DistributedDataParallel sums
gradients while the backward pass still runs.
exact: every `bn_batch` group runs alone on the bare module, and gradients, BatchNorm statistics and
counts are summed along one binary tree over all groups, first inside the rank, then across ranks.
Any power-of-two world computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist import losses, optim
from resnet_dist.checkpoint import EngineState
from resnet_dist.config import Config
from resnet_dist.distributed import (
    World,
    agree_max,
    all_sum,
    broadcast_from_zero,
    butterfly_all_reduce,
    gather_rows,
    tree_sum,
)
from resnet_dist.models import norm
from resnet_dist.models.keyed import set_sample_keys

Normalization = tuple[np.ndarray, np.ndarray]


class DDPEngine:
    """Data-parallel training of one model.

    Args:
        model: float32 on the CPU; the engine moves it. Ranks take rank 0's weights.
        normalization: float32 (mean, 1 / std), broadcastable to [n, 3, h, w], for x / 255.

    Collective: construction, and every method that says so.
    """

    def __init__(self, model: nn.Module, config: Config, world: World,
                 normalization: Normalization) -> None:
        self.config, self.world = config, world
        self.module: nn.Module = model.to(world.device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        norm.flatten_bn_stats(self.module)
        broadcast_from_zero([*self.module.parameters(), *self.module.buffers()], world)
        mean, inv_std = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
                         .to(world.device) for part in normalization)
        self._shift, self._scale = -mean * inv_std, inv_std / 255
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = optim.build_optimizer(self.module, config)
        # loss sum, top-1 hits, top-5 hits, images: of this rank in fast mode, of all in exact mode
        self._window = torch.zeros(4, device=world.device)
        self._exact = config.mode == "exact"
        if self._exact:
            self._leaf, self._leaf_gradients = self._flat_gradients()
        self._ddp = self._wrap() if world.size > 1 and not self._exact else None

    # -- The step ----------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor, sample_keys: Tensor | None,
                   lr: float) -> None:
        """Take one optimizer step; never waits for the device.

        Args:
            images: uint8 [n, S, S, 3], this rank's share of the global batch, host or device.
            labels: int64 [n].
            sample_keys: int64 [n], what the model's random draws are keyed by.

        Collective.
        """
        device = self.world.device
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        keys = None if sample_keys is None else sample_keys.to(device, non_blocking=True)
        optim.set_lr(self.optimizer, lr)
        self.module.train()
        step = self._exact_gradients if self._exact else self._fast_gradients
        step(images, labels, keys)
        self.optimizer.step()
        with torch.no_grad():
            norm.commit_running_stats(self.module)

    def _fast_gradients(self, images: Tensor, labels: Tensor, keys: Tensor | None) -> None:
        """Leave the global mean gradient in `.grad` and add this rank's sums to the window."""
        self.optimizer.zero_grad(set_to_none=True)
        model = self._ddp or self.module
        # Ranks are averaged, so each loss is the sum over its images times ranks / global batch.
        scale = self.world.size / self.config.batch_size
        size = self.config.micro_batch or len(images)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            last = start + size >= len(images)
            with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                loss, sums = self._forward(model, images[part], labels[part],
                                           None if keys is None else keys[part])
                (loss * scale).backward()
            self._window += sums

    def _exact_gradients(self, images: Tensor, labels: Tensor, keys: Tensor | None) -> None:
        """The same for exact mode; the window gets the global sums on every rank."""
        size = self.config.bn_batch
        assert size is not None
        gradients = self._leaf.numel()

        def leaf(group: int) -> Tensor:
            part = slice(group * size, (group + 1) * size)
            self._leaf.zero_()
            for parameter, gradient in zip(self._parameters, self._leaf_gradients, strict=True):
                parameter.grad = gradient
            loss, sums = self._forward(self.module, images[part], labels[part],
                                       None if keys is None else keys[part])
            (loss / self.config.batch_size).backward()
            statistics = norm.bn_stat_vector(self.module).to(self.world.device)
            norm.set_bn_stat_vector(self.module, torch.zeros_like(statistics))
            return torch.cat((self._leaf, statistics, sums))

        total = butterfly_all_reduce(tree_sum(leaf, 0, len(images) // size), self.world)
        self._leaf.copy_(total[:gradients])
        norm.set_bn_stat_vector(self.module, total[gradients:-4])
        self._window += total[-4:]

    def _forward(self, model: nn.Module, images: Tensor, labels: Tensor,
                 keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss summed over the images, and [loss sum, top-1, top-5, images]."""
        if keys is not None:
            set_sample_keys(self.module, keys)
        with self.autocast():
            logits = model(self.normalize(images))
        loss = losses.loss_sum(logits, labels)
        with torch.no_grad():
            top1, top5 = losses.correct(logits, labels)
            sums = torch.stack((loss.detach(), top1, top5, torch.full_like(top1, len(labels))))
        return loss, sums

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] on the device -> float32 [n, 3, S, S] in channels_last memory."""
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        return x.mul_(self._scale).add_(self._shift)

    def autocast(self) -> torch.autocast:
        """Convolutions and matrix products in bf16 where the precision says so."""
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16,
                              enabled=self.config.precision == "bf16")

    # -- What is read now and then -----------------------------------------------------------------

    def read_window(self) -> dict[str, float]:
        """Mean loss and hit rates in percent since the last call; resets. Collective."""
        loss, top1, top5, images = self._global_window().tolist()
        self._window.zero_()
        per_image = 1 / images if images else float("nan")
        return {"loss": loss * per_image, "top1": 100 * top1 * per_image,
                "top5": 100 * top5 * per_image}

    def _global_window(self) -> Tensor:
        window = self._window.double()
        return window if self._exact else all_sum(window, self.world)

    def finite(self) -> bool:
        """Whether window, weights and momentum are all numbers, on all ranks. Collective."""
        tensors = [self._window, *self._parameters]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        largest = torch.stack(torch._foreach_norm(tensors, ord=float("inf")))
        return not agree_max(int(not torch.isfinite(largest).all()), self.world)

    def gradient_vector(self) -> Tensor:
        """The last step's global mean gradient: float32 on the CPU, flat, in parameter order."""
        return torch.cat([p.grad.reshape(-1) for p in self._parameters if p.grad is not None]).cpu()

    @contextmanager
    def eval_model(self) -> Iterator[nn.Module]:
        """The module in eval mode with BatchNorm statistics averaged over ranks.

        Leaving restores every live buffer to the bit, so evaluating does not change the run.
        Collective: entering it.
        """
        live = norm.bn_running_vector(self.module)
        norm.set_bn_running_vector(self.module, self._mean_running())
        self.module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.module
        finally:
            norm.set_bn_running_vector(self.module, live)
            self.module.train()

    def _mean_running(self) -> Tensor:
        """Running statistics averaged over ranks: the global ones, as averaging is linear.

        In float64, so that equal rows (exact mode) average to themselves and the order of the ranks
        leaves no trace.
        """
        rows = gather_rows(norm.bn_running_vector(self.module).to(self.world.device), self.world)
        return rows.double().mean(0).float()

    # -- Saving and loading ------------------------------------------------------------------------

    def state(self) -> EngineState:
        """Everything a later step depends on, copied to the host. Collective.

        `model` and `optimizer` do not depend on the world size; `ranks` holds, stacked over ranks,
        what does.
        """
        live = norm.bn_running_vector(self.module)
        norm.set_bn_running_vector(self.module, self._mean_running())
        model = {name: value.detach() for name, value in self.module.state_dict().items()}
        state = EngineState(
            model=to_host(model),
            optimizer=to_host({**self._optimizer_tensors(), "window": self._global_window()}),
            ranks=to_host({"bn_running": gather_rows(live.to(self.world.device), self.world),
                           "window": gather_rows(self._window, self.world)}))
        norm.set_bn_running_vector(self.module, live)
        return state

    def load(self, state: EngineState) -> None:
        """Continue from `state`, to the bit where the world has the size that saved it.

        In exact mode every size continues to the bit. Collective.
        Raises: ValueError where the state belongs to another model or optimizer.
        """
        copy_into(dict(self.module.state_dict()), state.model, "model")
        rows = state.ranks["bn_running"].shape[0]
        window = state.optimizer["window"].float()
        if rows == self.world.size:
            norm.set_bn_running_vector(self.module, state.ranks["bn_running"][self.world.rank])
            window = state.ranks["window"][self.world.rank]
        elif not self._exact and self.world.rank > 0:
            window = torch.zeros_like(window)  # rank 0 holds what all ranks had seen
        self._window.copy_(window)
        self._load_optimizer_tensors(
            {name: value for name, value in state.optimizer.items() if name != "window"})

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """`momentum_buffer/layer1.0.conv1.weight` and so on; names, not positions."""
        tensors = {}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{key}/{name}"] = torch.as_tensor(value)
        return tensors

    def _load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.module.named_parameters())
        self.optimizer.state.clear()
        for path, value in tensors.items():
            key, _, name = path.partition("/")
            if name not in parameters or value.shape not in (parameters[name].shape, ()):
                raise ValueError(f"optimizer state {path} of shape {tuple(value.shape)}: this "
                                 "model has no such parameter; the checkpoint is another model's")
            parameter = parameters[name]
            like = torch.empty_like(parameter) if value.dim() else value.clone()
            self.optimizer.state[parameter][key] = like.copy_(value)

    # -- Layouts -----------------------------------------------------------------------------------

    def _flat_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """One flat float32 tensor and, per parameter, its view with the parameter's strides."""
        flat = torch.zeros(sum(p.numel() for p in self._parameters), device=self.world.device)
        views, start = [], 0
        for p in self._parameters:
            views.append(flat[start:start + p.numel()].as_strided(p.shape, p.stride(), start))
            start += p.numel()
        return flat, views

    def _wrap(self) -> DistributedDataParallel:
        """DistributedDataParallel with its final gradient buckets.

        DDP rebuilds its buckets after the first backward pass, in the order gradients arrived. A
        ring all-reduce sums in an order that depends on where a number lies in its bucket, so the
        first step after a resume would round differently from the same step of a run that went
        on. One throw-away backward pass here makes every real step use the rebuilt buckets. In eval
        mode, with one image, so that it costs little and no statistic moves.
        """
        device = self.world.device
        ddp = DistributedDataParallel(
            self.module, device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
        ddp.eval()
        size = self.config.augment.size
        blank = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=device)
        set_sample_keys(self.module, torch.zeros(1, dtype=torch.int64, device=device))
        with self.autocast():
            ddp(self.normalize(blank)).float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        ddp.train()
        return ddp


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous copies on the CPU; one wait for the device however many tensors."""
    on_device = any(value.is_cuda for value in tensors.values())
    copies = {}
    for name, value in tensors.items():
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies[name] = host.copy_(value, non_blocking=True)
    if on_device:
        torch.cuda.current_stream().synchronize()
    return copies


@torch.no_grad()
def copy_into(own: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy `saved` into `own` by name. Raises: ValueError naming what does not match."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [f"{name}: {tuple(saved[name].shape)} saved, {tuple(own[name].shape)} here"
              for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if missing or unknown or shapes:
        raise ValueError(f"{what} state does not fit: missing {missing[:3]} ({len(missing)}), "
                         f"unknown {unknown[:3]} ({len(unknown)}), shapes {shapes[:3]}")
    for name, value in own.items():
        value.copy_(saved[name])
