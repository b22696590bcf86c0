"""Each network against functional code written from the papers' tables, and against the libraries.

The functions below read weights by name and know nothing of our modules. All comparisons are in
float64 in evaluation mode, with random weights and random running statistics.
"""

import pytest
import torch
import torch.nn.functional as F

from resnet_dist.models.build import build_model
from resnet_dist.models.keyed import set_sample_keys
from resnet_dist.models.norm import bn_running_vector, commit_running_stats, flatten_bn_stats

# Relative. 110 layers without identity amplify rounding of 1e-16 to 1e-8; a wrong layer gives 1e-1.
TOLERANCE = 1e-6
COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def random_model(name, num_classes=7, **options):
    """A float64 model whose logits depend on every tensor of its state dict, and on the images.

    Running statistics are those of a random batch, so that no depth loses the signal.
    """
    torch.manual_seed(0)
    model = build_model(name, num_classes=num_classes, **options).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    flatten_bn_stats(model)
    set_sample_keys(model, torch.arange(2))
    if bn_running_vector(model).numel():
        side = 107 if name.startswith("inception") else 64
        with torch.no_grad():
            model(torch.randn(2, 3, side, side, dtype=torch.float64))
        commit_running_stats(model, momentum=1.0)
    return model.eval()


def agree(model, images, want):
    with torch.no_grad():
        got = model(images)
    assert got.shape == want.shape
    assert want.std(0).max() > 1e-3 * want.abs().max(), "the logits must depend on the images"
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


class Weights:
    def __init__(self, model, eps=1e-5):
        self.p, self.eps = model.state_dict(), eps

    def conv(self, x, name, stride=1, padding=0, groups=1):
        return F.conv2d(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), stride, padding,
                        1, groups)

    def bn(self, x, name):
        mean, var, gamma, beta = (self.p[f"{name}.{k}"].view(-1, 1, 1) for k in
                                  ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + self.eps).sqrt() * gamma + beta

    def linear(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]


def blur(x):
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    channels = x.shape[1]
    down, across = (taps.view(1, 1, *s).repeat(channels, 1, 1, 1) for s in ((3, 1), (1, 3)))
    return F.conv2d(F.conv2d(x, down, padding=(1, 0), groups=channels), across, padding=(0, 1),
                    groups=channels)


def option_a(x, channels, stride):
    small = x[..., ::stride, ::stride]
    out = x.new_zeros(x.shape[0], channels, *small.shape[2:])
    out[:, : x.shape[1]] = small
    return out


def residual_network(w, x, counts, *, bottleneck, planes=(64, 128, 256, 512), imagenet=True,
                     shortcut="B", v1=False, groups=1, d=False, antialias=False, se=False):
    def strided(x, name, stride, padding, groups=1):
        return w.conv(blur(x) if antialias and stride == 2 else x, name, stride, padding, groups)

    if d:
        for conv, bn in (("0", "1"), ("3", "4")):
            x = w.bn(w.conv(x, f"conv1.{conv}", 2 if conv == "0" else 1, 1), f"conv1.{bn}").relu()
        x = w.conv(x, "conv1.6", 1, 1)
    else:
        x = w.conv(x, "conv1", 2, 3) if imagenet else w.conv(x, "conv1", 1, 1)
    x = w.bn(x, "bn1").relu()
    if imagenet:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, (count, width) in enumerate(zip(counts, planes, strict=True), 1):
        out_channels = width * (4 if bottleneck else 1)
        for k in range(count):
            at, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            if bottleneck:
                y = w.bn(strided(x, f"{at}.conv1", stride if v1 else 1, 0), f"{at}.bn1").relu()
                y = strided(y, f"{at}.conv2", 1 if v1 else stride, 1, groups)
                y = w.bn(y, f"{at}.bn2").relu()
                y = w.bn(w.conv(y, f"{at}.conv3"), f"{at}.bn3")
            else:
                y = w.bn(strided(x, f"{at}.conv1", stride, 1), f"{at}.bn1").relu()
                y = w.bn(w.conv(y, f"{at}.conv2", 1, 1), f"{at}.bn2")
            if se:
                gate = w.conv(y.mean((2, 3), keepdim=True), f"{at}.se.fc1").relu()
                y = y * w.conv(gate, f"{at}.se.fc2").sigmoid()
            if shortcut is not None:
                changes = stride == 2 or x.shape[1] != out_channels
                if shortcut == "A":
                    x = option_a(x, out_channels, stride)
                elif changes or shortcut == "C":
                    if d:
                        x = F.avg_pool2d(x, 2, 2) if stride == 2 else x
                        x = w.bn(w.conv(x, f"{at}.downsample.1"), f"{at}.downsample.2")
                    else:
                        x = w.bn(strided(x, f"{at}.downsample.0", stride, 0), f"{at}.downsample.1")
                y = y + x
            x = y.relu()
    return w.linear(x.mean((2, 3)), "fc")


IMAGENET = {
    "resnet18": {}, "resnet34": {}, "plain18": {"shortcut": None}, "plain34": {"shortcut": None},
    "resnet50": {}, "resnet101": {}, "resnet152": {}, "resnet200": {},
    "resnet50_v1": {"v1": True}, "resnet101_v1": {"v1": True}, "resnet152_v1": {"v1": True},
    "resnet50d": {"d": True}, "resnet101d": {"d": True},
    "resnet50_blur": {"antialias": True}, "seresnet50": {"se": True}, "seresnet101": {"se": True},
    "resnext50_32x4d": {"groups": 32}, "resnext101_32x4d": {"groups": 32},
    "resnext101_32x8d": {"groups": 32}, "resnext101_64x4d": {"groups": 64},
    "wide_resnet50_2": {}, "wide_resnet101_2": {},
}
BIG = {"resnet152", "resnet200", "resnet152_v1", "resnext101_32x8d", "resnext101_64x4d",
       "wide_resnet50_2", "wide_resnet101_2", "seresnet101", "resnet101d", "resnet101_v1",
       "resnext101_32x4d", "vgg16", "vgg19", "vgg19_bn"}


def slow_if_big(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in BIG else []) for n in names]


@pytest.mark.parametrize("name", slow_if_big(IMAGENET))
def test_imagenet_network_equals_the_paper(name):
    depth = next(d for d in sorted(COUNTS, reverse=True) if str(d) in name)
    model = random_model(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    agree(model, x, residual_network(Weights(model), x, COUNTS[depth], bottleneck=depth >= 50,
                                     **IMAGENET[name]))


@pytest.mark.parametrize("option", ["A", "B", "C"])
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet164"])
def test_shortcut_options_equal_the_paper(name, option):
    model = random_model(name, shortcut=option)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    cifar = {"planes": (16, 32, 64), "imagenet": False}
    counts, extra = {"resnet18": ((2,) * 4, {}), "resnet20": ((3,) * 3, cifar),
                     "resnet164": ((18,) * 3, cifar | {"v1": True})}[name]
    agree(model, x, residual_network(Weights(model), x, counts, bottleneck=name == "resnet164",
                                     shortcut=option, **extra))


@pytest.mark.parametrize("depth", [20, 56, 110])
@pytest.mark.parametrize("kind", ["plain", "resnet"])
def test_cifar_network_equals_the_paper(kind, depth):
    model = random_model(f"{kind}{depth}")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    agree(model, x, residual_network(
        Weights(model), x, ((depth - 2) // 6,) * 3, bottleneck=False, planes=(16, 32, 64),
        imagenet=False, shortcut=None if kind == "plain" else "A"))


def preactivation_network(w, x, counts, planes, *, bottleneck, imagenet):
    x = w.conv(x, "conv1", 2, 3) if imagenet else w.conv(x, "conv1", 1, 1)
    x = w.bn(x, "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    for stage, (count, width) in enumerate(zip(counts, planes, strict=True)):
        for k in range(count):
            at, stride = f"layers.{stage}.{k}", 2 if stage > 0 and k == 0 else 1
            first = stage == 0 and k == 0
            y = a = x if first else w.bn(x, f"{at}.bn1").relu()
            if bottleneck:
                y = w.bn(w.conv(y, f"{at}.conv1", stride), f"{at}.bn2").relu()
                y = w.bn(w.conv(y, f"{at}.conv2", 1, 1), f"{at}.bn3").relu()
                y = w.conv(y, f"{at}.conv3")
            else:
                y = w.bn(w.conv(y, f"{at}.conv1", stride, 1), f"{at}.bn2").relu()
                y = w.conv(y, f"{at}.conv2", 1, 1)
            if y.shape != x.shape:
                x = w.conv(a, f"{at}.downsample", stride) if bottleneck else option_a(
                    a, width, stride)
            x = x + y
    return w.linear(w.bn(x, "bn_last").relu().mean((2, 3)), "fc")


@pytest.mark.parametrize("name", [
    "preresnet110", "preresnet164", "preresnet152",
    pytest.param("preresnet1001", marks=pytest.mark.slow),
    pytest.param("preresnet200", marks=pytest.mark.slow)])
def test_preactivation_network_equals_the_paper(name):
    model, depth = random_model(name), int(name[9:])
    imagenet = depth in (152, 200)
    x = torch.randn(2, 3, 64 if imagenet else 32, 64 if imagenet else 32, dtype=torch.float64)
    counts = COUNTS[depth] if imagenet else ((depth - 2) // (6 if depth == 110 else 9),) * 3
    agree(model, x, preactivation_network(
        Weights(model), x, counts, (64, 128, 256, 512) if imagenet else (16, 32, 64),
        bottleneck=depth != 110, imagenet=imagenet))


def experiment_network(w, x, count, *, shortcut="A", activation="original"):
    """Basic blocks of He et al. 2016, figures 2 and 4, as ablations of the 2015 CIFAR network."""
    x = w.bn(w.conv(x, "conv1", 1, 1), "bn1").relu()
    for stage, width in enumerate((16, 32, 64), 1):
        for k in range(count):
            at, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            conv = [lambda t, s=stride, a=at: w.conv(t, f"{a}.convs.0", s, 1),
                    lambda t, a=at: w.conv(t, f"{a}.convs.1", 1, 1)]
            bn = [lambda t, a=at: w.bn(t, f"{a}.bns.0"), lambda t, a=at: w.bn(t, f"{a}.bns.1")]
            skip = option_a(x, width, stride)
            if activation == "bn_after_add":
                x = bn[1](conv[1](bn[0](conv[0](x)).relu()) + skip).relu()
            elif activation == "relu_before_add":
                x = bn[1](conv[1](bn[0](conv[0](x)).relu())).relu() + skip
            elif activation == "relu_only_preact":
                x = bn[1](conv[1](bn[0](conv[0](x.relu())).relu())) + skip
            else:
                y = bn[1](conv[1](bn[0](conv[0](x)).relu()))
                g = w.conv(x, f"{at}.gate", stride).sigmoid() if "gating" in shortcut else 0
                a, b = {"constant_scaling": (0.5, 0.5), "exclusive_gating": (1 - g, g),
                        "shortcut_only_gating": (1 - g, 1), "dropout": (1, 1)}[shortcut]
                x = (a * skip + b * y).relu()
    return w.linear(x.relu().mean((2, 3)), "fc")


@pytest.mark.parametrize("option", [
    {"shortcut": "constant_scaling"}, {"shortcut": "exclusive_gating", "gate_bias": 0.5},
    {"shortcut": "shortcut_only_gating", "gate_bias": 0.5}, {"shortcut": "dropout"},
    {"activation": "bn_after_add"}, {"activation": "relu_before_add"},
    {"activation": "relu_only_preact"}], ids=lambda o: "-".join(map(str, o.values())))
def test_ablations_of_2016_equal_the_paper(option):
    model = random_model("resnet20", **option)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    agree(model, x, experiment_network(Weights(model), x, 3, **{
        k: v for k, v in option.items() if k != "gate_bias"}))


def test_1x1_shortcuts_are_option_c():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(random_model("resnet20", shortcut="conv1x1")(x),
                           random_model("resnet20", shortcut="C")(x))


@pytest.mark.parametrize("name", slow_if_big(["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]))
def test_vgg_equals_the_paper(name):
    model = random_model(name)
    w, batch_norm = Weights(model), name.endswith("_bn")
    images = x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    index = 0
    for count in {"16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}[name[3:5]]:
        for _ in range(count):
            x = w.conv(x, f"features.{index}", 1, 1)
            x = w.bn(x, f"features.{index + 1}").relu() if batch_norm else x.relu()
            index += 3 if batch_norm else 2
        x = F.max_pool2d(x, 2)
        index += 1
    x = F.adaptive_avg_pool2d(x, 7).reshape(2, -1)
    x = w.linear(w.linear(x, "classifier.0").relu(), "classifier.3").relu()
    agree(model, images, w.linear(x, "classifier.6"))


class Inception(Weights):
    """Convolution-norm-ReLU, one layer in the Inception papers; those marked V do not pad."""

    def layer(self, x, name, stride=1, valid=False):
        rows, columns = self.p[f"{name}.conv.weight"].shape[2:]
        padding = (0, 0) if valid or stride == 2 else (rows // 2, columns // 2)
        return self.bn(self.conv(x, f"{name}.conv", stride, padding), f"{name}.bn").relu()

    def chain(self, x, name, length, last_stride=1, last_valid=False):
        for k in range(length):
            last = k == length - 1
            x = self.layer(x, f"{name}.{k}", last_stride if last else 1, last_valid and last)
        return x

    def pooled(self, x, name):
        ones = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)  # padding does not count
        return self.layer(F.avg_pool2d(x, 3, 1, 1) / ones, f"{name}.1")


def inception_v4(w, x):
    def pool(t):
        return F.max_pool2d(t, 3, 2)

    x = w.layer(w.layer(w.layer(x, "features.0", 2), "features.1", valid=True), "features.2")
    x = torch.cat([pool(x), w.layer(x, "features.3.conv", 2)], 1)
    x = torch.cat([w.chain(x, "features.4.branch0", 2, last_valid=True),
                   w.chain(x, "features.4.branch1", 4, last_valid=True)], 1)
    x = torch.cat([w.layer(x, "features.5.conv", 2), pool(x)], 1)
    for k in range(6, 10):
        at = f"features.{k}.branch"
        x = torch.cat([w.layer(x, f"{at}0"), w.chain(x, f"{at}1", 2), w.chain(x, f"{at}2", 3),
                       w.pooled(x, f"{at}3")], 1)
    at = "features.10.branch"
    x = torch.cat([w.layer(x, f"{at}0", 2), w.chain(x, f"{at}1", 3, 2), pool(x)], 1)
    for k in range(11, 18):
        at = f"features.{k}.branch"
        x = torch.cat([w.layer(x, f"{at}0"), w.chain(x, f"{at}1", 3), w.chain(x, f"{at}2", 5),
                       w.pooled(x, f"{at}3")], 1)
    at = "features.18.branch"
    x = torch.cat([w.chain(x, f"{at}0", 2, 2), w.chain(x, f"{at}1", 4, 2), pool(x)], 1)
    for k in range(19, 22):
        at = f"features.{k}.branch"
        one = w.layer(x, f"{at}1_0")
        two = w.layer(w.layer(w.layer(x, f"{at}2_0"), f"{at}2_1"), f"{at}2_2")
        x = torch.cat([w.layer(x, f"{at}0"), w.layer(one, f"{at}1_1a"), w.layer(one, f"{at}1_1b"),
                       w.layer(two, f"{at}2_3a"), w.layer(two, f"{at}2_3b"),
                       w.pooled(x, f"{at}3")], 1)
    return w.linear(x.mean((2, 3)), "last_linear")


def inception_resnet_v2(w, x):
    def pool(t):
        return F.max_pool2d(t, 3, 2)

    def residual(x, at, lengths, scale, relu=True):
        parts = [w.layer(x, f"{at}.branch0")]
        parts += [w.chain(x, f"{at}.branch{b}", n) for b, n in enumerate(lengths, 1)]
        x = x + scale * w.conv(torch.cat(parts, 1), f"{at}.conv2d")
        return x.relu() if relu else x

    x = w.layer(w.layer(x, "conv2d_1a", 2), "conv2d_2a", valid=True)
    x = pool(w.layer(x, "conv2d_2b"))
    x = pool(w.layer(w.layer(x, "conv2d_3b"), "conv2d_4a", valid=True))
    x = torch.cat([w.layer(x, "mixed_5b.branch0"), w.chain(x, "mixed_5b.branch1", 2),
                   w.chain(x, "mixed_5b.branch2", 3), w.pooled(x, "mixed_5b.branch3")], 1)
    for k in range(10):
        x = residual(x, f"repeat.{k}", (2, 3), 0.17)
    x = torch.cat([w.layer(x, "mixed_6a.branch0", 2), w.chain(x, "mixed_6a.branch1", 3, 2),
                   pool(x)], 1)
    for k in range(20):
        x = residual(x, f"repeat_1.{k}", (3,), 0.10)
    x = torch.cat([w.chain(x, "mixed_7a.branch0", 2, 2), w.chain(x, "mixed_7a.branch1", 2, 2),
                   w.chain(x, "mixed_7a.branch2", 3, 2), pool(x)], 1)
    for k in range(9):
        x = residual(x, f"repeat_2.{k}", (3,), 0.20)
    x = residual(x, "block8", (3,), 1.0, relu=False)
    return w.linear(w.layer(x, "conv2d_7b").mean((2, 3)), "classif")


@pytest.mark.parametrize("network", [inception_v4, inception_resnet_v2])
def test_inception_equals_the_paper(network):
    model = random_model(network.__name__)
    x = torch.randn(2, 3, 107, 107, dtype=torch.float64)
    agree(model, x, network(Inception(model, eps=1e-3), x))


def library(name):
    """The module, or a skip with the reason why it does not import."""
    try:
        return __import__(f"{name}.models", fromlist=["models"])
    except Exception as error:  # a build for another torch fails with RuntimeError
        pytest.skip(f"{name} does not import here: {error}")


@pytest.mark.parametrize("name", sorted(
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
     "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "vgg16",
     "vgg16_bn", "vgg19", "vgg19_bn"]))
def test_logits_equal_torchvision(name):
    peer = getattr(library("torchvision"), name)(num_classes=7).double().eval()
    model = random_model(name)
    peer.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        agree(model, x, peer(x))


@pytest.mark.parametrize("name", sorted(
    ["resnet50", "resnet50d", "resnet101d", "resnet200", "seresnet50", "resnext101_32x4d",
     "vgg16_bn", "inception_v4", "inception_resnet_v2"]))
def test_logits_equal_timm(name):
    from resnet_dist.models.weights import to_timm_names

    peer = library("timm").create_model(name, num_classes=7).double().eval()
    model = random_model(name)
    peer.load_state_dict(to_timm_names(model.state_dict()))
    size = 107 if "inception" in name else 224 if "vgg" in name else 64
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        agree(model, x, peer(x))
