"""Every Triton kernel against its meaning in float64: forward and all gradients.

In Triton's interpreter where there is no GPU; compiled, with the same claims, where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import reference
from resnet_dist.models.build import build_model
from resnet_dist.models.catalog.names import MODELS, input_size

pytest.importorskip("triton", reason="triton is not installed; the test extra brings it")

from resnet_dist.kernels.gpu import average_pool, batch_norm, max_pool, normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NHWC = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: a unit in the last place, which the interpreter cuts off, and float32 sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, device=DEVICE).to(dtype)
    return (x.contiguous(memory_format=NHWC) if len(shape) == 4 else x).requires_grad_()


def close(found: Tensor, wanted: Tensor) -> bool:
    error = (found.double() - wanted).abs().max()
    return bool(error <= TOLERANCE[found.dtype] * wanted.abs().max())


def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def check(run: Callable[..., Sequence[Tensor]], meaning: Callable[..., Sequence[Tensor]],
          inputs: Sequence[Tensor]) -> None:
    """Outputs, and gradients of the first output by every input."""
    wide = exact(inputs)
    found, wanted = run(*inputs), meaning(*wide)
    for a, b in zip(found, wanted, strict=True):
        assert close(a.detach(), b.detach())
    grad = torch.randn_like(found[0]).contiguous(memory_format=NHWC if found[0].dim() == 4
                                                 else torch.contiguous_format)
    for a, b in zip(torch.autograd.grad(found[0], inputs, grad),
                    torch.autograd.grad(wanted[0], wide, grad.double()), strict=True):
        assert close(a, b)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "bn_batch"), [
    ((8, 6, 3, 5), 1), ((8, 6, 3, 5), 2), ((8, 6, 3, 5), 4), ((8, 6, 3, 5), 8),
    ((2, 1, 3, 1), 2), ((4, 70, 9, 7), 2), ((6, 24, 13, 11), 3), ((2, 129, 2, 3), 1),
    ((3, 64, 20, 19), 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ghost_batch_norm_is_its_meaning(dtype: torch.dtype, shape: tuple[int, ...], bn_batch: int,
                                         with_residual: bool, relu: bool) -> None:
    torch.manual_seed(sum(shape) + bn_batch)
    inputs = [draw(*shape, dtype=dtype), draw(shape[1]), draw(shape[1])]
    inputs += [draw(*shape, dtype=dtype)] if with_residual else []

    def by(room: object) -> Callable[..., Sequence[Tensor]]:
        return lambda x, w, b, r=None: room.ghost_batch_norm(  # type: ignore[attr-defined]
            x, w, b, bn_batch, 1e-5, r, relu)

    check(by(batch_norm), by(reference), inputs)


@pytest.mark.parametrize("together", [1, 4, 16])
def test_sums_of_many_programs_are_combined_piece_by_piece(
        together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 programs share the rows, as on a GPU with few groups; the last one has fewer rows."""
    monkeypatch.setattr(batch_norm, "PROGRAMS_PER_SM", 4096)
    monkeypatch.setattr(batch_norm, "TOGETHER", together)
    batch_norm._plan.cache_clear()
    torch.manual_seed(3)
    inputs = [draw(8, 8, 31, 33), draw(8), draw(8), draw(8, 8, 31, 33)]
    plan = batch_norm._plan(inputs[0].shape, 4, inputs[0].device, 8)
    assert (plan.splits, plan.SPLITS) == (32, min(together, 32))
    assert plan.rows % plan.per_program, "the last has fewer"

    def by(room: object) -> Callable[..., Sequence[Tensor]]:
        return lambda x, w, b, r: room.ghost_batch_norm(  # type: ignore[attr-defined]
            x, w, b, 8, 1e-5, r, True)

    try:
        check(by(batch_norm), by(reference), inputs)
    finally:
        batch_norm._plan.cache_clear()


@pytest.mark.parametrize("sms", [108, 132, 148])
def test_all_programs_of_a_launch_run_at_once(sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "COMPILED_FOR_SMS", sms)
    batch_norm._plan.cache_clear()
    for images, group in ((256, 32), (32, 32), (256, 256), (512, 32)):
        for channels, side in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7), (64, 56)):
            plan = batch_norm._plan(torch.Size((images, channels, side, side)), 2,
                                       torch.device("meta"), group)
            programs, slots = math.prod(plan.grid), batch_norm.PROGRAMS_PER_SM * sms
            assert programs <= slots or plan.splits == 1
            # With few groups there are enough all the same, where there are rows to share.
            tiles = -(-plan.rows // plan.ROWS) * plan.grid[1] * plan.groups
            assert programs >= min(slots, tiles) / 2
    batch_norm._plan.cache_clear()


@pytest.mark.parametrize("readers", ["both", "the other alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_readers_of_a_sum_hand_back_two_gradients(dtype: torch.dtype, readers: str) -> None:
    """With the bits of their sum."""
    torch.manual_seed(0)
    inputs = [draw(4, 24, 5, 3, dtype=dtype), draw(24), draw(24), draw(4, 24, 5, 3, dtype=dtype)]

    def gradients(both: Callable[[Tensor], Sequence[Tensor]],
                  given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias, residual = inputs
        y = batch_norm.ghost_batch_norm(x, weight, bias, 2, 1e-5, residual, True)[0]
        return torch.autograd.grad(both(y), inputs, given)

    # Whole numbers: the interpreter rounds their sums as everyone does.
    one, two = (torch.randint(-8, 9, (4, 24, 5, 3), device=DEVICE).to(dtype) for _ in range(2))
    if readers == "both":
        found = gradients(lambda y: (y, kernels.again(y)), (one, two))
        wanted = gradients(lambda y: (y,), (one + two,))
    else:
        found = gradients(lambda y: (kernels.again(y),), (two,))
        wanted = gradients(lambda y: (y,), (two,))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_ghost_batch_norm_keeps_its_digits_far_from_zero() -> None:
    """One pass over x - mean needs care: with sums of squares nothing would be left."""
    torch.manual_seed(0)
    x = draw(8, 8, 9, 9).detach() + 1000
    _, mean, var = batch_norm.ghost_batch_norm(x, torch.ones(8, device=DEVICE),
                                               torch.zeros(8, device=DEVICE), 4, 1e-5)
    groups = x.double().unflatten(0, (2, 4)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), groups.var(2), rtol=1e-3, atol=0)


def test_ghost_batch_norm_takes_any_layout_and_repeats_its_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 12, 6, 6, device=DEVICE)[:, ::2, 1::2].requires_grad_()
    weight, bias = draw(6), draw(6)

    def bits(x: Tensor) -> list[Tensor]:
        y, *statistics = batch_norm.ghost_batch_norm(x, weight, bias, 2, 1e-5, None, True)
        gradients = torch.autograd.grad(y.mean((2, 3)).square().sum(), (x, weight, bias))
        return [y, *statistics, *gradients]

    dense = x.detach().contiguous(memory_format=NHWC).requires_grad_()
    for a, b, c in zip(bits(x), bits(x), bits(dense), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("with_residual", [False, True])
def test_ghost_batch_norm_hands_on_what_is_no_number(with_residual: bool) -> None:
    x = draw(2, 8, 2, 2).detach()
    x[1, 3, 0, 1] = float("nan")
    residual = torch.zeros_like(x) if with_residual else None
    y, mean, _ = batch_norm.ghost_batch_norm(x, torch.ones(8, device=DEVICE),
                                             torch.zeros(8, device=DEVICE), 1, 1e-5, residual, True)
    bad = torch.isnan(y).flatten(2).all(2)
    assert bad.nonzero().tolist() == [[1, 3]]
    assert torch.isnan(mean).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_is_its_meaning(dtype: torch.dtype, window: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for shape in ((2, 5, 9, 7), (1, 70, 4, 5), (1, 3, 3, 3)):
        check(lambda x: [max_pool.max_pool(x, *window)],
              lambda x: [reference.max_pool(x, *window)], [draw(*shape, dtype=dtype)])


def test_max_pool_gives_the_gradient_to_the_first_of_equals() -> None:
    x = torch.zeros(1, 2, 5, 6, device=DEVICE, requires_grad=True)
    found = torch.autograd.grad(max_pool.max_pool(x, 3, 2, 1).sum(), x)[0]
    assert torch.equal(found, torch.autograd.grad(reference.max_pool(x, 3, 2, 1).sum(), x)[0])


def test_max_pool_hands_on_what_is_no_number_and_what_is_infinite() -> None:
    x = draw(1, 3, 6, 6).detach()
    x[0, 0, 2, 2], x[0, 1] = float("nan"), float("-inf")
    found = max_pool.max_pool(x, 3, 2, 1)
    torch.testing.assert_close(found, reference.max_pool(x, 3, 2, 1), equal_nan=True,
                               rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_pool_is_its_meaning(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((3, 5, 7, 7), (2, 130, 1, 3), (1, 64, 8, 8)):
        check(lambda x: [average_pool.average_pool(x)], lambda x: [reference.average_pool(x)],
              [draw(*shape, dtype=dtype)])


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_is_its_meaning(dtype: torch.dtype, varied: bool, per_pixel: bool) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (3, 5, 7, 3), device=DEVICE).to(torch.uint8)
    extent = (5, 7) if per_pixel else (1, 1)
    scale = torch.rand(1, 3, *extent, device=DEVICE) / 60
    shift = torch.randn(1, 3, *((1, 1) if varied else extent), device=DEVICE)
    flip = torch.tensor([True, False, True], device=DEVICE) if varied else None
    colour = draw(3, 3).detach() * 9 if varied else None
    found = normalize.normalize(images, scale, shift, dtype, flip, colour)
    wanted = reference.normalize(images, scale.double(), shift.double(), torch.float64, flip,
                                 None if colour is None else colour.double())
    assert found.is_contiguous(memory_format=NHWC)
    assert close(found, wanted)
    assert not found[:, 3].any()
    here = kernels.normalize(images, scale, shift, dtype)  # whatever this device's version is
    if not varied:
        assert close(here[:, :3], wanted[:, :3])


@pytest.mark.parametrize("name", [next(n for n in MODELS if MODELS[n].family == family)
                                  for family in ("resnet", "cifar", "preact", "vgg", "inception")])
def test_every_family_takes_padded_pixels(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=3).eval()
    side = max(75, input_size(name) // 3)
    x = torch.randn(2, 3, side, side)
    first = next(p for p in model.parameters() if p.dim() == 4)

    def outcome(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        logits = model(x)
        return logits, torch.autograd.grad(logits.square().sum(), first)[0]

    plain, padded = outcome(x), outcome(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)))
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.detach().abs().max()))
