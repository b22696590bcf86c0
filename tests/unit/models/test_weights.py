"""Weights in and out: every file this package writes is read back, by us and by others' rules."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_dist.models.build import build_model
from resnet_dist.models.weights import (
    WeightsError,
    export_weights,
    init_from,
    read_state_dict,
    to_our_names,
    to_timm_names,
)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("resnet18", num_classes=5)


def other(name="resnet18", **options):
    torch.manual_seed(1)
    return build_model(name, num_classes=options.pop("num_classes", 5), **options)


@pytest.mark.parametrize(("format", "suffix"), [
    ("safetensors", ".safetensors"), ("torchvision", ".pth"), ("timm", ".safetensors")])
def test_exported_weights_load_bit_for_bit(model, tmp_path, format, suffix):
    path = tmp_path / f"model{suffix}"
    export_weights(model, path, format)
    loaded = other()
    assert not same(loaded, model)
    init_from(loaded, path)
    assert same(loaded, model)


def test_torchvision_export_is_a_plain_state_dict(model, tmp_path):
    export_weights(model, tmp_path / "m.pth", "torchvision")
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    assert state["layer4.1.bn2.num_batches_tracked"].dtype == torch.int64
    assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)


def test_timm_has_vgg_s_hidden_layers_as_convolutions():
    shapes = {"classifier.0": (8, 2 * 49), "classifier.3": (8, 8), "classifier.6": (3, 8)}
    state = {"features.0.weight": torch.randn(2, 3, 3, 3)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    timm = to_timm_names(state)
    assert timm["pre_logits.fc1.weight"].shape == (8, 2, 7, 7)
    assert timm["pre_logits.fc2.weight"].shape == (8, 8, 1, 1)
    assert timm["head.fc.weight"].shape == (3, 8)
    back = to_our_names(timm)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    # The convolution over the 7x7 map is the linear layer over its pixels.
    x = torch.randn(1, 2, 7, 7)
    as_conv = torch.nn.functional.conv2d(x, timm["pre_logits.fc1.weight"]).flatten(1)
    assert torch.allclose(as_conv, x.flatten(1) @ state["classifier.0.weight"].T, atol=1e-5)


def test_wrapped_and_anti_aliased_checkpoints_of_others_load(tmp_path):
    blurred = other("resnet50_blur")
    state = {}
    for key, tensor in blurred.state_dict().items():
        strided = any(key.startswith(f"layer{s}.0.{c}") for s in (2, 3, 4)
                      for c in ("conv2", "downsample.0"))
        if strided and key.endswith(".weight"):  # the wrapper of ffcv-imagenet
            at = key.removesuffix(".weight")
            state[f"module.{at}.conv.weight"] = tensor
            state[f"module.{at}.blur_filter"] = torch.zeros(1)
        else:
            state[f"module.{key}"] = tensor
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "run.pt")
    torch.manual_seed(2)
    model = build_model("resnet50_blur", num_classes=5)
    init_from(model, tmp_path / "run.pt")
    assert same(model, blurred)


def test_a_mismatch_lists_every_key(model, tmp_path):
    state = model.state_dict()
    del state["layer1.0.conv1.weight"]
    state["extra.weight"] = torch.zeros(3)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError) as caught:
        init_from(other(num_classes=4), tmp_path / "m.safetensors")
    message = str(caught.value)
    for part in ("'resnet18'", "missing     layer1.0.conv1.weight (64, 64, 3, 3)",
                 "unexpected  extra.weight (3,)",
                 "shape       fc.weight: file (5, 512), model (4, 512)",
                 "shape       fc.bias: file (5,), model (4,)"):
        assert part in message


def test_a_mismatch_changes_no_weight(model, tmp_path):
    export_weights(model, tmp_path / "m.pth", "torchvision")
    target, untouched = other(num_classes=4), other(num_classes=4)
    with pytest.raises(WeightsError):
        init_from(target, tmp_path / "m.pth")
    assert same(target, untouched)


def test_new_classifier_keeps_the_last_layer_and_loads_the_rest(model, tmp_path):
    export_weights(model, tmp_path / "m.pth", "torchvision")
    target, before = other(num_classes=4), other(num_classes=4)
    init_from(target, tmp_path / "m.pth", new_classifier=True)
    assert torch.equal(target.fc.weight, before.fc.weight)
    assert torch.equal(target.layer3[0].conv1.weight, model.layer3[0].conv1.weight)


def test_files_without_batch_counters_load(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_tracked")}
    torch.save(state, tmp_path / "old.pth")
    target = other()
    init_from(target, tmp_path / "old.pth")
    assert torch.equal(target.bn1.weight, model.bn1.weight)


class Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


def test_files_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="not a readable state dict"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(("content", "remedy"), [
    (None, "no such file"), (b"garbage", "not a readable state dict")])
def test_unreadable_files_are_named(tmp_path, content, remedy):
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"m\.safetensors'.*{remedy}"):
        read_state_dict(path)


@pytest.mark.parametrize(("name", "options", "format", "reason"), [
    ("resnet20", {}, "torchvision", "torchvision has no resnet20"),
    ("resnet50_v1", {}, "timm", "timm has no resnet50_v1"),
    ("resnet18", {"shortcut": "A"}, "torchvision", "something else.*shortcut"),
    ("resnet18", {}, "keras", "choose one of torchvision, timm, safetensors, onnx"),
])
def test_formats_that_would_compute_something_else_are_refused(name, options, format, reason,
                                                               tmp_path):
    with pytest.raises(WeightsError, match=reason):
        export_weights(other(name, **options), tmp_path / "m", format)
    assert not (tmp_path / "m").exists()


def test_export_leaves_the_flat_statistics_alone(model, tmp_path):
    from resnet_dist.models.norm import bn_running_vector, flatten_bn_stats

    flatten_bn_stats(model)
    export_weights(model, tmp_path / "m.safetensors", "safetensors")
    state = load_file(tmp_path / "m.safetensors")
    assert torch.equal(state["bn1.running_var"], model.bn1.running_var)
    assert bn_running_vector(model).numel() == 2 * sum(
        v.numel() for k, v in state.items() if k.endswith("running_mean"))


@pytest.mark.parametrize("name", [
    "resnet20", pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("inception_v4", marks=pytest.mark.slow)])
def test_onnx_runs_elsewhere_with_the_same_logits(name, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the exported graph")
    torch.manual_seed(0)
    model = build_model(name, num_classes=7)
    side = {"resnet20": 32, "resnet50": 224, "inception_v4": 299}[name]
    export_weights(model, tmp_path / "m.onnx", "onnx", input_size=side)
    assert model.training
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            want = model.eval()(images)
        (got,) = session.run(None, {"images": images.numpy()})
        assert (torch.from_numpy(got) - want).abs().max() <= 1e-4 * want.abs().max()
