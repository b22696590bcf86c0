"""What only a GPU can show: no waiting, no layout conversion, recordings with equal bits, and loss
curves of the fused network beside one of torch's own modules.

The kernels themselves are tested in tests/unit/kernels/test_kernels.py, on the GPU where there is
one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from resnet_dist.bench.peer import plain_model
from resnet_dist.engine.ddp import DDPEngine
from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import reference
from tests.dist.runs import build, digest, global_batch, join, make_config, train
from tests.proofs import plain_resnet20


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)


def engine_of(**values: Any) -> DDPEngine:
    config = make_config(1, device="cuda", **values)
    engine = build(config, join(config))
    assert isinstance(engine, DDPEngine)
    return engine


@contextmanager
def waiting_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("values", [
    {}, {"precision": "bf16"}, {"precision": "bf16", "cuda_graphs": True}, {"micro_batch": 8},
    {"optimizer": {"clip_norm": 1.0}}, {"ema": {"decay": 0.9}}], ids=str)
def test_a_step_never_waits_for_the_device(values: dict[str, Any]) -> None:
    engine = engine_of(**values)
    train(engine, 0, 5)  # allocate, choose algorithms, record
    batch = [t.cuda() for t in global_batch(engine.config, 5)]
    torch.cuda.synchronize()
    with waiting_refused():
        engine.train_step(*batch, 0.1)
    with pytest.raises(RuntimeError), waiting_refused():
        engine.read_window()  # the detector detects


def test_batches_travel_beside_the_step_and_arrive_whole() -> None:
    """Pinned host batches as the loader yields them: no wait, the bits of device batches."""
    digests = []
    for pinned in (False, True):
        engine = engine_of(precision="bf16")
        train(engine, 0, 3)
        batches = [[t.pin_memory() if pinned else t.cuda() for t in
                    global_batch(engine.config, step)] for step in range(3, 9)]
        torch.cuda.synchronize()
        with waiting_refused():
            for batch in batches:
                engine.train_step(*batch, 0.1)
        digests.append(digest(engine.state()))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_no_kernel_converts_a_layout(model: str) -> None:
    engine = engine_of(model={"name": model}, precision="bf16", augment={"size": 64})
    batch = [torch.randint(256, (32, 64, 64, 3), device="cuda").to(torch.uint8),
             *(t.cuda() for t in global_batch(engine.config, 0)[1:])]
    engine.train_step(*batch, 0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.train_step(*batch, 0.1)
    names = [event.key for event in profile.key_averages()]
    assert any("_apply_kernel" in name for name in names)
    assert not [name for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recorded_step_computes_the_bits_of_a_step(precision: str) -> None:
    digests = []
    for graphs in (False, True):
        engine = engine_of(precision=precision, cuda_graphs=graphs)
        train(engine, 0, 8)
        digests.append(digest(engine.state()))
    assert digests[0] == digests[1]


def test_recording_survives_a_loader_that_pins_memory_meanwhile() -> None:
    """As threads of the loader do: new sizes, so that the driver is asked each time."""
    done = threading.Event()
    pinned, failures = [], []

    def pin() -> None:
        size = 1 << 20
        try:
            while not done.is_set():
                pinned.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
                del pinned[:-4]
                size += 4096
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        digests = []
        for graphs in (False, True):
            for _ in range(5):  # as many chances for the race
                engine = engine_of(cuda_graphs=graphs)
                train(engine, 0, 6)
            digests.append(digest(engine.state()))
    finally:
        done.set()
        thread.join()
    assert not failures
    assert digests[0] == digests[1]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(64, 64, 112, 112), (64, 256, 56, 56), (64, 2048, 7, 7)],
                         ids=str)
def test_ghost_batch_norm_at_full_size(shape: tuple[int, ...], with_residual: bool) -> None:
    def draw() -> torch.Tensor:
        x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    inputs = [draw(), *(torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2))]
    inputs += [draw()] if with_residual else []
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found = kernels.ghost_batch_norm(*inputs[:3], 32, 1e-5, *inputs[3:], relu=True)[0]
    wanted = reference.ghost_batch_norm(*wide[:3], 32, 1e-5, *wide[3:], relu=True)[0]
    grad = torch.randn_like(found)
    pairs = [(found, wanted), *zip(torch.autograd.grad(found, inputs, grad),
                                   torch.autograd.grad(wanted, wide, grad.double()), strict=True)]
    for a, b in pairs:
        # An output that rounds across 0 moves one gradient wholly: compare sums of squares.
        assert (a.double() - b).norm() / b.norm() < 1e-2


def test_losses_of_the_fused_network_stay_within_bf16_noise_of_torch_s_own() -> None:
    engine = engine_of(precision="bf16", bn_batch=32, schedule={
        "name": "constant", "milestones": [], "warmup_steps": 0}, optimizer={"lr": 0.02})
    torch.manual_seed(engine.config.seed)
    peer = plain_model("resnet20", 10).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    ours, theirs = [], []
    for step in range(200):
        images, labels, keys = global_batch(engine.config, step)
        engine.train_step(images, labels, keys, 0.02)
        ours.append(engine.read_window()["loss"])
        x = ((images.cuda().permute(0, 3, 1, 2).float() / 255 - 0.45) * 4).contiguous(
            memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = peer(x)
        loss = F.cross_entropy(logits.float(), labels.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    for start in range(0, 200, 50):
        window = slice(start, start + 50)
        assert sum(ours[window]) == pytest.approx(sum(theirs[window]), rel=0.1)


def test_the_plain_loop_to_compare_with_trains_on_this_gpu() -> None:
    device = torch.device("cuda", 0)
    net = plain_resnet20.resnet(1).to(device)
    images = np.zeros((4, 32, 32, 3), np.float32)
    logits = plain_resnet20.logits_of(net, images, device)
    logits.sum().backward()
    assert logits.device == device
    assert plain_resnet20.test_error(net, images, np.zeros(4, np.int64), device) in (0.0, 100.0)
