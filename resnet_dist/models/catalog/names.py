"""The table of architectures: name -> input size and description. Imports no torch.

Configuration and command line read it to refuse a wrong name at once; `build_model` in this
package turns a name into a network.
"""

from typing import NamedTuple


class ModelEntry(NamedTuple):
    """What is known about an architecture before it is built."""

    family: str  # the file of this package that builds it
    input_size: int  # side of the square training input, in pixels
    description: str


_IMAGENET_DEPTHS = (18, 34, 50, 101, 152, 200)
_CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
_CIFAR_BOTTLENECK_DEPTHS = (164, 1001)


def _table() -> dict[str, ModelEntry]:
    table: dict[str, ModelEntry] = {}

    def add(name: str, family: str, input_size: int, description: str) -> None:
        table[name] = ModelEntry(family, input_size, description)

    for depth in _IMAGENET_DEPTHS:
        if depth < 50:
            add(f"plain{depth}", "resnet", 224, f"He 2015, {depth} layers without shortcuts")
            add(f"resnet{depth}", "resnet", 224, f"He 2015, {depth} layers, basic blocks")
        else:
            add(f"resnet{depth}", "resnet", 224, f"v1.5 (stride in the 3x3), {depth} layers")
            add(f"resnet{depth}_v1", "resnet", 224,
                f"He 2015 as published (stride in the first 1x1), {depth} layers")
            add(f"resnet{depth}d", "resnet", 224,
                f"ResNet-D stem and average-pool shortcuts, {depth} layers")
    for depth in (50, 101):
        add(f"seresnet{depth}", "resnet", 224, f"squeeze-and-excitation, {depth} layers")
        add(f"resnet{depth}_blur", "resnet", 224, f"anti-aliased (BlurPool), {depth} layers")
    for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 32, 8), (101, 64, 4)):
        add(f"resnext{depth}_{groups}x{width}d", "resnet", 224,
            f"Xie 2017, {depth} layers, {groups} groups of {width}")
    for depth in (50, 101):
        add(f"wide_resnet{depth}_2", "resnet", 224, f"bottlenecks twice as wide, {depth} layers")
    for depth in _CIFAR_DEPTHS:
        add(f"plain{depth}", "cifar", 32, f"He 2015 CIFAR, {depth} layers without shortcuts")
        add(f"resnet{depth}", "cifar", 32, f"He 2015 CIFAR, {depth} layers, option A")
    for depth in _CIFAR_BOTTLENECK_DEPTHS:
        add(f"resnet{depth}", "cifar", 32, f"He 2016 CIFAR, {depth} layers, original bottlenecks")
    for depth in (110, *_CIFAR_BOTTLENECK_DEPTHS):
        add(f"preresnet{depth}", "cifar", 32, f"He 2016 CIFAR, {depth} layers, full pre-activation")
    for depth in (152, 200):
        add(f"preresnet{depth}", "preact", 224,
            f"He 2016 ImageNet, {depth} layers, full pre-activation")
    for depth in (16, 19):
        add(f"vgg{depth}", "vgg", 224, f"Simonyan 2015, {depth} layers")
        add(f"vgg{depth}_bn", "vgg", 224, f"Simonyan 2015, {depth} layers, with BatchNorm")
    add("inception_v4", "inception", 299, "Szegedy 2016")
    add("inception_resnet_v2", "inception", 299, "Szegedy 2016")
    return table


MODELS: dict[str, ModelEntry] = _table()


def model_names() -> tuple[str, ...]:
    """Every name `build_model` takes, ImageNet ResNets first."""
    return tuple(MODELS)


def input_size(name: str) -> int:
    """Side in pixels of the square input `name` was published with."""
    return MODELS[name].input_size
