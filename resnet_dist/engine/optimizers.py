"""Optimizers that torch does not have. One step never waits for the device.

All state is float32 and per parameter (`momentum_buffer`, `exp_avg`, ...), so checkpoints name it
by parameter. "Layer" in the papers is a parameter tensor here. Parameters in a group without weight
decay take the plain rate in LARS and LAMB, as is usual for biases and BatchNorm, whose norms say
little about a good step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _PerParameter(torch.optim.Optimizer):
    """Walks the groups; a subclass says what happens to the parameters of one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters, [p.grad for p in parameters])

    def _update(self, group: dict[str, Any], parameters: list[Tensor],
                gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _buffers(self, key: str, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if key not in self.state[parameter]:
                self.state[parameter][key] = torch.zeros_like(parameter)
        return [self.state[parameter][key] for parameter in parameters]


def _decayed(gradients: list[Tensor], parameters: list[Tensor], decay: float) -> list[Tensor]:
    """g + decay * w, as new tensors: gradients stay readable after the step."""
    return list(torch._foreach_add(gradients, parameters, alpha=decay))


class CaffeSGD(_PerParameter):
    """v = m v + lr (g + decay w), w -= v: the rate is part of the momentum.

    Source: Goyal et al. 2017, sec. 3, equation (10), without their correction of the momentum.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameters: list[Tensor],
                gradients: list[Tensor]) -> None:
        momenta = self._buffers("momentum_buffer", parameters)
        directions = _decayed(gradients, parameters, group["weight_decay"])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, directions, alpha=group["lr"])
        torch._foreach_sub_(parameters, momenta)


class LARS(_PerParameter):
    """Rate of a layer in proportion to the norm of its weights over that of its gradient.

    Source: You, Gitman, Ginsburg 2017, algorithm 1.
    """

    def __init__(self, params: Any, lr: float, momentum: float, trust: float,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust,
                                  "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameters: list[Tensor],
                gradients: list[Tensor]) -> None:
        momenta = self._buffers("momentum_buffer", parameters)
        decay = group["weight_decay"]
        directions = _decayed(gradients, parameters, decay)
        if decay:
            weights, slopes = (torch._foreach_norm(tensors) for tensors in (parameters, gradients))
            rates = [group["trust"] * w / (g + decay * w) for w, g in zip(weights, slopes,
                                                                          strict=True)]
            torch._foreach_mul_(directions, _ones_where_undefined(rates))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, directions, alpha=group["lr"])
        torch._foreach_sub_(parameters, momenta)


class LAMB(_PerParameter):
    """Adam's direction, its length set by the norm of the layer's weights.

    Source: You et al. 2019, algorithm 2, with bias correction and the identity as phi.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameters: list[Tensor],
                gradients: list[Tensor]) -> None:
        first, second = (self._buffers(key, parameters) for key in ("exp_avg", "exp_avg_sq"))
        # The count lives on the host: it is the same for all, and no device need be asked for it.
        for parameter in parameters:
            count = self.state[parameter].setdefault("step", torch.zeros((), device="cpu"))
            count += 1
        taken = float(self.state[parameters[0]]["step"])
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(second, 1 - beta2 ** taken)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        directions = torch._foreach_div(first, 1 - beta1 ** taken)
        torch._foreach_div_(directions, roots)
        decay = group["weight_decay"]
        if decay:
            torch._foreach_add_(directions, parameters, alpha=decay)
            weights, lengths = (torch._foreach_norm(t) for t in (parameters, directions))
            rates = [w / length for w, length in zip(weights, lengths, strict=True)]
            torch._foreach_mul_(directions, _ones_where_undefined(rates))
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])


def _ones_where_undefined(rates: list[Tensor]) -> list[Tensor]:
    """1 where a norm was zero (fresh zero-initialised layers): the plain rate."""
    return [torch.where(torch.isfinite(rate) & (rate > 0), rate, torch.ones_like(rate))
            for rate in rates]
