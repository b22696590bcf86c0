"""Every optimizer, schedule and loss against torch's own, or the paper's formula written out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import Config, LossConfig, ScheduleConfig
from resnet_dist.data.augmentation.mix import Targets
from resnet_dist.engine.averaging import AveragedWeights
from resnet_dist.engine.losses import class_weights, correct, loss_sum
from resnet_dist.engine.optim import (
    Observed,
    build_optimizer,
    lr_at,
    parameter_groups,
    plateau_steps,
    set_lr,
)
from resnet_dist.models import norm
from resnet_dist.models.build import build_model
from resnet_dist.models.norm import GhostBatchNorm2d

STEPS = 1000


def make_config(**optimizer: Any) -> Config:
    return config_from_dict({"name": "test", "optimizer": optimizer})


class Slopes(torch.nn.Module):
    """A layer of weights and a bias whose gradients a test writes by hand."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(5, generator=generator))


def descend(options: dict[str, Any], reference: Callable[..., None]) -> None:
    """1,000 steps of our optimizer in fp32 beside `reference` in fp64, rate changing on the way.

    Both see the same gradients, so that errors add up and do not grow chaotically.
    """
    model = Slopes()
    optimizer = build_optimizer(model, make_config(**options))
    ours = [model.weight, model.bias]
    theirs = [p.detach().numpy().astype(np.float64) for p in ours]
    states: list[dict[str, np.ndarray]] = [{}, {}]
    draw = np.random.default_rng(1)
    for step in range(STEPS):
        lr = options["lr"] * (0.1 if step > 500 else 1.0)
        set_lr(optimizer, lr)
        for index, parameter in enumerate(ours):
            gradient = draw.normal(size=parameter.shape) + 0.3 * np.sign(theirs[index])
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            gradient = parameter.grad.numpy().astype(np.float64)
            decays = index == 0 or options.get("decay", "all") == "all"
            reference(theirs[index], gradient, states[index], lr, step + 1,
                      options["weight_decay"] if decays else 0.0)
        optimizer.step()
    for parameter, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_formula(nesterov: bool) -> None:
    def reference(w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], lr: float,
                  step: int, decay: float) -> None:
        d = g + decay * w
        v = state["v"] = 0.9 * state["v"] + d if "v" in state else d
        w -= lr * (d + 0.9 * v if nesterov else v)

    descend({"name": "sgd", "lr": 0.01, "weight_decay": 0.01, "nesterov": nesterov}, reference)


def caffe(w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], lr: float, step: int,
          decay: float) -> None:
    v = state["v"] = 0.9 * state.get("v", np.zeros_like(w)) + lr * (g + decay * w)
    w -= v


def test_caffe_momentum_is_the_formula() -> None:
    descend({"name": "sgd_caffe", "lr": 0.01, "weight_decay": 0.01}, caffe)


def test_caffe_momentum_differs_from_torchs_once_the_rate_changes() -> None:
    with pytest.raises(AssertionError):
        descend({"name": "sgd", "lr": 0.01, "weight_decay": 0.01}, caffe)


@pytest.mark.parametrize(("decay_on", "spared"), [
    ("all", set()), ("weights", {"0.bias", "1.weight", "1.bias", "2.bias"}),
    ("but_norm", {"1.weight", "1.bias"})])
def test_decay_spares_what_it_says(decay_on: str, spared: set[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), GhostBatchNorm2d(3),
                                torch.nn.Linear(3, 2))
    config = make_config(lr=0.1, momentum=0.0, weight_decay=0.5, decay=decay_on)
    optimizer = build_optimizer(model, config)
    before = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.fill_(1.0)
        before[name] = parameter.detach().clone()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == spared


@pytest.mark.parametrize("decay_on", ["all", "weights"])
def test_lars_is_the_formula(decay_on: str) -> None:
    def reference(w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], lr: float,
                  step: int, decay: float) -> None:
        if decay:
            size, slope = np.linalg.norm(w), np.linalg.norm(g)
            lr = lr * 0.02 * size / (slope + decay * size)
        caffe(w, g, state, lr, step, decay)

    descend({"name": "lars", "lr": 0.5, "weight_decay": 0.01, "trust": 0.02, "decay": decay_on},
            reference)


@pytest.mark.parametrize("decay_on", ["all", "weights"])
def test_lamb_is_the_formula(decay_on: str) -> None:
    def reference(w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], lr: float,
                  step: int, decay: float) -> None:
        zero = np.zeros_like(w)
        m = state["m"] = 0.9 * state.get("m", zero) + 0.1 * g
        v = state["v"] = 0.99 * state.get("v", zero) + 0.01 * g * g
        r = (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.99 ** step)) + 1e-6) + decay * w
        w -= lr * (np.linalg.norm(w) / np.linalg.norm(r) if decay else 1.0) * r

    descend({"name": "lamb", "lr": 0.01, "weight_decay": 0.02, "betas": [0.9, 0.99], "eps": 1e-6,
             "decay": decay_on}, reference)


def test_adamw_is_the_formula() -> None:
    def reference(w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], lr: float,
                  step: int, decay: float) -> None:
        zero = np.zeros_like(w)
        w *= 1 - lr * decay
        m = state["m"] = 0.9 * state.get("m", zero) + 0.1 * g
        v = state["v"] = 0.999 * state.get("v", zero) + 0.001 * g * g
        w -= lr * (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + 1e-8)

    descend({"name": "adamw", "lr": 0.01, "weight_decay": 0.05}, reference)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_layer_of_zeros_takes_the_plain_rate_and_starts_to_move(name: str) -> None:
    model = Slopes()
    torch.nn.init.zeros_(model.weight)
    optimizer = build_optimizer(model, make_config(name=name, lr=0.1))
    model.weight.grad, model.bias.grad = torch.ones(5, 3), torch.ones(5)
    optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert (model.weight < 0).all()


def test_decay_can_spare_biases_and_batch_norm() -> None:
    model = build_model("resnet20", num_classes=10)
    everything, = parameter_groups(model, make_config())
    assert len(everything["params"]) == len(list(model.parameters()))
    weights, spared = parameter_groups(model, make_config(decay="weights"))
    assert spared["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in weights["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    assert len(weights["params"]) + len(spared["params"]) == len(everything["params"])


# -- Schedules -------------------------------------------------------------------------------------

def torch_rates(make: Callable[[torch.optim.Optimizer], Any], lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(lr: float, **values: Any) -> list[float]:
    schedule = ScheduleConfig(**values)
    return [lr_at(schedule, lr, step, STEPS) for step in range(STEPS)]


SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize(("values", "make"), [
    ({"name": "milestones", "milestones": (200, 700), "factor": 0.2},
     lambda o: SCHEDULERS.MultiStepLR(o, [200, 700], 0.2)),
    ({"name": "constant"}, lambda o: SCHEDULERS.ConstantLR(o, 1.0)),
    ({"name": "cosine", "final": 0.05},
     lambda o: SCHEDULERS.CosineAnnealingLR(o, STEPS, eta_min=0.05 * 0.8)),
    ({"name": "cosine", "warmup_steps": 100, "warmup_start": 0.01},
     lambda o: SCHEDULERS.SequentialLR(o, [SCHEDULERS.LinearLR(o, 0.01, 1.0, 100),
                                           SCHEDULERS.CosineAnnealingLR(o, 900)], [100])),
    ({"name": "milestones", "milestones": (500,), "warmup": "constant", "warmup_steps": 400,
      "warmup_start": 0.1},
     lambda o: SCHEDULERS.SequentialLR(o, [SCHEDULERS.ConstantLR(o, 0.1, 10 ** 6),
                                           SCHEDULERS.MultiStepLR(o, [100], 0.1)], [400])),
    ({"name": "linear", "final": 0.1}, lambda o: SCHEDULERS.LinearLR(o, 1.0, 0.1, STEPS)),
    ({"name": "one_cycle", "peak": 0.3, "warmup_start": 1 / 25, "final": 1 / 25e4},
     lambda o: SCHEDULERS.OneCycleLR(o, 0.8, total_steps=STEPS + 1 - 1, cycle_momentum=False)),
], ids=["milestones", "constant", "cosine", "cosine-warmup", "constant-warmup",
        "linear", "one-cycle"])
def test_schedules_are_torchs(values: dict[str, Any], make: Callable[..., Any]) -> None:
    if values["name"] == "one_cycle":  # torch refuses the step after the last
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
        scheduler, rates = make(optimizer), []
        for step in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            if step < STEPS - 1:
                optimizer.step()
                scheduler.step()
    else:
        rates = torch_rates(make, 0.8)
    np.testing.assert_allclose(our_rates(0.8, **values), rates, rtol=1e-6, atol=1e-12)


def test_the_rate_before_the_error_falls_is_the_small_one() -> None:
    """He et al. 2015, sec. 4.2: 0.01 until the training error is below 80%, then 0.1."""
    schedule = ScheduleConfig(milestones=(600,), warmup_start=0.1, warmup_until_error=80.0)
    observed = Observed()
    for step, error in ((20, 89.0), (40, 85.0)):
        observed = observed.trained(step, error, schedule)
        assert lr_at(schedule, 0.1, step, STEPS, observed) == pytest.approx(0.01)
    observed = observed.trained(60, 79.9, schedule).trained(80, 95.0, schedule)
    rates = [lr_at(schedule, 0.1, step, STEPS, observed) for step in (59, 60, 81, 600)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01])


def test_the_2015_warm_up_is_its_formula_over_1000_steps_through_a_checkpoint_a_step() -> None:
    """The rate knows of an error once it is measured, every 20 steps, and never goes back."""
    schedule = ScheduleConfig(milestones=(500, 750), warmup_start=0.1, warmup_until_error=80.0)
    draw, observed, warm, rates, expected = np.random.default_rng(0), Observed(), False, [], []
    for step in range(STEPS):
        observed = Observed.from_meta(json.loads(json.dumps(observed.to_meta())))
        rates.append(lr_at(schedule, 0.1, step, STEPS, observed))
        expected.append((0.1 if warm else 0.01)
                        * (1 if step < 500 or not warm else 0.1 if step < 750 else 0.01))
        if (step + 1) % 20 == 0:
            error = 95 - 0.05 * step + draw.normal()
            observed = observed.trained(step + 1, error, schedule)
            warm = warm or error < 80
    assert 0 < sum(rate < 0.05 for rate in rates[:500]) < 450
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_the_plateau_schedule_is_torchs_over_1000_steps_through_a_checkpoint_a_step() -> None:
    schedule = ScheduleConfig(name="plateau", patience=3, gain=0.1, factor=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = SCHEDULERS.ReduceLROnPlateau(optimizer, factor=0.1, patience=2, threshold=0.1,
                                             threshold_mode="abs", eps=0.0)
    draw, observed, rates, expected = np.random.default_rng(0), Observed(), [], []
    for step in range(STEPS):
        observed = Observed.from_meta(json.loads(json.dumps(observed.to_meta())))
        rates.append(lr_at(schedule, 0.1, step, STEPS, observed))
        expected.append(optimizer.param_groups[0]["lr"])
        if (step + 1) % 20 == 0:
            error = 60 * math.exp(-step / 100) + 8 + draw.normal()
            observed = observed.validated(step + 1, error)
            scheduler.step(error)
    assert len(set(expected)) > 3
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_the_rate_drops_when_the_error_plateaus() -> None:
    schedule = ScheduleConfig(name="plateau", patience=2, gain=0.1)
    observed = Observed()
    for step, error in ((10, 50.0), (20, 40.0), (30, 39.95), (40, 39.93), (50, 30.0)):
        observed = observed.validated(step, error)
    rates = [lr_at(schedule, 1.0, step, STEPS, observed) for step in (39, 40, 60)]
    assert rates == pytest.approx([1.0, 0.1, 0.1])


errors = st.lists(st.floats(0, 100), max_size=60)


@given(errors, st.integers(1, 5), st.floats(0.01, 5))
def test_a_plateau_is_torchs_reduce_on_plateau(
        values: list[float], patience: int, gain: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch drops when more than `patience` evaluations were bad, we when as many as `patience`.
    scheduler = SCHEDULERS.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience - 1,
                                             threshold=gain, threshold_mode="abs", eps=0.0)
    expected, before = [], 1.0
    for step, error in enumerate(values):
        scheduler.step(error)
        rate = optimizer.param_groups[0]["lr"]
        if rate < before:
            expected.append(step)
        before = rate
    assert plateau_steps(list(enumerate(values)), patience, gain) == tuple(expected)


@given(errors, st.integers(0, 60))
def test_observations_survive_a_checkpoint(values: list[float], cut: int) -> None:
    schedule = ScheduleConfig(name="plateau", patience=2)
    whole = broken = Observed()
    for step, error in enumerate(values):
        whole = whole.validated(step, error)
        broken = broken.validated(step, error)
        if step == cut:
            broken = Observed.from_meta(json.loads(json.dumps(broken.to_meta())))
    assert whole == broken
    assert lr_at(schedule, 0.1, 61, STEPS, whole) == lr_at(schedule, 0.1, 61, STEPS, broken)


# -- Losses and averages ---------------------------------------------------------------------------

def draw_logits(n: int = 32, classes: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (3 * torch.randn(n, classes, generator=generator),
            torch.randint(classes, (n,), generator=generator))


def test_smoothed_cross_entropy_is_torchs() -> None:
    logits, labels = draw_logits()
    ours = loss_sum(logits, Targets(labels), LossConfig(label_smoothing=0.1)) / 32
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_cross_entropy_is_that_of_soft_targets(smoothing: float) -> None:
    logits, labels = draw_logits()
    targets = Targets(labels, labels.flip(0), torch.linspace(0, 1, 32))
    soft = class_weights(targets, 11, smoothing)
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    ours = loss_sum(logits, targets, LossConfig(label_smoothing=smoothing))
    torch.testing.assert_close(ours, F.cross_entropy(logits, soft, reduction="sum"))


def test_bce_is_a_sigmoid_per_class() -> None:
    logits, labels = draw_logits()
    targets = Targets(labels, labels.flip(0), torch.full((32,), 0.7))
    loss = LossConfig(name="bce", label_smoothing=0.1, threshold=0.2)
    p = torch.sigmoid(logits.double())
    aims = torch.zeros(32, 11, dtype=torch.float64)
    for row in range(32):  # 0.7 and 0.3 of the smoothed targets both exceed 0.2
        aims[row, labels[row]] = aims[row, labels.flip(0)[row]] = 1
    expected = -(aims * p.log() + (1 - aims) * (1 - p).log()).mean(1).sum()
    torch.testing.assert_close(loss_sum(logits, targets, loss), expected.float())


@given(st.integers(0, 10_000))
def test_hits_are_those_of_a_stable_sort(seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.integers(0, 4, size=(20, 12)).astype(np.float32)  # full of ties
    labels = draw.integers(0, 12, size=20)
    order = np.argsort(-logits, axis=1, kind="stable")
    top1 = sum(labels[i] in order[i, :1] for i in range(20))
    top5 = sum(labels[i] in order[i, :5] for i in range(20))
    found = correct(torch.from_numpy(logits), torch.from_numpy(labels))
    assert [float(value) for value in found] == [top1, top5]


def test_logits_that_are_not_numbers_hit_nothing() -> None:
    logits = torch.full((4, 10), float("nan"))
    assert [float(value) for value in correct(logits, torch.zeros(4, dtype=torch.int64))] == [0, 0]


def test_averaged_weights_follow_the_recurrence_and_change_places() -> None:
    model = build_model("resnet20", num_classes=10)
    norm.flatten_bn_stats(model)
    averages = AveragedWeights(model, 0.9)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for _ in range(STEPS // 10):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)
        averages.update(model)
        for name, p in model.named_parameters():
            expected[name] += (1 - 0.9) * (p.detach().double() - expected[name])
    live = {name: value.clone() for name, value in model.state_dict().items()}
    averages.swap(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-4, atol=1e-6)
    averages.swap(model)
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_the_cosine_ends_where_it_should() -> None:
    schedule = ScheduleConfig(name="cosine", final=0.25)
    assert lr_at(schedule, 2.0, STEPS, STEPS) == pytest.approx(0.5)
    assert math.isfinite(lr_at(schedule, 2.0, 10 * STEPS, STEPS))
