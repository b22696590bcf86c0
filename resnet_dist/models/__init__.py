"""Architectures by name. In: a name and options. Out: an `nn.Module` from images to logits.

Importing this package does not import torch; building a model does.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from resnet_dist.models.catalog.names import MODELS, model_names
from resnet_dist.models.catalog.options import ModelOptions, check_options

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model", "model_names"]


def build_model(
    name: str,
    *,
    num_classes: int,
    shortcut: str | None = None,
    activation: str | None = None,
    gate_bias: float | None = None,
    stem: str | None = None,
    avg_down: bool | None = None,
    antialias: bool | None = None,
    se_reduction: int | None = None,
    stochastic_depth: float | None = None,
    dropout: float | None = None,
    init: str = "he_fan_out",
    classifier_std: float | None = None,
    zero_init_last_bn: bool = False,
    bn_batch: int | None = None,
    bn_momentum: float = 0.1,
    bn_eps: float | None = None,
    checkpointing: bool = False,
) -> nn.Module:
    """The network `name`, initialised from torch's global generator, on the CPU, in float32.

    None leaves an option as the architecture was published; `options.ModelOptions` says what each
    means. The module maps images [n, 3, h, w] (any memory format) to logits [n, num_classes].

    Raises:
        ValueError: an unknown name, or an option this architecture does not have.
    """
    if name not in MODELS:
        near = get_close_matches(name, model_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model.name = {name!r}: no such model{hint}")
    family = MODELS[name].family
    options = ModelOptions(
        num_classes=num_classes, shortcut=shortcut, activation=activation, gate_bias=gate_bias,
        stem=stem, avg_down=avg_down, antialias=antialias, se_reduction=se_reduction,
        stochastic_depth=stochastic_depth, dropout=dropout, init=init,
        classifier_std=classifier_std, zero_init_last_bn=zero_init_last_bn, bn_batch=bn_batch,
        bn_momentum=bn_momentum, bn_eps=bn_eps, checkpointing=checkpointing,
    )
    check_options(name, family, options)

    from resnet_dist.models.build import build  # torch is imported only when a model is built

    return build(name, family, options)
