"""Exponential moving averages of the weights, for evaluation.

In: a module after each step. Out: a second set of weights that changes places with the first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_dist.engine.transfer import copy_into
from resnet_dist.models import norm


class AveragedWeights:
    """Exponential averages of the weights and of this rank's BatchNorm running statistics."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = [p.detach().clone(memory_format=torch.preserve_format)
                         for p in module.parameters()]
        self.running = norm.bn_running_vector(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        torch._foreach_lerp_(self._weights, list(module.parameters()), 1 - self.decay)
        self.running.lerp_(norm.bn_running_vector(module), 1 - self.decay)

    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the averages; twice is nothing."""
        for index, parameter in enumerate(module.parameters()):
            parameter.data, self._weights[index] = self._weights[index], parameter.data

    def named(self, module: nn.Module, running: Tensor) -> dict[str, Tensor]:
        """A state dict of the averages, with `running` for the BatchNorm statistics."""
        live = norm.bn_running_vector(module)
        self.swap(module)
        norm.set_bn_running_vector(module, running)
        named = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.swap(module)
        norm.set_bn_running_vector(module, live)
        return named

    def load(self, module: nn.Module, saved: dict[str, Tensor], running: Tensor | None) -> None:
        """Take saved averages; `running` is this rank's row where the world has not changed."""
        live, tracked = norm.bn_running_vector(module), module.state_dict()
        tracked = {name: value.clone() for name, value in tracked.items()
                   if name.endswith("num_batches_tracked")}
        self.swap(module)
        try:
            copy_into(module.state_dict(), saved, "averaged model")
            self.running = norm.bn_running_vector(module) if running is None else running.to(live)
        finally:
            self.swap(module)
            norm.set_bn_running_vector(module, live)
            for name, value in tracked.items():
                module.state_dict()[name].copy_(value)
