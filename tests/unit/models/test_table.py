"""Every architecture against the published figures: parameters, multiply-adds, depth."""

import functools
import math
import re

import pytest

from resnet_dist.models.analysis.summary import format_summary, summarize_name
from resnet_dist.models.catalog.names import MODELS, input_size, model_names

DEEPEST = ("plain1202", "resnet1202", "resnet1001", "preresnet1001")  # seconds each


@functools.cache
def summary_of(name):
    """At the classes the name was published with: 10 on CIFAR, 1,000 on ImageNet."""
    return summarize_name(name, num_classes=10 if input_size(name) == 32 else 1000)


# Exact counts at 1,000 classes, as torchvision (weights' metadata) and timm (result tables) state
# them; timm's are rounded to 10,000 and given so.
PARAMETERS = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032,
    "resnet101": 44_549_160, "resnet152": 60_192_808, "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336, "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240, "wide_resnet101_2": 126_886_696,
    "vgg16": 138_357_544, "vgg16_bn": 138_365_992, "vgg19": 143_667_240, "vgg19_bn": 143_678_248,
}
PARAMETERS_TIMM = {
    "resnet50d": 25.58e6, "resnet101d": 44.57e6, "resnet152d": 60.21e6, "resnet200": 64.67e6,
    "resnet200d": 64.69e6, "resnext101_32x4d": 44.18e6, "seresnet50": 28.09e6,
    "seresnet101": 49.33e6, "inception_v4": 42.68e6, "inception_resnet_v2": 55.84e6,
}
# Millions, to the digits printed. Source: He et al. 2015, table 6; He et al. 2016, tables 4 and 5
# and the text of section 5 (1001 layers: 10.2 M in the paper's reference implementation).
PARAMETERS_CIFAR = {
    "resnet20": "0.27", "resnet32": "0.46", "resnet44": "0.66", "resnet56": "0.85",
    "resnet110": "1.7", "resnet1202": "19.4", "resnet164": "1.7", "preresnet164": "1.7",
    "preresnet110": "1.7",
}
# 1e9 multiply-adds as the papers print them, digits cut off. Source: He et al. 2015, table 1 and
# section 3.3 (VGG-19: 19.6).
FLOPS_PAPER = {
    "plain18": 1.8, "resnet18": 1.8, "plain34": 3.6, "resnet34": 3.6, "resnet50_v1": 3.8,
    "resnet101_v1": 7.6, "resnet152_v1": 11.3, "vgg19": 19.6,
}
# Source: torchvision's weights' metadata ("_ops"); the Inceptions: timm's benchmark table.
FLOPS_LIBRARIES = {
    "resnet18": 1.814, "resnet34": 3.664, "resnet50": 4.089, "resnet101": 7.801,
    "resnet152": 11.514, "resnext50_32x4d": 4.23, "resnext101_32x8d": 16.414,
    "resnext101_64x4d": 15.46, "wide_resnet50_2": 11.398, "wide_resnet101_2": 22.753,
    "vgg16": 15.47, "vgg19": 19.632, "inception_v4": 12.28, "inception_resnet_v2": 13.18,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_torchvision(name):
    assert summary_of(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_TIMM)
def test_parameters_equal_timm_to_its_digits(name):
    assert abs(summary_of(name).parameters - PARAMETERS_TIMM[name]) <= 0.005e6


@pytest.mark.parametrize("name", PARAMETERS_CIFAR)
def test_parameters_equal_the_papers_to_their_digits(name):
    digits = PARAMETERS_CIFAR[name]
    unit = 10 ** -len(digits.split(".")[1])
    assert abs(summary_of(name).parameters / 1e6 - float(digits)) < unit


@pytest.mark.slow
def test_1001_layers_have_the_published_10_million_parameters():
    for name in ("resnet1001", "preresnet1001"):
        assert abs(summary_of(name).parameters / 1e6 - 10.2) < 0.02 * 10.2


@pytest.mark.parametrize("name", FLOPS_PAPER)
def test_multiply_adds_equal_the_paper(name):
    flops, published = summary_of(name).flops / 1e9, FLOPS_PAPER[name]
    assert abs(flops - published) <= 0.01 * published or math.floor(flops * 10) / 10 == published


@pytest.mark.parametrize("name", FLOPS_LIBRARIES)
def test_multiply_adds_equal_the_libraries_within_one_percent(name):
    flops = summary_of(name).flops / 1e9
    assert abs(flops - FLOPS_LIBRARIES[name]) <= 0.01 * FLOPS_LIBRARIES[name]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in DEEPEST else [])
    for name in model_names() if not name.startswith("inception")
])
def test_the_number_in_the_name_is_the_number_of_weighted_layers(name):
    depth = int(re.search(r"\d+", name)[0])
    # ResNet-D's stem has two layers more than its name counts.
    assert summary_of(name).depth == depth + (2 if MODELS[name].family == "resnet"
                                                  and name.endswith("d") and "x" not in name
                                                  else 0)


@pytest.mark.parametrize(("option", "parameters"), [
    ("A", 21_623_848), ("B", 21_797_672), ("C", 22_716_840)])
def test_shortcut_options_of_resnet34_differ_by_their_projections(option, parameters):
    # B adds three projections to A, C thirteen more: sum of in * out weights and two BN vectors.
    assert summarize_name("resnet34", shortcut=option).parameters == parameters
    if option == "B":
        projections = sum(c * 2 * c + 4 * c for c in (64, 128, 256))
        assert parameters - 21_623_848 == projections


def test_stages_of_resnet50_have_the_sizes_of_the_table():
    summary = summary_of("resnet50")
    sizes = {layer.name: layer.output for layer in summary.layers}
    assert sizes["conv1"] == (64, 112, 112)
    assert sizes["maxpool"] == (64, 56, 56)
    assert [sizes[f"layer{k}.0.conv3"] for k in (1, 2, 3, 4)] == [
        (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def test_v1_and_v15_differ_in_the_place_of_the_stride_only():
    v1, v15 = summary_of("resnet50_v1"), summary_of("resnet50")
    assert [(a.name, a.parameters) for a in v1.layers] == [(a.name, a.parameters)
                                                           for a in v15.layers]
    where = "layer2.0.conv1"
    assert {s.name: next(a.output for a in s.layers if a.name == where) for s in (v1, v15)} == {
        "resnet50_v1": (128, 28, 28), "resnet50": (128, 56, 56)}


def test_summary_as_text_names_every_layer_and_the_totals():
    summary = summary_of("resnet20")
    text = format_summary(summary)
    assert all(layer.name in text for layer in summary.layers)
    assert "20 weighted layers, 269,722 parameters, 0.041e9 multiply-adds" in text
    assert summary.to_json()["layers"][0]["output"] == (16, 32, 32)


def test_every_name_says_its_input_size():
    assert {input_size(name) for name in model_names()} == {32, 224, 299}
