"""One optimizer step, whoever computes it: images in, updated weights out.

In: a rank's uint8 images, labels and sample keys, and the learning rate. Out: weights that moved by
the gradient of the mean loss over the global batch, and sums of loss and hits in a window that
stays on the device until a logging step reads it.

`Engine` is what the engines share: the forward pass and its sums, evaluation, averaged weights, and
the state. How gradients are summed and applied is the engines' own: `engine.DDPEngine`
(DistributedDataParallel, and exact mode) and `engine_deepspeed.DeepSpeedEngine` (ZeRO 0, 1, 2).
Their states are interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resnet_dist.config.schema import Config
from resnet_dist.data.augmentation.mix import Targets
from resnet_dist.engine import losses
from resnet_dist.engine.averaging import AveragedWeights
from resnet_dist.engine.pixels import Normalization, Pixels
from resnet_dist.engine.precision import autocast_dtype
from resnet_dist.engine.transfer import Upload, copy_into, to_host
from resnet_dist.models import norm
from resnet_dist.models.keyed import set_sample_keys
from resnet_dist.ranks.distributed import (
    World,
    agree_max,
    all_sum,
    broadcast_from_zero,
    butterfly_all_reduce,
    gather_rows,
    tree_sum,
)
from resnet_dist.run.checkpoint import EngineState

# Normalised float32 images [n, 3, S, S] and labels [n] of a rank's share -> the same, mixed.
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Targets]]


def cpu_images_per_forward(size: int) -> int:
    """Of `size` pixels: ResNet-50 at 224 takes 0.1 GB each, and more are no faster; ResNet-20 on
    CIFAR needs 9% less CPU time a step with 128 than with 64 (2026-11-25, AVX2)."""
    return 64 if size > 64 else 128


def images_per_forward(config: Config, world: World) -> int:
    """How many images a rank runs at once: `micro_batch`, or all it has; on a CPU, few."""
    share = config.batch_size // world.size
    if config.micro_batch is not None:
        return config.micro_batch
    if world.device.type != "cpu" or config.bn_batch is None:
        return share
    limit = max(cpu_images_per_forward(config.augment.size), config.bn_batch)
    return max(size for size in range(config.bn_batch, share + 1, config.bn_batch)
               if share % size == 0 and size <= limit)


def euclidean(tensors: list[Tensor]) -> Tensor:
    """The norm of all `tensors` as one vector; a scalar on their device."""
    with torch.no_grad():
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class Engine:
    """Training of one model; a subclass adds `_gradients`, `_update` and the optimizer's state.

    Args:
        model: float32 on the CPU; the engine moves it. Ranks take rank 0's weights.
        normalization: float32 (mean, 1 / std), broadcastable to [n, 3, h, w], for x / 255.

    Collective: construction, and every method that says so.
    """

    memory_format = torch.channels_last  # of the weights; activations are channels_last anyway

    def __init__(self, model: nn.Module, config: Config, world: World,
                 normalization: Normalization) -> None:
        self.config, self.world = config, world
        self._upload = Upload(world.device)
        self.module: nn.Module = model.to(world.device)
        self.module.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        norm.flatten_bn_stats(self.module)
        broadcast_from_zero([*self.module.parameters(), *self.module.buffers()], world)
        pixels = Pixels(normalization, world.device)
        self.normalize, self.pixels = pixels.normalize, pixels.restore
        self.steps = 0  # completed by this engine and those whose state it loaded
        # loss sum, top-1 hits, top-5 hits, images: of this rank in fast mode, of all in exact mode
        self._window = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._exact = config.mode == "exact"
        decay = config.ema.decay
        self._ema = AveragedWeights(self.module, decay) if decay is not None else None

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    # -- The step ----------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor, sample_keys: Tensor | None, lr: float,
                   mix: Mix | None = None) -> None:
        """Take one optimizer step; never waits for the device.

        Args:
            images: uint8 [n, S, S, 3], this rank's share of the global batch, host or device.
            labels: int64 [n].
            sample_keys: int64 [n], what the model's random draws are keyed by.
            mix: mixes images and labels, each within its `bn_batch` group.

        Collective.
        """
        device = self.world.device
        # What is mixed is mixed in float32; what is not is rounded at once, not by autocast.
        dtype = None if mix is not None else autocast_dtype(self.config, device)
        x = self.normalize(self._upload(images), dtype or torch.float32)
        labels = self._upload(labels)
        keys = None if sample_keys is None else self._upload(sample_keys)
        x, targets = mix(x, labels) if mix is not None else (x, Targets(labels))
        self.module.train()
        self._gradients(x, targets, keys)
        self._update(lr)
        with torch.no_grad():
            norm.commit_running_stats(self.module)
        self.steps += 1
        if self._ema is not None and self.steps % self.config.ema.every_steps == 0:
            self._ema.update(self.module)

    def _gradients(self, x: Tensor, targets: Targets, keys: Tensor | None) -> None:
        """Compute the mean gradient of the global batch; add loss and hits to the window."""
        raise NotImplementedError

    def _update(self, lr: float) -> None:
        """Apply it."""
        raise NotImplementedError

    def _forward(self, model: nn.Module, x: Tensor, targets: Targets,
                 keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss summed over the images, and [loss sum, top-1, top-5, images]."""
        if keys is not None:
            set_sample_keys(self.module, keys)
        with self.autocast():
            logits = model(x)
        loss = losses.loss_sum(logits, targets, self.config.loss)
        with torch.no_grad():
            top1, top5 = losses.correct(logits, targets.labels)
            sums = torch.stack((loss.detach(), top1, top5, torch.full_like(top1, len(targets))))
        return loss, sums

    def autocast(self) -> torch.autocast:
        """Convolutions and matrix products in bf16 or fp16 where the precision says so."""
        dtype = autocast_dtype(self.config, self.world.device)
        return torch.autocast(self.world.device.type, dtype=dtype or torch.bfloat16,
                              enabled=dtype is not None)

    # -- What is read now and then -----------------------------------------------------------------

    def read_window(self) -> dict[str, float]:
        """Mean loss and hit rates in percent since the last call; resets. Collective."""
        loss, top1, top5, images = self._global_window().tolist()
        self._window.zero_()
        per_image = 1 / images if images else float("nan")
        return {"loss": loss * per_image, "top1": 100 * top1 * per_image,
                "top5": 100 * top5 * per_image}

    def _global_window(self) -> Tensor:
        return self._window.clone() if self._exact else all_sum(self._window.clone(), self.world)

    def norms(self) -> dict[str, float]:
        """gradient_norm of the last step, before it was clipped, and parameter_norm: Euclidean, of
        everything trained. Call on logging steps: it waits for the device. Collective.

        Without gradient_norm where the engine keeps no gradients and took no norm of them.
        """
        norms = {"parameter_norm": euclidean(list(self._parameters.values())).item()}
        gradient = self._gradient_norm()
        return norms if gradient is None else {"gradient_norm": float(gradient), **norms}

    def _gradient_norm(self) -> Tensor | float | None:
        raise NotImplementedError

    def communication(self) -> dict[str, float]:
        """comm_s and comm_exposed_s, as `clock.Clock.speed` takes them, of the steps since the last
        call or of one of them; {} where the engine does not know."""
        return {}

    def finite(self) -> bool:
        """Whether window, weights and momentum are all numbers, on all ranks. Collective."""
        tensors = [self._window.float(), *self._parameters.values(), *self._state_tensors()]
        largest = torch.stack([value.to(self.world.device) for value in
                               torch._foreach_norm(tensors, ord=float("inf"))])
        return not agree_max(int(not torch.isfinite(largest).all()), self.world)

    def _state_tensors(self) -> list[Tensor]:
        """The optimizer's tensors that live on this rank."""
        raise NotImplementedError

    @contextmanager
    def eval_model(self, *, ema: bool = False) -> Iterator[nn.Module]:
        """The module in eval mode with BatchNorm statistics averaged over ranks.

        ema: with the averaged weights. Leaving restores every live value to the bit, so evaluating
        does not change the run. Collective: entering it.
        Raises: ValueError where averaged weights are asked for and the run keeps none.
        """
        live = norm.bn_running_vector(self.module)
        running = self._mean_over_ranks(live)
        if ema:
            averages = self._averages()
            running = self._mean_over_ranks(averages.running)
            averages.swap(self.module)
        norm.set_bn_running_vector(self.module, running)
        self.module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.module
        finally:
            if ema:
                self._averages().swap(self.module)
            norm.set_bn_running_vector(self.module, live)
            self.module.train()

    def _averages(self) -> AveragedWeights:
        if self._ema is None:
            raise ValueError("ema.decay = null: this run keeps no averaged weights; set ema.decay, "
                             "e.g. 0.9999")
        return self._ema

    def _mean_over_ranks(self, running: Tensor) -> Tensor:
        """Running statistics averaged over ranks: the global ones, as averaging is linear.

        In float64, so that equal rows (exact mode) average to themselves and the order of the ranks
        leaves no trace.
        """
        rows = gather_rows(running, self.world)
        return rows.double().mean(0).float()

    def refresh_bn(self, batches: Iterable[Tensor]) -> None:
        """Replace the running statistics by the true average over the groups of `batches`.

        As the released models of He et al. 2015 were finished: after training, weights fixed.
        Each batch: uint8 [n, S, S, 3], this rank's share. In exact mode the bits do not depend on
        the world. Collective, with equally many batches on every rank.
        """
        size, share = self.config.bn_batch, images_per_forward(self.config, self.world)
        self.module.train()
        total: Tensor | None = None
        with torch.no_grad(), self.autocast():
            for images in batches:
                x = self.normalize(images.to(self.world.device))
                step = size if self._exact and size is not None else share

                def leaf(group: int, x: Tensor = x, step: int = step) -> Tensor:
                    n = len(x[group * step:(group + 1) * step])
                    set_sample_keys(self.module, torch.zeros(n, dtype=torch.int64, device=x.device))
                    self.module(x[group * step:(group + 1) * step])
                    return self._take_bn_sums()

                sums = tree_sum(leaf, 0, len(x) // step)
                sums = (butterfly_all_reduce(sums, self.world) if self._exact
                        else all_sum(sums, self.world))
                total = sums if total is None else total.add_(sums)
            if total is not None:
                norm.set_bn_stat_vector(self.module, total)
                norm.commit_running_stats(self.module, momentum=1.0)

    def _take_bn_sums(self) -> Tensor:
        """The BatchNorm accumulators, which are cleared."""
        sums = norm.bn_stat_vector(self.module)
        norm.set_bn_stat_vector(self.module, torch.zeros_like(sums))
        return sums

    # -- Saving and loading ------------------------------------------------------------------------

    def state(self) -> EngineState:
        """Everything a later step depends on, copied to the host. Collective.

        `model` and `optimizer` do not depend on world size or engine; `ranks` holds, stacked over
        ranks, what does.
        """
        live = norm.bn_running_vector(self.module)
        ranks = {"bn_running": gather_rows(live, self.world),
                 "window": gather_rows(self._window, self.world)}
        optimizer = {**self._optimizer_tensors(), "window": self._global_window(),
                     "steps": torch.tensor(self.steps)}
        if self._ema is not None:
            averages = self._ema.named(self.module, self._mean_over_ranks(self._ema.running))
            optimizer.update({f"ema/{name}": value for name, value in averages.items()})
            ranks["ema_bn_running"] = gather_rows(self._ema.running, self.world)
        norm.set_bn_running_vector(self.module, self._mean_over_ranks(live))
        model = {name: value.detach() for name, value in self.module.state_dict().items()}
        state = EngineState(to_host(model), to_host(optimizer), to_host(ranks))
        norm.set_bn_running_vector(self.module, live)
        return state

    def load(self, state: EngineState) -> None:
        """Continue from `state`, to the bit where the world has the size that saved it.

        In exact mode every size continues to the bit. Collective.
        Raises: ValueError where the state belongs to another model or optimizer.
        """
        optimizer, rank = dict(state.optimizer), self.world.rank
        same_world = state.ranks["bn_running"].shape[0] == self.world.size
        copy_into(self.module.state_dict(), state.model, "model")
        window = optimizer.pop("window")
        self.steps = int(optimizer.pop("steps"))
        averages = {name: optimizer.pop(name) for name in list(optimizer) if name[:4] == "ema/"}
        if same_world:
            norm.set_bn_running_vector(self.module, state.ranks["bn_running"][rank])
            window = state.ranks["window"][rank]
        elif not self._exact and rank > 0:
            window = torch.zeros_like(window)  # rank 0 holds what all ranks had seen
        self._window.copy_(window)
        if self._ema is not None:
            self._ema.load(self.module, {name[4:]: value for name, value in averages.items()},
                           state.ranks["ema_bn_running"][rank] if same_world else None)
        self._load_optimizer_tensors(optimizer)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Whole tensors by `KEY/PARAMETER`, e.g. `momentum_buffer/conv1.weight`. Collective."""
        raise NotImplementedError

    def _load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def _by_parameter(self, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """`KEY/PARAMETER` -> {PARAMETER: {KEY: value}}. Raises: ValueError on a stranger's."""
        parameters = self._parameters
        states: dict[str, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            key, _, name = path.partition("/")
            if name not in parameters or value.shape not in (parameters[name].shape, ()):
                raise ValueError(f"optimizer state {path} of shape {tuple(value.shape)}: this "
                                 "model has no such parameter; the checkpoint is another model's")
            states.setdefault(name, {})[key] = value
        return states
