"""Parameter groups, optimizers and the learning rate as a pure function of the step.

In: a model and its configuration. Out: a torch optimizer whose every update is elementwise, so that
ranks that hold equal gradients stay equal without talking.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from resnet_dist.config import Config, ScheduleConfig


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, each in the model's order.

    `decay: all` is the paper's and Torch7's: every parameter. `decay: weights` leaves out what has
    one dimension: biases and BatchNorm's scale and shift (Goyal et al. 2017, sec. 5.1, leaves out
    BatchNorm's; Jia et al. 2018, sec. 3.2, biases too).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = config.optimizer.decay == "weights" and parameter.dim() <= 1
            (plain if spared else decayed).append(parameter)
    groups = ((decayed, config.optimizer.weight_decay), (plain, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`; its rate is set before every step."""
    optimizer = config.optimizer
    return torch.optim.SGD(parameter_groups(model, config), lr=optimizer.lr,
                           momentum=optimizer.momentum, nesterov=optimizer.nesterov, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(schedule: ScheduleConfig, base_lr: float, step: int, steps: int) -> float:
    """Learning rate of the update that takes the run from `step` to `step + 1` of `steps`."""
    if step < schedule.warmup_steps:
        start = schedule.warmup_start
        return base_lr * (start + (1 - start) * step / schedule.warmup_steps)
    if schedule.name == "constant":
        return base_lr
    if schedule.name == "milestones":
        passed = sum(step >= milestone for milestone in schedule.milestones)
        return base_lr * schedule.factor ** passed
    assert schedule.name == "cosine"
    done = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
