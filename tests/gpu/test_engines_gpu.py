"""The engines' promises on a GPU: bits that repeat and resume, gradients and states that agree.

What several ranks owe each other is tested over gloo in tests/dist; here a world is one GPU. Every
test has a process of its own: DeepSpeed chooses its accelerator when imported, and once it has
scaled a loss, its later optimizers of the same process scale too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from resnet_dist.engine.core import Engine
from tests.dist.harness import run_ranks
from tests.dist.runs import after_an_overflow, build, digest, join, make_config, momentum, train

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {}, "recorded": {"cuda_graphs": True}, "exact": {"mode": "exact"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)}}
CHAOS: dict[str, Any] = {"augment": {"mixup": 0.2}, "model": {"stochastic_depth": 0.2},
                         "loss": {"label_smoothing": 0.1}, "ema": {"decay": 0.9}}
NO_DECAY: dict[str, Any] = {"optimizer": {"weight_decay": 0.0}}  # momentum 1 is the gradient


def on_gpu(work: Any, *arguments: Any) -> Any:
    return run_ranks(work, 1, *arguments, environment={"DS_ACCELERATOR": "cuda"}, fresh=True)[0]


def engine_of(**values: Any) -> Engine:
    config = make_config(1, **{"device": "cuda", **values})
    return build(config, join(config))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def resumed_and_uninterrupted(values: dict[str, Any]) -> tuple[str, str]:
    straight = engine_of(**values, **CHAOS)
    train(straight, 0, 6)
    saved = straight.state()
    train(straight, 6, 12)
    again = engine_of(**values, **CHAOS)
    again.load(saved)
    train(again, 6, 12)
    return digest(straight.state()), digest(again.state())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("name", ENGINES)
def test_resume_equals_uninterrupted(name: str, precision: str) -> None:
    straight, resumed = on_gpu(resumed_and_uninterrupted,
                               {**ENGINES[name], "precision": precision})
    assert straight == resumed


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars", "sgd_caffe"])
@pytest.mark.parametrize("name", ["ddp", "zero0", "zero1"])
def test_every_optimizer_resumes(name: str, optimizer: str) -> None:
    if name == "zero1" and optimizer in ("lamb", "lars"):
        pytest.skip("refused: their norms are of whole layers")
    straight, resumed = on_gpu(resumed_and_uninterrupted,
                               {**ENGINES[name], "optimizer": {"name": optimizer, "lr": 0.01}})
    assert straight == resumed


def first_gradients(names: list[str]) -> list[torch.Tensor]:
    found = []
    for name in names:
        engine = engine_of(**({"device": "cpu"} if name == "cpu" else ENGINES[name]), **NO_DECAY)
        train(engine, 0, 1)
        found.append(momentum(engine.state()))
    return found


def test_first_gradients_of_all_engines_agree() -> None:
    names = [*ENGINES, "cpu"]
    first, *others = on_gpu(first_gradients, names)
    for name, other in zip(names[1:], others, strict=True):
        assert apart(other, first) < (1e-4 if name == "cpu" else 1e-5), name


def handed_over(writer: dict[str, Any], reader: dict[str, Any]) -> tuple[str, str, float]:
    """Digests of what was saved and of what was loaded; how far the next steps are apart."""
    engine, other = engine_of(**writer), engine_of(**reader)
    train(engine, 0, 2)
    saved = engine.state()
    other.load(saved)
    loaded = other.state()
    train(engine, 2, 3)
    train(other, 2, 3)
    return (digest(saved, ranks=False), digest(loaded, ranks=False),
            apart(momentum(other.state()), momentum(engine.state())))


@pytest.mark.parametrize(("writer", "reader"), [("ddp", "zero1"), ("zero2", "ddp"),
                                                ("zero0", "exact"), ("recorded", "zero2")])
def test_each_engine_resumes_the_others_checkpoints(writer: str, reader: str) -> None:
    """What is loaded is what was saved, to the bit; and the next step is the writer's."""
    saved, loaded, difference = on_gpu(handed_over, ENGINES[writer], ENGINES[reader])
    assert saved == loaded
    assert difference < 1e-5


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_crosses_devices(writer: str, reader: str) -> None:
    saved, loaded, difference = on_gpu(handed_over, {"device": writer}, {"device": reader})
    assert saved == loaded
    assert difference < 1e-3


@pytest.mark.parametrize("name", ["ddp", "recorded", "zero0", "zero1"])
def test_fp16_skips_an_overflow_and_halves_the_scale(name: str) -> None:
    before, after, scale = on_gpu(
        after_an_overflow, {"device": "cuda", "precision": "fp16", **ENGINES[name]})
    assert torch.equal(before, after)
    assert scale == 2.0 ** 119
