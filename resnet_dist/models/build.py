"""From a checked name and options to an initialised network."""

from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.cifar import build_cifar
from resnet_dist.models.experiments import ShortcutExperiment
from resnet_dist.models.inception import build_inception
from resnet_dist.models.keyed import number_keyed_layers
from resnet_dist.models.layers import initialise
from resnet_dist.models.preact import build_preact
from resnet_dist.models.resnet import build_resnet
from resnet_dist.models.vgg import build_vgg
from resnet_dist.models.weights import classifier_name

_BUILDERS: dict[str, Callable[[str, ModelOptions], nn.Module]] = {
    "resnet": build_resnet,
    "cifar": build_cifar,
    "preact": build_preact,
    "vgg": build_vgg,
    "inception": build_inception,
}


def build(name: str, family: str, options: ModelOptions) -> nn.Module:
    """See `resnet_dist.models.build_model`. The module remembers `arch_name` and `arch_options`."""
    model = _BUILDERS[family](name, options)
    initialise(model, options.init)
    if options.classifier_std is not None:
        classifier = model.get_submodule(classifier_name(model))
        assert isinstance(classifier, nn.Linear)
        nn.init.normal_(classifier.weight, std=options.classifier_std)
        nn.init.zeros_(classifier.bias)
    for module in model.modules():
        if isinstance(module, ShortcutExperiment):
            module.initialise_gate()
    if options.zero_init_last_bn:
        _zero_last_bns(model)
    number_keyed_layers(model)
    model.__dict__.update(arch_name=name, arch_options=options)
    return model


def _zero_last_bns(model: nn.Module) -> None:
    """Every residual branch starts as zero. Source: Goyal et al. 2017, section 5.1."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "last_bn")]
    for block in blocks:
        nn.init.zeros_(block.last_bn().weight)
