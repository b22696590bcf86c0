"""Parameter groups, optimizers and the learning rate as a pure function of the step.

In: a model and its configuration. Out: a torch optimizer whose update depends on nothing but
gradients and its own state, so that ranks that hold equal gradients stay equal without talking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from resnet_dist.config.schema import Config, ScheduleConfig
from resnet_dist.engine.optimizers import LAMB, LARS, CaffeSGD


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, each in the model's order.

    `decay: all` is the paper's and Torch7's: every parameter. `weights` spares what has one
    dimension: biases and BatchNorm's scale and shift (Jia et al. 2018, sec. 3.2; timm). `but_norm`
    spares BatchNorm's alone (Goyal et al. 2017, sec. 5.1; torchvision's norm_weight_decay=0).
    """
    norms = {id(parameter) for module in model.modules() if isinstance(module, nn.BatchNorm2d)
             for parameter in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = {"all": False, "weights": parameter.dim() <= 1,
                      "but_norm": id(parameter) in norms}[config.optimizer.decay]
            (plain if spared else decayed).append(parameter)
    groups = ((decayed, config.optimizer.weight_decay), (plain, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`; its rate is set before every step."""
    groups, options = parameter_groups(model, config), config.optimizer
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum,
                               nesterov=options.nesterov, fused=True)
    if options.name == "sgd_caffe":
        return CaffeSGD(groups, lr=options.lr, momentum=options.momentum)
    if options.name == "lars":
        return LARS(groups, lr=options.lr, momentum=options.momentum, trust=options.trust)
    if options.name == "lamb":
        return LAMB(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps,
                             fused=True)


def scalar_device(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    """Where `optimizer` keeps its scalars of `parameter`, e.g. the steps it has taken.

    torch's fused optimizers read them on the device and refuse others; the rest read them on the
    host, so that they need not wait for the device.
    """
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# -- The learning rate -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Observed:
    """What a schedule that watches the error has seen; plain data, saved with every checkpoint.

    errors: (step, validation error in percent) of every evaluation so far.
    warm_step: the step at which the training error first fell below `warmup_until_error`.
    """

    errors: tuple[tuple[int, float], ...] = ()
    warm_step: int | None = None

    def validated(self, step: int, error: float) -> Observed:
        """After an evaluation at `step` found `error` percent."""
        return replace(self, errors=(*self.errors, (step, error)))

    def trained(self, step: int, error: float, schedule: ScheduleConfig) -> Observed:
        """After the steps up to `step` had a mean training error of `error` percent."""
        limit = schedule.warmup_until_error
        if self.warm_step is None and limit is not None and error < limit:
            return replace(self, warm_step=step)
        return self

    def to_meta(self) -> dict[str, Any]:
        return {"errors": [list(pair) for pair in self.errors], "warm_step": self.warm_step}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Observed:
        return cls(tuple((int(step), float(error)) for step, error in meta["errors"]),
                   meta["warm_step"])


def lr_at(schedule: ScheduleConfig, base_lr: float, step: int, steps: int,
          observed: Observed = Observed()) -> float:
    """Learning rate of the update that takes the run from `step` to `step + 1` of `steps`.

    Pure: the same step and observations give the same rate, whoever resumed in between.
    """
    start, warmup = schedule.warmup_start, schedule.warmup_steps
    if schedule.warmup_until_error is not None and (
            observed.warm_step is None or step < observed.warm_step):
        return base_lr * start
    if schedule.name == "one_cycle":
        return base_lr * _one_cycle(schedule, step, steps)
    if step < warmup and schedule.warmup == "constant":
        return base_lr * start
    if step < warmup:
        return base_lr * (start + (1 - start) * step / warmup)
    if schedule.name == "constant":
        return base_lr
    if schedule.name == "milestones":
        passed = sum(step >= milestone for milestone in schedule.milestones)
        return base_lr * schedule.factor ** passed
    if schedule.name == "plateau":
        drops = plateau_steps(observed.errors, schedule.patience, schedule.gain)
        return base_lr * schedule.factor ** sum(step >= drop for drop in drops)
    done = min((step - warmup) / (steps - warmup), 1.0)
    if schedule.name == "linear":
        return base_lr * (1 + (schedule.final - 1) * done)
    assert schedule.name == "cosine"
    return base_lr * _cosine(1.0, schedule.final, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Up to the peak and down again, both along a cosine; reaches `final` at the last step.

    Source: Smith and Topin 2017; the cosine legs are fast.ai's, as in torch's OneCycleLR.
    """
    peak = schedule.peak * steps - 1
    if step <= peak:
        return _cosine(schedule.warmup_start, 1.0, step / peak)
    return _cosine(1.0, schedule.final, min((step - peak) / (steps - 1 - peak), 1.0))


def plateau_steps(errors: Sequence[tuple[int, float]], patience: int,
                  gain: float) -> tuple[int, ...]:
    """Steps from which the rate drops: `patience` evaluations in a row gained no more than
    `gain` percent points on the best error before them. Counting starts anew after a drop."""
    drops, best, waited = [], math.inf, 0
    for step, error in errors:
        if error < best - gain:
            best, waited = error, 0
            continue
        waited += 1
        if waited == patience:
            drops.append(step)
            waited = 0
    return tuple(drops)
