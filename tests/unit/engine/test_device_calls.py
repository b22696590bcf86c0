"""What the engines do on a GPU, shown without one: tensors that claim to be on a GPU and hold
nothing (torch's FakeTensorMode), and torch.cuda's own calls recorded at the boundary."""

from __future__ import annotations

import gc
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_dist.engine import ddp, deepspeed
from resnet_dist.engine.clock import Exchange
from resnet_dist.engine.graph import CudaRecorder
from resnet_dist.models import norm
from resnet_dist.ranks.distributed import World
from tests.dist.runs import build, make_config

GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda own, *_: own)  # there is nothing to copy
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved(model: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """`Module.to`, which torch cannot do for such tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(parameter.shape, device=GPU))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return model


def gpu_engine(**values: Any) -> ddp.DDPEngine:
    """Of VGG-16, which has no BatchNorm: what holds its statistics asks a tensor for its values."""
    config = make_config(1, device="cuda", model={"name": "vgg16"}, augment={"size": 32}, **values)
    engine = build(config, World(0, 1, 0, GPU))
    assert isinstance(engine, ddp.DDPEngine)
    return engine


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("name", "device"), [("adamw", "cuda"), ("lamb", "cpu")])
def test_the_step_count_is_restored_to_where_the_optimizer_reads_it(name: str,
                                                                    device: str) -> None:
    """torch's fused AdamW refuses a count on the host; LAMB would wait for one on the device."""
    engine = gpu_engine(optimizer={"name": name})
    fresh, loaded = gpu_engine(optimizer={"name": name}), engine._trained[0]
    path = next(iter(engine._parameters))
    engine._load_optimizer_tensors({
        f"exp_avg/{path}": torch.zeros(loaded.shape), f"step/{path}": torch.zeros(())})
    fresh._trained[0].grad = torch.zeros_like(fresh._trained[0])
    kept = engine.optimizer.state[loaded]
    assert kept["exp_avg"].device == GPU
    assert kept["step"].device.type == device
    if name == "adamw":  # what torch itself would have made
        fresh.optimizer.step()
        made = fresh.optimizer.state[fresh._trained[0]]
        assert kept["step"].device == made["step"].device
        assert kept["step"].dtype == made["step"].dtype


def test_a_network_without_batch_norm_exchanges_vectors_where_its_weights_are() -> None:
    """NCCL refuses tensors of the host, empty ones too."""
    plain = torch.nn.Linear(2, 2, device="meta")
    assert norm.bn_running_vector(plain).device.type == "meta"
    assert norm.bn_stat_vector(plain).device.type == "meta"


@pytest.mark.usefixtures("fake_gpu")
def test_averaged_weights_of_a_network_without_batch_norm_stay_on_the_gpu() -> None:
    engine = gpu_engine(ema={"decay": 0.9})
    assert not [m for m in engine.module.modules() if isinstance(m, norm.GhostBatchNorm2d)]
    assert engine._averages().running.device == GPU


def test_a_recording_lets_other_threads_use_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader pins memory meanwhile; in the mode "global" that would break the recording off."""
    modes = []

    class Graph:
        replay = None

    class Recording:
        def __init__(self, graph: Graph, *, stream: object, capture_error_mode: str = "global",
                     ) -> None:
            modes.append(capture_error_mode)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    for name, stand_in in (("Stream", object), ("CUDAGraph", Graph), ("graph", Recording),
                           ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    CudaRecorder().record(lambda: None)
    assert modes == ["thread_local"]


def test_events_do_not_pile_up_where_nobody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        alive = 0

        def __init__(self, *, enable_timing: bool) -> None:
            Event.alive += 1

        def __del__(self) -> None:
            Event.alive -= 1

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, last: Event) -> float:
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    exchange = Exchange(GPU)
    for _ in range(5000):
        with exchange:
            pass
    gc.collect()
    assert Event.alive <= 1024
    assert exchange.read() == pytest.approx({"comm_s": 0.002, "comm_exposed_s": 0.002})
    assert Event.alive == 0
    assert exchange.read()["comm_s"] == 0.0


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("local_rank", ["3", None])
def test_deepspeed_is_told_the_gpu_that_this_rank_sees(monkeypatch: pytest.MonkeyPatch,
                                                      local_rank: str | None) -> None:
    """It makes GPU number LOCAL_RANK the current one; rank 3 may see but one, number 0."""
    told: dict[str, str] = {}

    def initialize(**arguments: Any) -> tuple[None, Any, None, None]:
        told.update(os.environ)
        return None, arguments["optimizer"], None, None

    stand_in = types.SimpleNamespace(
        ops=types.SimpleNamespace(__compatible_ops__={}), initialize=initialize,
        init_distributed=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    monkeypatch.setattr(deepspeed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(deepspeed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_RANK", local_rank or "")
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK")
    build(make_config(1, device="cuda", engine="deepspeed", model={"name": "vgg16"}),
          World(0, 1, 3, GPU))
    assert told["LOCAL_RANK"] == "0"
