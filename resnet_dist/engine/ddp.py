"""The engines, and the data-parallel one: fast and exact.

fast: a rank runs its whole share at once (or in micro-batches) and DistributedDataParallel sums
gradients while the backward pass still runs.
exact: every `bn_batch` group runs alone on the bare module, and gradients, BatchNorm statistics and
counts are summed along one binary tree over all groups, first inside the rank, then across ranks.
Any power-of-two world computes the same bits.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.augmentation.mix import Targets
from resnet_dist.engine import optim
from resnet_dist.engine.clock import Exchange
from resnet_dist.engine.core import Engine, euclidean, images_per_forward
from resnet_dist.engine.graph import CudaRecorder, RecordedStep
from resnet_dist.engine.pixels import Normalization
from resnet_dist.engine.precision import precision_of
from resnet_dist.models import norm
from resnet_dist.models.keyed import set_sample_keys
from resnet_dist.ranks.distributed import World, all_sum, butterfly_all_reduce, tree_sum


def make_engine(model: nn.Module, config: Config, world: World,
                normalization: Normalization) -> Engine:
    """The configured engine. Collective. Raises: ConfigError where the device cannot do it."""
    if config.cuda_graphs and world.device.type != "cuda":
        raise ConfigError(f"cuda_graphs = true: this rank computes on {world.device.type}; use "
                          "cuda_graphs=false, or device=cuda where there is a GPU")
    if config.engine == "deepspeed":
        from resnet_dist.engine.deepspeed import DeepSpeedEngine  # costs seconds; only when asked

        return DeepSpeedEngine(model, config, world, normalization)
    return DDPEngine(model, config, world, normalization)


class DDPEngine(Engine):
    """Weights whole on every rank, in channels_last memory; see `Engine`."""

    def __init__(self, model: nn.Module, config: Config, world: World,
                 normalization: Normalization) -> None:
        super().__init__(model, config, world, normalization)
        self.optimizer = optim.build_optimizer(self.module, config)
        self._trained = list(self._parameters.values())
        # Off unless fp16. torch's fused optimizers take the overflow flag on the device, so sgd and
        # adamw do not wait for it; the others read it once a step.
        scaled = precision_of(config, world.device) == "fp16"
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self._recorded: RecordedStep | None = None
        if config.cuda_graphs:
            self._recorded = RecordedStep(self._share_gradients, CudaRecorder())
        if self._exact or self._recorded:
            self._leaf, self._leaf_gradients = self._flat_gradients()
        flat = self._exact or self._recorded is not None
        self._ddp = self._wrap() if world.size > 1 and not flat else None
        self._clipped: Tensor | None = None  # norm of the last gradient before it was clipped
        self._exchange = Exchange(world.device)

    # -- The step ----------------------------------------------------------------------------------

    def _gradients(self, x: Tensor, targets: Targets, keys: Tensor | None) -> None:
        if self._exact:
            return self._exact_gradients(x, targets, keys)
        if self._recorded is not None:
            self._recorded(x, keys, targets.labels, targets.partners, targets.weights)
            return self._sum_leaf_over_ranks()
        self.optimizer.zero_grad(set_to_none=True)
        model = self._ddp or self.module
        # Ranks are averaged, so each loss is the sum over its images times ranks / global batch.
        scale = self.world.size / self.config.batch_size
        size = images_per_forward(self.config, self.world)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            last = start + size >= len(x)
            with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                loss, sums = self._forward(model, x[part], targets[part],
                                           None if keys is None else keys[part])
                self._scaler.scale(loss * scale).backward()
            self._window += sums

    def _share_gradients(self, x: Tensor, keys: Tensor | None, *targets: Tensor | None) -> None:
        """This rank's part of the sum, into the flat gradient: what a CUDA graph records."""
        labels, *mixed = targets
        assert labels is not None
        whole, size = Targets(labels, *mixed), images_per_forward(self.config, self.world)
        self._clear_leaf()
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            loss, sums = self._forward(self.module, x[part], whole[part],
                                       None if keys is None else keys[part])
            self._scaler.scale(loss / self.config.batch_size).backward()
            self._window += sums

    def _sum_leaf_over_ranks(self) -> None:
        if self.world.size == 1:
            return
        with self._exchange:
            if self.config.gradient_dtype == "bf16":
                self._leaf.copy_(all_sum(self._leaf.to(torch.bfloat16), self.world))
            else:
                all_sum(self._leaf, self.world)

    def _clear_leaf(self) -> None:
        """Zero the flat gradient and let every parameter's be its view."""
        self._leaf.zero_()
        for parameter, gradient in zip(self._trained, self._leaf_gradients, strict=True):
            parameter.grad = gradient

    def _exact_gradients(self, x: Tensor, targets: Targets, keys: Tensor | None) -> None:
        """The same for exact mode; the window gets the global sums on every rank."""
        size = self.config.bn_batch
        assert size is not None
        gradients = self._leaf.numel()

        def leaf(group: int) -> Tensor:
            part = slice(group * size, (group + 1) * size)
            self._clear_leaf()
            loss, sums = self._forward(self.module, x[part], targets[part],
                                       None if keys is None else keys[part])
            self._scaler.scale(loss / self.config.batch_size).backward()
            return torch.cat((self._leaf, self._take_bn_sums(), sums))

        mine = tree_sum(leaf, 0, len(x) // size)
        with self._exchange if self.world.size > 1 else nullcontext():
            total = butterfly_all_reduce(mine, self.world)
        self._leaf.copy_(total[:gradients])
        norm.set_bn_stat_vector(self.module, total[gradients:-4])
        self._window += total[-4:]

    def _update(self, lr: float) -> None:
        optim.set_lr(self.optimizer, lr)
        if self.config.optimizer.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            self._clipped = nn.utils.clip_grad_norm_(
                self._trained, self.config.optimizer.clip_norm, foreach=True)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def gradient_vector(self) -> Tensor:
        """The last step's global mean gradient: float32 on the CPU, flat, in parameter order."""
        return torch.cat([p.grad.reshape(-1) for p in self._trained if p.grad is not None]).cpu()

    def _gradient_norm(self) -> Tensor:
        # torch's optimizers leave unscaled gradients behind, the fused ones too.
        return euclidean([p.grad for p in self._trained if p.grad is not None]
                         ) if self._clipped is None else self._clipped

    def communication(self) -> dict[str, float]:
        if self.world.size == 1:
            return {}
        if self._ddp is None:
            return self._exchange.read()
        # DDP times one step in every `log.every_steps`; nanoseconds. Its times are those of the
        # last micro-batch, the one that exchanges gradients.
        times = self._ddp._get_ddp_logging_data()
        if "backward_comm_time" not in times:
            return {}
        comm, overlap = (times[key] / 1e9 for key in
                         ("backward_comm_time", "backward_compute_comm_overlap_time"))
        return {"comm_s": comm, "comm_exposed_s": max(0.0, comm - overlap)}

    # -- The optimizer's state ---------------------------------------------------------------------

    def _state_tensors(self) -> list[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values()
                if isinstance(value, Tensor)]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{key}/{name}"] = torch.as_tensor(value)
        if self._scaler.is_enabled():
            saved = self._scaler.state_dict()
            tensors["scaler/scale"] = torch.tensor(saved["scale"], dtype=torch.float32)
            tensors["scaler/growth"] = torch.tensor(saved["_growth_tracker"], dtype=torch.int32)
        return tensors

    def _load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        scale, growth = tensors.pop("scaler/scale", None), tensors.pop("scaler/growth", None)
        if self._scaler.is_enabled() and scale is not None and growth is not None:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": float(scale),
                                          "_growth_tracker": int(growth)})
        parameters = self._parameters
        self.optimizer.state.clear()
        for name, state in self._by_parameter(tensors).items():
            for key, value in state.items():
                own = parameters[name]
                place = (torch.empty_like(own) if value.dim() else torch.empty(
                    (), dtype=value.dtype, device=optim.scalar_device(self.optimizer, own)))
                self.optimizer.state[own][key] = place.detach().copy_(value)

    # -- Layouts -----------------------------------------------------------------------------------

    def _flat_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """One flat float32 tensor and, per parameter, its view with the parameter's strides."""
        flat = torch.zeros(sum(p.numel() for p in self._trained), device=self.world.device)
        views, start = [], 0
        for p in self._trained:
            views.append(flat.as_strided(p.shape, p.stride(), start))
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
        world, device = self.world, self.world.device
        with warnings.catch_warnings():
            # The new name came after the oldest torch this project runs on.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            ddp = DistributedDataParallel(
                self.module, device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.gradient_dtype == "bf16":
            # A lambda: torch compares annotations, which are strings here, with its own types.
            ddp.register_comm_hook(world.size, lambda ranks, bucket: _sum_in_bf16(ranks, bucket))
        ddp._set_ddp_runtime_logging_sample_rate(self.config.log.every_steps)
        ddp.eval()
        size = self.config.augment.size
        blank = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=device)
        set_sample_keys(self.module, torch.zeros(1, dtype=torch.int64, device=device))
        with self.autocast():
            ddp(self.normalize(blank)).float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        ddp.train()
        return ddp


def _sum_in_bf16(ranks: int, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average one `GradBucket` over ranks; half the bytes travel.

    torch's own hook does the same and insists on NCCL.
    """
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.to(torch.bfloat16), async_op=True)
    assert work is not None

    def average(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(future.value()[0]).div_(ranks)

    return work.get_future().then(average)
