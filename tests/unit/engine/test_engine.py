"""One rank's engine against an independent oracle, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.engine.ddp import DDPEngine
from resnet_dist.models import norm
from resnet_dist.models.build import build_model
from tests.dist.runs import CLASSES, build, digest, global_batch, join, make_config, train


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)


def engine_of(**values: Any) -> DDPEngine:
    config = make_config(1, **values)
    engine = build(config, join(config))
    assert isinstance(engine, DDPEngine)
    return engine


class TorchBatchNorm(torch.nn.BatchNorm2d):
    """torch's own BatchNorm where the model expects the project's."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None,
                relu: bool = False) -> torch.Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


def with_torch_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    for name, child in model.named_children():
        if isinstance(child, norm.GhostBatchNorm2d):
            setattr(model, name, TorchBatchNorm(child.num_features, eps=child.eps))
        else:
            with_torch_batch_norm(child)
    return model


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_the_gradient_is_that_of_the_mean_loss_with_a_batch_norm_per_group(mode: str) -> None:
    """To 1e-5, unless a ReLU's input rounds to the other side of 0: one such is 0.3% already.

    So of several batches most agree to the rounding, and all to 1%.
    """
    errors = []
    for step in range(6):
        engine = engine_of(mode=mode)
        torch.manual_seed(engine.config.seed)
        oracle = with_torch_batch_norm(build_model("resnet20", num_classes=CLASSES)).train()
        images, labels, _ = global_batch(engine.config, step)
        x = (images.permute(0, 3, 1, 2).float() / 255 - 0.45) * 4
        for start in range(0, 32, 4):
            logits = oracle(x[start:start + 4].contiguous())
            (F.cross_entropy(logits, labels[start:start + 4], reduction="sum") / 32).backward()
        expected = torch.cat([p.grad.reshape(-1) for p in oracle.parameters()
                              if p.grad is not None])
        train(engine, step, step + 1)
        errors.append(float((engine.gradient_vector() - expected).norm() / expected.norm()))
    assert max(errors) < 0.01
    assert sorted(errors)[2] < 1e-5


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("model", ["resnet18", "resnet20"])
def test_every_activation_and_gradient_stays_channels_last(model: str) -> None:
    engine = engine_of(precision="bf16", model={"name": model})
    seen, other = set(), set()

    def check(what: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, before: Any, after: Any) -> None:
            tensors = [*before, *(after if isinstance(after, tuple) else (after,))]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    seen.add(what)
                    if not tensor.is_contiguous(memory_format=torch.channels_last):
                        other.add(what)
        return hook

    for name, module in engine.module.named_modules():
        if name:
            module.register_forward_hook(check(f"{name} forward"))
            module.register_full_backward_hook(check(f"{name} backward"))
    train(engine, 0, 1)
    assert len(seen) > 80
    if model == "resnet18":
        # Only the gradient out of the average over pixels is in torch's own order.
        assert other <= {"avgpool backward", "layer4 backward", "layer4.1 backward",
                         "layer4.1.bn2 backward"}
    else:  # parameter-free shortcuts (option A) pad in torch's own order on the way back
        assert not [what for what in other if what.endswith("forward")]
    for name, p in engine.module.named_parameters():
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last), name


class NoReads(TorchDispatchMode):
    """Fails when a number leaves a tensor for Python: what makes a GPU's host wait.

    `step` counts of optimizers, which live on the host, are read as attributes and not caught.
    """

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (),
                           keywords: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "the step read a tensor's value"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("values", [
    {}, {"mode": "exact"}, {"micro_batch": 8}, {"ema": {"decay": 0.9}},
    {"optimizer": {"clip_norm": 1.0}}, {"optimizer": {"name": "lars"}},
    {"optimizer": {"name": "adamw"}}], ids=str)
def test_a_step_never_waits_for_the_device(values: dict[str, Any]) -> None:
    engine = engine_of(**values)
    train(engine, 0, 1)
    with NoReads():
        train(engine, 1, 2)
    with pytest.raises(AssertionError), NoReads():
        engine.finite()  # the detector detects


def test_evaluating_changes_no_bit_of_the_run() -> None:
    engine = engine_of(ema={"decay": 0.5})
    train(engine, 0, 2)
    before = digest(engine.state())
    images = global_batch(engine.config, 9)[0]
    outputs = []
    for ema in (False, True):
        with engine.eval_model(ema=ema) as model:
            assert not model.training
            outputs.append(model(engine.normalize(images)))
    assert digest(engine.state()) == before
    assert not torch.equal(*outputs)


def test_averaged_weights_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"ema\.decay = null"), engine_of().eval_model(ema=True):
        pass


def test_clipping_bounds_the_norm_of_the_whole_gradient() -> None:
    free, clipped = engine_of(), engine_of(optimizer={"clip_norm": 0.5})
    for engine in (free, clipped):
        train(engine, 0, 1)
    gradient = free.gradient_vector()
    assert gradient.norm() > 0.5
    torch.testing.assert_close(clipped.gradient_vector(), gradient * 0.5 / gradient.norm())


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_caffe"])
def test_fp16_skips_an_overflow_halves_the_scale_and_remembers_it(optimizer: str) -> None:
    few = {"batch_size": 4}  # CPUs compute fp16 slowly
    engine = engine_of(precision="fp16", optimizer={"name": optimizer}, **few)
    train(engine, 0, 1)
    engine._scaler.load_state_dict({**engine._scaler.state_dict(), "scale": 2.0 ** 120})
    before = engine.state()
    train(engine, 1, 2)
    after = engine.state()
    assert float(after.optimizer["scaler/scale"]) == 2.0 ** 119
    for name, p in engine.module.named_parameters():
        assert torch.equal(before.model[name], p.detach()), name
    again = engine_of(precision="fp16", optimizer={"name": optimizer}, **few)
    again.load(after)
    assert digest(again.state()) == digest(after)


@pytest.mark.parametrize("precision", [
    "bf16", "tf32", "fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_every_precision_learns_what_there_is_to_learn(precision: str) -> None:
    engine = engine_of(precision=precision, model={"name": "resnet20"}, schedule={
        "name": "constant", "milestones": [], "warmup_steps": 0})
    for _ in range(12):
        train(engine, 0, 1)
        last = engine.read_window()
    assert last["loss"] < 1.2
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())


def test_what_is_not_a_number_is_noticed_before_it_is_saved() -> None:
    engine = engine_of()
    train(engine, 0, 1)
    assert engine.finite()
    with torch.no_grad():
        next(engine.module.parameters())[0, 0, 0, 0] = float("nan")
    assert not engine.finite()


def test_the_window_counts_every_image_once_and_starts_anew() -> None:
    engine = engine_of()
    train(engine, 0, 2)
    assert engine.state().optimizer["window"][3] == 64
    first = engine.read_window()
    assert 0 <= first["top1"] <= first["top5"] <= 100
    assert np.isnan(engine.read_window()["loss"])


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_refreshed_statistics_are_the_plain_average_over_groups(mode: str) -> None:
    engine = engine_of(mode=mode)
    train(engine, 0, 3)
    batches = [global_batch(engine.config, step)[0] for step in (20, 21)]
    sums: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            groups = inputs[0].double().unflatten(0, (-1, 4))
            mean, var = (groups.mean((1, 3, 4)).sum(0),
                         groups.transpose(1, 2).flatten(2).var(2).sum(0))
            sums[name] = sums.get(name, 0) + torch.stack((mean, var))
        return hook

    hooks = [module.register_forward_pre_hook(record(name))
             for name, module in engine.module.named_modules()
             if isinstance(module, norm.GhostBatchNorm2d)]
    engine.refresh_bn(batches)
    for hook in hooks:
        hook.remove()
    state = engine.module.state_dict()
    for name, total in sums.items():
        torch.testing.assert_close(state[f"{name}.running_mean"].double(), total[0] / 16,
                                   rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[f"{name}.running_var"].double(), total[1] / 16,
                                   rtol=1e-4, atol=1e-5)


def test_a_state_of_another_model_is_refused_by_name() -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match=r"model state does not fit.*layer1\.3"):
        engine.load(engine_of(model={"name": "resnet32"}).state())
