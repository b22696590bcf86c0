"""Signal propagation at initialisation: measured right, and what residual connections change."""

import pytest
import torch
import torch.nn.functional as F

from resnet_dist.models.analysis.propagation import measure, plot, signal_propagation
from resnet_dist.models.build import build_model


def test_variance_and_gradient_are_those_of_the_block_output():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    signals = signal_propagation(model, images, labels)
    assert [s.name for s in signals][::8] == ["layer1.0", "layer3.2"]

    hidden = model.layer2(model.layer1(model.bn1(model.conv1(images), relu=True)))
    logits = model.fc(model.layer3(hidden).mean((2, 3)))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), hidden)
    assert signals[5].variance == pytest.approx(hidden.var(correction=0).item(), rel=1e-4)
    assert signals[5].gradient == pytest.approx(gradient.square().mean().item(), rel=1e-3)
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_of_plain_networks_explode_with_depth_and_residual_ones_do_not():
    curves = measure(["plain56", "resnet56"], seeds=1, batch=8)
    growth = {name: s[0].gradient / s[-1].gradient for name, s in curves.items()}
    assert growth["plain56"] > 1e4 * growth["resnet56"]
    forward = {name: s[8].variance / s[0].variance for name, s in curves.items()}
    assert forward["plain56"] == pytest.approx(1.0, abs=0.3)  # BatchNorm resets it in every block
    assert forward["resnet56"] > 3  # every sum adds its branch


def test_the_figure_has_a_curve_per_network():
    pytest.importorskip("matplotlib")
    curves = measure(["resnet20", "plain20"], seeds=1, batch=4)
    assert [len(axis.lines) for axis in plot(curves).axes] == [2, 2]
