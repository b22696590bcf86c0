"""From a checked name and options to an initialised network."""

from typing import Any

from torch import nn

from resnet_dist.models.cifar import build_cifar
from resnet_dist.models.keyed import number_keyed_layers
from resnet_dist.models.layers import initialise
from resnet_dist.models.options import ModelOptions
from resnet_dist.models.resnet import build_resnet

_BUILDERS = {"resnet": build_resnet, "cifar": build_cifar}


def build(name: str, family: str, options: ModelOptions) -> nn.Module:
    """See `resnet_dist.models.build_model`."""
    model: nn.Module = _BUILDERS[family](name, options)
    initialise(model, options.init)
    if options.zero_init_last_bn:
        _zero_last_bns(name, model)
    number_keyed_layers(model)
    return model


def _zero_last_bns(name: str, model: nn.Module) -> None:
    """Every residual branch starts as zero. Source: Goyal et al. 2017, section 5.1."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "last_bn")]
    if not blocks or name.startswith("plain"):
        raise ValueError(
            f"zero_init_last_bn = True with model {name!r}: it has no residual branch that ends in "
            "BatchNorm; leave it false"
        )
    for block in blocks:
        nn.init.zeros_(block.last_bn().weight)
