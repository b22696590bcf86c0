"""The DeepSpeed engine: ZeRO 0 (everything on every rank), 1 (optimizer state shared out) and 2
(gradients too).

Its verbs, samples and mathematics are those of `DDPEngine`, and its states are saved whole and by
parameter name: each engine resumes the other's checkpoints, at any world size.

Three things are set against DeepSpeed's defaults. Weights stay in contiguous memory, because its
broadcast reads them as bytes (channels_last ones crash it); inputs are channels_last, and so are
all activations. Mixed precision is `torch_autocast`, because its `bf16` section casts BatchNorm
too; and no module counts as "lower precision safe" there, as their gradients would travel in bf16
unasked.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.config.schema import Config
from resnet_dist.data.augmentation.mix import Targets
from resnet_dist.engine import optim
from resnet_dist.engine.core import Engine, euclidean, images_per_forward
from resnet_dist.engine.pixels import Normalization
from resnet_dist.engine.precision import autocast_dtype
from resnet_dist.ranks.distributed import World, gather_rows


class DeepSpeedEngine(Engine):
    """See `Engine`; `config.zero_stage` says what the ranks share out."""

    memory_format = torch.contiguous_format

    def __init__(self, model: nn.Module, config: Config, world: World,
                 normalization: Normalization) -> None:
        super().__init__(model, config, world, normalization)
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)
        # What it makes the current device: this rank's GPU, which may be the only one it sees.
        os.environ["LOCAL_RANK"] = str(world.device.index or 0)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed  # reads DS_ACCELERATOR when imported

        # On CPUs it would compile, at first use (a minute here), a shared-memory all-reduce that
        # only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # a world of one has no group, and DeepSpeed wants one
            dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo",
                                    store=dist.HashStore(),  # type: ignore[attr-defined]
                                    rank=0,
                                    world_size=1)
        deepspeed.init_distributed(dist.get_backend(), verbose=False)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optim.build_optimizer(self.module, config),
            config=deepspeed_config(config, world), dist_init_required=False)
        self._zero = config.zero_stage > 0
        self._norm: float | None = None  # of the last logging step's gradient

    def _gradients(self, x: Tensor, targets: Targets, keys: Tensor | None) -> None:
        # Ranks are averaged, so each loss is the sum over its images times ranks / global batch.
        scale = self.world.size / self.config.batch_size
        size = images_per_forward(self.config, self.world)
        for start in range(0, len(x), size):
            if start:
                self._engine.step()  # between micro-batches it only counts
            part = slice(start, start + size)
            loss, sums = self._forward(self._engine, x[part], targets[part],
                                       None if keys is None else keys[part])
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            self._window += sums

    def _update(self, lr: float) -> None:
        optim.set_lr(self.optimizer, lr)
        step = self.steps + 1
        if step % self.config.log.every_steps == 0 or step == self.config.steps:
            self._norm = self._norm_before_update()
        self._engine.step()
        scaler = self._scaler
        if self._zero and scaler is not None and self.optimizer.overflow:
            # ZeRO skips a step that overflows on any rank, and leaves the scale as it is: every
            # later step would overflow too.
            saved = scaler.state_dict()
            scaler.load_state_dict({**saved, "scale": saved["scale"] * saved["backoff_factor"],
                                    "_growth_tracker": 0})

    def _norm_before_update(self) -> float | None:
        """DeepSpeed drops the gradients in its step, and stage 0 takes no norm of them."""
        if self._zero:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        return euclidean(gradients).item() / scale

    def _gradient_norm(self) -> float | None:
        return self._engine.get_global_grad_norm() if self._zero else self._norm

    # -- State, whole and by parameter name --------------------------------------------------------

    def _state_tensors(self) -> list[Tensor]:
        return [value for state in self._inner.state.values() for value in state.values()
                if isinstance(value, Tensor)]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer, which under ZeRO holds this rank's flat partitions."""
        inner: torch.optim.Optimizer = self.optimizer.optimizer if self._zero else self.optimizer
        return inner

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return (self.optimizer.torch_autocast_gradscaler if self._zero
                else self._engine.torch_autocast_z0_gradscaler)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if self._zero:
            for group, partition in enumerate(self.optimizer.single_partition_of_fp32_groups):
                for key, value in self._inner.state.get(partition, {}).items():
                    if value is not None:
                        self._name_partition(tensors, group, key, torch.as_tensor(value))
        else:
            for name, parameter in self._parameters.items():
                for key, value in self._inner.state.get(parameter, {}).items():
                    if value is not None:
                        tensors[f"{key}/{name}"] = torch.as_tensor(value)
        if self._scaler is not None:
            saved = self._scaler.state_dict()
            tensors["scaler/scale"] = torch.tensor(saved["scale"], dtype=torch.float32)
            tensors["scaler/growth"] = torch.tensor(saved["_growth_tracker"], dtype=torch.int32)
        return tensors

    def _name_partition(self, tensors: dict[str, Tensor], group: int, key: str,
                        value: Tensor) -> None:
        """Gather one state of a group from all ranks and cut it into parameters. Collective."""
        whole = gather_rows(value, self.world).view(-1) if value.dim() else None
        for name, parameter, offset in self._members(group):
            tensors[f"{key}/{name}"] = value if whole is None else (
                whole[offset:offset + parameter.numel()].view(parameter.shape))

    def _members(self, group: int) -> list[tuple[str, nn.Parameter, int]]:
        """Name, parameter and place in the flat group, in the group's order."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [(names[id(parameter)], parameter, offset) for parameter, offset in
                zip(self.optimizer.round_robin_bit16_groups[group],
                    self.optimizer.round_robin_bit16_offsets[group], strict=True)]

    def _load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        scale, growth = tensors.pop("scaler/scale", None), tensors.pop("scaler/growth", None)
        if self._scaler is not None and scale is not None and growth is not None:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": float(scale),
                                          "_growth_tracker": int(growth)})
        states = self._by_parameter(tensors)
        self._inner.state.clear()
        if self._zero:
            for group, partition in enumerate(self.optimizer.single_partition_of_fp32_groups):
                self._load_partition(group, partition, states)
        else:
            for name, parameter in self._parameters.items():
                for key, value in states.get(name, {}).items():
                    self._inner.state[parameter][key] = value.clone().to(
                        parameter.device if value.dim() else
                        optim.scalar_device(self._inner, parameter))

    @torch.no_grad()
    def _load_partition(self, group: int, partition: Tensor,
                        states: dict[str, dict[str, Tensor]]) -> None:
        """Take this rank's part of the weights, which are loaded already, and of their states."""
        rank = self.world.rank
        partition.copy_(self.optimizer.parallel_partitioned_bit16_groups[group][rank])
        members = self._members(group)
        flat = self.optimizer.bit16_groups_flat[group]
        for key in states.get(members[0][0], {}):
            first = states[members[0][0]][key]
            if not first.dim():
                self._inner.state[partition][key] = first.clone().to(
                    optim.scalar_device(self._inner, partition))
                continue
            whole = torch.zeros_like(flat, dtype=torch.float32)
            for name, parameter, offset in members:
                whole[offset:offset + parameter.numel()] = (
                    states[name][key].reshape(-1).to(whole.device))
            self._inner.state[partition][key] = (
                whole[rank * partition.numel():(rank + 1) * partition.numel()].clone())


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """What DeepSpeed is told; everything else is this project's own."""
    share = config.batch_size // world.size
    micro = images_per_forward(config, world)
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "communication_data_type": config.gradient_dtype,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm":
                              world.device.type == "cuda"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    dtype = autocast_dtype(config, world.device)
    if dtype is not None:
        settings["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch."),
                                      "lower_precision_safe_modules": []}
    return settings
