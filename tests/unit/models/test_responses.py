"""Layer responses: what they measure, that they disturb nothing, and what is written."""

import json

import pytest
import torch
from torch import nn

from resnet_dist.models.analysis.responses import layer_responses, log_responses, write_responses
from resnet_dist.models.build import build_model
from resnet_dist.models.norm import (
    bn_running_vector,
    bn_stat_vector,
    commit_running_stats,
    flatten_bn_stats,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, bn_batch=2, shortcut="B")
    flatten_bn_stats(model)
    model(torch.randn(4, 3, 32, 32))
    commit_running_stats(model, momentum=1.0)
    return model


def test_responses_are_those_before_relu_and_addition(model):
    torch.manual_seed(1)
    batches = [torch.randn(n, 3, 32, 32) for n in (2, 3)]
    got = {r.name: r.std for r in layer_responses(model, batches)}
    assert list(got)[:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert len(got) == 19  # every convolution but none on a shortcut

    model.eval()
    with torch.no_grad():
        x = torch.cat(batches)
        first = model.bn1(model.conv1(x))
        block, x = model.layer1[0], first.relu()
        second = block.bn1(block.conv1(x))
        third = block.bn2(block.conv2(second.relu()))
    for name, response in (("bn1", first), ("layer1.0.bn1", second), ("layer1.0.bn2", third)):
        assert got[name] == pytest.approx(response.std(correction=0).item(), rel=1e-4)


def test_measuring_changes_nothing(model):
    model(torch.randn(2, 3, 32, 32))
    model.layer1.eval()
    before = bn_stat_vector(model), bn_running_vector(model)
    modes = [m.training for m in model.modules()]
    for own_statistics in (False, True):
        layer_responses(model, [torch.randn(3, 3, 32, 32)], batch_statistics=own_statistics)
    assert torch.equal(bn_stat_vector(model), before[0])
    assert torch.equal(bn_running_vector(model), before[1])
    assert [m.training for m in model.modules()] == modes
    assert model.bn1.bn_batch == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_statistics_normalise_every_response_of_a_new_network(model):
    responses = layer_responses(model, [torch.randn(4, 3, 32, 32)], batch_statistics=True)
    assert [r.std for r in responses] == pytest.approx([1.0] * 19, abs=1e-3)


def test_without_batch_norm_convolutions_are_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    images = torch.randn(2, 3, 8, 8)
    got = layer_responses(model, [images])
    assert [r.name for r in got] == ["0", "2"]
    assert got[1].std == pytest.approx(model(images).std(correction=0).item(), rel=1e-4)


def test_no_images_is_an_error(model):
    with pytest.raises(ValueError, match="at least one batch"):
        layer_responses(model, [])


def test_figure_and_json_are_written_in_both_orders(model, tmp_path):
    pytest.importorskip("matplotlib")
    responses = layer_responses(model, [torch.randn(2, 3, 32, 32)])
    paths = write_responses({"resnet20": responses}, tmp_path)
    record = json.loads(paths["json"].read_text())["resnet20"]
    assert [r["name"] for r in record["network_order"]] == [r.name for r in responses]
    ordered = [r["std"] for r in record["sorted"]]
    assert ordered == sorted((r.std for r in responses), reverse=True)
    assert paths["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_curves_reach_tensorboard(model, tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        log_responses({"net": layer_responses(model, [torch.randn(2, 3, 32, 32)])}, writer, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["responses"]
    assert events.Tags()["histograms"] == ["responses/net"]
    assert events.Images("responses")[0].step == 7
