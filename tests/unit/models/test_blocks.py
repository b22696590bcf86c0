"""Blocks and whole networks in training: gradients, checkpointing, options, wrappers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.config.schema import ModelConfig
from resnet_dist.models.build import build_model
from resnet_dist.models.catalog.names import MODELS, input_size, model_names
from resnet_dist.models.catalog.options import ACTIVATIONS, SHORTCUT_EXPERIMENTS, ModelOptions
from resnet_dist.models.experiments import ActivationExperiment, ShortcutExperiment
from resnet_dist.models.inception import (
    Branches,
    Builder,
    ConvNorm,
    InceptionC,
    ResidualInception,
)
from resnet_dist.models.keyed import KeyedDropout, number_keyed_layers, set_sample_keys
from resnet_dist.models.layers import BlurConv2d, ReluLinear, SqueezeExcitation, norm_of
from resnet_dist.models.norm import (
    GhostBatchNorm2d,
    bn_running_vector,
    bn_stat_vector,
    commit_running_stats,
    flatten_bn_stats,
)
from resnet_dist.models.preact import BASIC, BOTTLENECK, PreActBlock
from resnet_dist.models.resnet import BasicBlock, BlockConfig, Bottleneck

NORM = norm_of(ModelOptions(num_classes=2, bn_batch=2))
B = Builder(NORM)


def config(**changes):
    return BlockConfig(norm=NORM, **changes)


def preact(kernels, stride=2, shortcut="B", activate=True, drop_rate=0.0):
    block = PreActBlock(4, 3, stride, drop_rate, kernels=kernels, norm=NORM, shortcut=shortcut)
    if not activate:
        block.bn1 = None
    return block


BLOCKS = {
    "plain": lambda: BasicBlock(4, 6, 2, config(residual=False)),
    "basic identity": lambda: BasicBlock(4, 4, 1, config()),
    "basic A": lambda: BasicBlock(4, 6, 2, config(shortcut="A")),
    "basic B": lambda: BasicBlock(4, 6, 2, config()),
    "basic C": lambda: BasicBlock(4, 4, 1, config(shortcut="C")),
    "basic se": lambda: BasicBlock(4, 6, 2, config(se_reduction=2)),
    "basic stochastic depth": lambda: BasicBlock(4, 6, 2, config(), 0.5),
    "bottleneck v1": lambda: Bottleneck(4, 3, 2, config(stride_in_1x1=True)),
    "bottleneck v1.5": lambda: Bottleneck(4, 3, 2, config()),
    "bottleneck d": lambda: Bottleneck(4, 3, 2, config(avg_down=True)),
    "bottleneck blur": lambda: Bottleneck(4, 3, 2, config(antialias=True)),
    "bottleneck se": lambda: Bottleneck(4, 3, 1, config(se_reduction=2)),
    "resnext": lambda: Bottleneck(4, 8, 2, config(groups=4, base_width=8)),
    "wide": lambda: Bottleneck(4, 3, 2, config(base_width=128)),
    "preact basic": lambda: preact(BASIC),
    "preact basic A": lambda: preact(BASIC, shortcut="A"),
    "preact basic stochastic depth": lambda: preact(BASIC, drop_rate=0.5),
    "preact bottleneck": lambda: preact(BOTTLENECK),
    "preact bottleneck first": lambda: preact(BOTTLENECK, stride=1, activate=False),
    **{f"shortcut {e}": lambda e=e: ShortcutExperiment(4, 6, 2, NORM, False, e, -0.5)
       for e in SHORTCUT_EXPERIMENTS if e != "conv1x1"},
    **{f"activation {a} {'bottleneck' if b else 'basic'}":
           lambda a=a, b=b: ActivationExperiment(4, 3, 2, NORM, b, a, "B")
       for a in ACTIVATIONS[1:4] for b in (False, True)},
    "squeeze-excitation": lambda: SqueezeExcitation(4, 2),
    "blur convolution": lambda: BlurConv2d(4, 3, 3, stride=2, padding=1, bias=False),
    "dropout": lambda: KeyedDropout(0.5),
    "inception convolution": lambda: ConvNorm(NORM, 4, 3, (1, 7)),
    "inception branches": lambda: Branches(branch0=B.chain(4, (3, 1), (2, 3, 2)),
                                           branch1=nn.MaxPool2d(3, 2)),
    "inception pooled branch": lambda: B.pooled(4, 3),
    "residual inception": lambda: ResidualInception(
        4, 0.2, True, branch0=B.one(4, (2, 1)), branch1=B.chain(4, (2, 1), (3, (1, 7)))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_every_block_are_numerically_right(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double().train()
    number_keyed_layers(block)
    set_sample_keys(block, torch.arange(4))
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in block.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in block.parameters()]

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    # fast_mode compares the derivative along random directions, of all inputs and weights
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, atol=1e-6)


def test_gradients_of_the_forked_inception_module_are_numerically_right():
    torch.manual_seed(0)
    block = InceptionC(B).double().train()
    x = torch.randn(4, 1536, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True, atol=1e-6)


def step(model, name, batch=2, compare=False):
    """One SGD step on random images at the network's own input size; returns the loss."""
    torch.manual_seed(1)
    side = input_size(name)
    images = torch.randn(batch, 3, side, side, dtype=next(model.parameters()).dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    flatten_bn_stats(model)
    set_sample_keys(model, torch.arange(batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()] if compare else []
    loss = F.cross_entropy(model(images), torch.arange(batch) % 2)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    commit_running_stats(model)
    assert bn_running_vector(model).isfinite().all()
    for parameter, old in zip(model.parameters(), before, strict=False):
        assert not torch.equal(parameter, old), "a weight the step does not reach"
    return loss


QUICK = {"resnet18", "plain18", "resnet20", "plain20", "resnet56", "preresnet110", "resnet50",
         "resnet50d"}


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in model_names()])
def test_one_training_step_reaches_every_weight(name):
    deep = any(str(depth) in name for depth in (1001, 1202, 200, 152))
    model = build_model(name, num_classes=10, checkpointing=deep)
    # Without shortcuts the gradient doubles from block to block: 600 of them overflow float32.
    step(model.double() if name == "plain1202" else model, name, compare=True)


@pytest.mark.slow
def test_plain_1202_layers_cannot_be_trained_in_float32():
    model = build_model("plain1202", num_classes=10, checkpointing=True)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
    assert not model.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("option", [
    *({"shortcut": s} for s in ("B", "C", *SHORTCUT_EXPERIMENTS)),
    *({"activation": a} for a in ACTIVATIONS),
    {"stochastic_depth": 0.5, "dropout": 0.1, "zero_init_last_bn": True}],
    ids=lambda o: "-".join(map(str, o.values())))
def test_one_training_step_of_every_cifar_option(option):
    step(build_model("resnet20", num_classes=10, **option), "resnet20", batch=4)


@pytest.mark.parametrize("name", ["resnet110", "preresnet110"])
def test_checkpointing_changes_nothing_but_memory(name):
    torch.manual_seed(0)
    options = {"num_classes": 10, "stochastic_depth": 0.3, "dropout": 0.1, "bn_batch": 2}
    kept, redone = (build_model(name, checkpointing=c, **options) for c in (False, True))
    redone.load_state_dict(kept.state_dict())
    images, bytes_kept = torch.randn(4, 3, 32, 32), []
    for model in (kept, redone):
        flatten_bn_stats(model)
        set_sample_keys(model, torch.arange(4))
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(images)
        bytes_kept.append(sum(sizes.values()))
        logits.square().sum().backward()
    assert torch.equal(bn_stat_vector(kept), bn_stat_vector(redone))
    assert bn_stat_vector(kept)[-1] == 2
    for a, b in zip(kept.parameters(), redone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert bytes_kept[1] < bytes_kept[0] / 5


@pytest.mark.parametrize("name", ["vgg16_bn", "inception_v4", "inception_resnet_v2",
                                  "preresnet164", "resnet18"])
def test_every_family_understands_checkpointing(name):
    from resnet_dist.models.layers import Stage

    with torch.device("meta"):
        model = build_model(name, num_classes=3, checkpointing=True)
    stages = [m for m in model.modules() if isinstance(m, Stage)]
    assert stages
    assert all(stage.checkpointing for stage in stages)


@pytest.mark.parametrize("name", [n for n in model_names() if "1202" not in n and "1001" not in n])
def test_ghost_batch_norm_everywhere(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=3, bn_batch=16, bn_momentum=0.2, bn_eps=2e-5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert norms or name in ("vgg16", "vgg19")
    for norm in norms:
        assert isinstance(norm, GhostBatchNorm2d)
        assert (norm.bn_batch, norm.momentum, norm.eps) == (16, 0.2, 2e-5)


def test_channels_last_stays_channels_last():
    model = build_model("resnet20", num_classes=10, bn_batch=2)
    formats = []
    for module in model.modules():
        if isinstance(module, BasicBlock):
            module.register_forward_hook(lambda _m, _i, y: formats.append(
                y.is_contiguous(memory_format=torch.channels_last)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert len(formats) == 9
    assert all(formats)


def test_he_initialisation_has_the_published_variance():
    torch.manual_seed(0)
    for init, fan in (("he_fan_out", 0), ("he_fan_in", 1)):
        model = build_model("resnet34", num_classes=10, init=init)
        for name in ("layer2.0.conv1", "layer4.1.conv2"):
            weight = model.get_parameter(f"{name}.weight")
            expected = 2.0 / (9 * weight.shape[fan])
            assert weight.var().item() == pytest.approx(expected, rel=0.03)
    with torch.device("meta"):
        hidden = [m for m in build_model("vgg16", num_classes=2).modules()
                  if isinstance(m, ReluLinear)]
    assert len(hidden) == 2


def test_classifier_std_draws_the_classifier_alone():
    torch.manual_seed(0)
    as_usual = build_model("resnet50", num_classes=1000)
    torch.manual_seed(0)
    model = build_model("resnet50", num_classes=1000, classifier_std=0.01)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(model.fc.weight.mean().item()) < 1e-4
    assert not model.fc.bias.any()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, as_usual.get_parameter(name)) == (not name.startswith("fc."))


def test_zero_init_makes_every_block_its_shortcut():
    model = build_model("resnet20", num_classes=10, zero_init_last_bn=True)
    block = model.layer1[1]
    x = torch.randn(2, 16, 8, 8).relu()
    assert torch.equal(block(x), x)
    assert not torch.equal(build_model("resnet20", num_classes=10).layer1[1](x), x)


def test_stochastic_depth_grows_linearly_to_the_given_rate():
    model = build_model("resnet18", num_classes=10, stochastic_depth=0.8)
    rates = [m.rate for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.1 * k for k in range(1, 9)])


REFUSED = [
    ("resnet5", {}, "did you mean"),
    ("vgg16", {"shortcut": "A"}, "vgg16.*only the options dropout"),
    ("resnet18", {"shortcut": "dropout"}, "choose one of A, B, C"),
    ("plain20", {"shortcut": "A"}, "use resnet20"),
    ("plain20", {"stochastic_depth": 0.1}, "use resnet20"),
    ("plain20", {"zero_init_last_bn": True}, "leave it false"),
    ("preresnet164", {"zero_init_last_bn": True}, "leave it false"),
    ("resnet110", {"activation": "bn_after_add", "zero_init_last_bn": True}, "leave it false"),
    ("resnet110", {"activation": "bn_after_add", "stochastic_depth": 0.1}, "ablations"),
    ("resnet110", {"activation": "nowhere"}, "choose one of original"),
    ("resnet110", {"gate_bias": 1.0}, "have gates"),
    ("preresnet110", {"activation": "bn_after_add"}, "variants of resnet110"),
    ("preresnet110", {"shortcut": "dropout"}, "variants of resnet110"),
    ("resnet50", {"activation": "full_preact"}, "only the options"),
    ("resnet50", {"stochastic_depth": 1.0}, r"\[0, 1\)"),
    ("resnet50", {"stem": "shallow"}, "conv7, deep"),
    ("resnet50d", {"shortcut": "A", "avg_down": True}, "shortcut B or C"),
    ("resnet50", {"init": "zeros"}, "he_fan_out"),
    ("resnet50", {"num_classes": 0}, "at least 1"),
    ("resnet50", {"classifier_std": 0.0}, "above 0"),
]


@pytest.mark.parametrize(("name", "options", "remedy"), REFUSED)
def test_wrong_options_are_refused_with_the_remedy(name, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        build_model(name, **({"num_classes": 10} | options))


def test_configuration_has_exactly_the_options_of_build_model():
    """`build_model` takes the fields of ModelOptions; a network that a recipe does not describe
    further is the one that `build_model` gives."""
    asked = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name != "name"}
    understood = {f.name: f.default for f in dataclasses.fields(ModelOptions)
                  if f.name not in ("num_classes", "bn_batch")}
    assert asked == understood
    with pytest.raises(TypeError, match="colour"):
        build_model("resnet20", num_classes=10, colour=3)


def test_names_do_not_import_torch():
    import subprocess
    import sys

    code = ("import sys, resnet_dist.models, resnet_dist.models.catalog.options;"
            "from resnet_dist.models.catalog.names import model_names;"
            "assert 'resnet50' in model_names(); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_family_has_a_builder_and_a_description():
    from resnet_dist.models.build import _BUILDERS

    for entry in MODELS.values():
        assert entry.family in _BUILDERS
        assert entry.description


@pytest.mark.parametrize("backend", [
    "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_network_computes_and_counts_the_same(backend):
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, bn_batch=2)
    twin = build_model("resnet20", num_classes=10, bn_batch=2)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for network in (model, compiled):
        flatten_bn_stats(network)
        for _ in range(2):
            logits = network(images)
            commit_running_stats(network)
        logits.square().sum().backward()
        network.logits = logits
    assert torch.allclose(model.logits, compiled.logits, rtol=1e-3, atol=1e-3)
    assert torch.allclose(bn_running_vector(model), bn_running_vector(compiled), rtol=1e-4,
                          atol=1e-5)
    assert twin.bn1.num_batches_tracked == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-2 * a.grad.norm()


def test_statistics_are_reached_through_data_parallel_wrappers(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = build_model("resnet20", num_classes=10, bn_batch=2)
        flatten_bn_stats(model)
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        wrapped(torch.randn(4, 3, 32, 32)).sum().backward()
        assert bn_stat_vector(wrapped)[-1] == 2
        commit_running_stats(wrapped)
        assert model.bn1.num_batches_tracked == 1
    finally:
        torch.distributed.destroy_process_group()
