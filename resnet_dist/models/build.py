"""From a checked name and options to an initialised network."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from resnet_dist.models.catalog.names import MODELS, model_names
from resnet_dist.models.catalog.options import ModelOptions, check_options
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


def build_model(name: str, **options: Any) -> nn.Module:
    """The network `name`, initialised from torch's global generator, on the CPU, in float32.

    The module maps images [n, 3, h, w] (any memory format) to logits [n, num_classes], and
    remembers `arch_name` and `arch_options`.

    Args:
        options: fields of `ModelOptions`; `num_classes` must be given, None leaves an option as the
            architecture was published.

    Raises:
        ValueError: an unknown name, or an option this architecture does not have.
        TypeError: an option that none has.
    """
    if name not in MODELS:
        near = get_close_matches(name, model_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model.name = {name!r}: no such model{hint}")
    chosen = ModelOptions(**options)
    family = MODELS[name].family
    check_options(name, family, chosen)
    model = _BUILDERS[family](name, chosen)
    initialise(model, chosen.init)
    if chosen.classifier_std is not None:
        classifier = model.get_submodule(classifier_name(model))
        assert isinstance(classifier, nn.Linear)
        nn.init.normal_(classifier.weight, std=chosen.classifier_std)
        nn.init.zeros_(classifier.bias)
    for module in model.modules():
        if isinstance(module, ShortcutExperiment):
            module.initialise_gate()
    if chosen.zero_init_last_bn:
        _zero_last_bns(model)
    number_keyed_layers(model)
    model.__dict__.update(arch_name=name, arch_options=chosen)
    return model


def _zero_last_bns(model: nn.Module) -> None:
    """Every residual branch starts as zero. Source: Goyal et al. 2017, section 5.1."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "last_bn")]
    for block in blocks:
        nn.init.zeros_(block.last_bn().weight)
