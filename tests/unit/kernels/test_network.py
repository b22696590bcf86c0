"""Whole networks on the Triton kernels, joined as on a GPU, beside the same in float64 on torch's.

In Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models import resnet
from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.layers import norm_of
from resnet_dist.models.norm import bn_stat_vector, flatten_bn_stats
from resnet_dist.models.resnet import BasicBlock, BlockConfig, Bottleneck, ResNet

pytest.importorskip("triton", reason="triton is not installed; the test extra brings it")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANES = (64, 8, 12, 8)


def network(block: type[BasicBlock | Bottleneck], shortcut: str = "B",
            checkpointing: bool = False) -> nn.Module:
    """Small, and with a stage whose second block's shortcut is the identity."""
    torch.manual_seed(0)
    options = ModelOptions(num_classes=3, bn_batch=2, checkpointing=checkpointing)
    config = BlockConfig(norm=norm_of(options), shortcut=shortcut)
    model = ResNet(block, (1, 2, 1, 1), config, options)
    model.fc = nn.Linear(PLANES[-1] * block.expansion, 3)
    model.to(DEVICE)
    for module in model.modules():  # gradients through all of it, so that none is small
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    flatten_bn_stats(model)
    logits = model(x)
    torch.linalg.vector_norm(logits).backward()
    return {"logits": logits.detach(), "statistics": bn_stat_vector(model),
            **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("block", "shortcut", "checkpointing"), [
    (Bottleneck, "B", False), (Bottleneck, "C", True), (BasicBlock, "A", False)])
def test_a_network_on_these_kernels_has_the_gradients_of_its_meaning(
        block: type[BasicBlock | Bottleneck], shortcut: str, checkpointing: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "PLANES", PLANES)
    model = network(block, shortcut, checkpointing)
    wide = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 48, 48, device=DEVICE).contiguous(memory_format=torch.channels_last)
    wanted = outcome(wide, x.double())
    monkeypatch.setattr(kernels, "_on_gpu", lambda _: True)
    found = outcome(model, x)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        error = (value.double() - wanted[name]).norm() / wanted[name].norm()
        # An output that rounds across 0 moves one gradient wholly.
        assert error < 1e-2, name
