"""The compiled CPU loops of ghost BatchNorm against its meaning in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import native_batch_norm, reference

NHWC = torch.channels_last
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.skipif(native_batch_norm.library() is None,
                                reason="the loops are not built: pip install -e .")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    return (x.contiguous(memory_format=NHWC) if len(shape) == 4 else x).requires_grad_()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "bn_batch"), [
    ((8, 16, 3, 5), 1), ((8, 16, 3, 5), 4), ((8, 48, 1, 1), 8), ((4, 64, 17, 13), 2),
    ((2, 528, 5, 3), 2), ((6, 32, 31, 29), 3)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_loops_are_the_meaning(dtype: torch.dtype, shape: tuple[int, ...], bn_batch: int,
                                   with_residual: bool, relu: bool) -> None:
    torch.manual_seed(sum(shape) + bn_batch)
    inputs = [draw(*shape, dtype=dtype), draw(shape[1]), draw(shape[1])]
    inputs += [draw(*shape, dtype=dtype)] if with_residual else []
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert native_batch_norm.suits(inputs[0], inputs[1], inputs[3] if with_residual else None)

    def outcome(room: object, x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> list:
        return list(room.ghost_batch_norm(x, w, b, bn_batch, 1e-5, r, relu))  # type: ignore

    found, wanted = outcome(native_batch_norm, *inputs), outcome(reference, *wide)
    grad = torch.randn_like(found[0])
    found += torch.autograd.grad(found[0], inputs, grad)
    wanted += torch.autograd.grad(wanted[0], wide, grad.double())
    for a, b in zip(found, wanted, strict=True):
        error = (a.double() - b).abs().max()
        assert error <= TOLERANCE[a.dtype] * max(1.0, float(b.detach().abs().max()))


def bits(x: Tensor, residual: Tensor, bn_batch: int) -> list[Tensor]:
    weight, bias = (torch.linspace(-1, 2, x.shape[1]).requires_grad_() for _ in range(2))
    y, mean, var = kernels.ghost_batch_norm(x, weight, bias, bn_batch, 1e-5, residual, True)
    gradients = torch.autograd.grad(y, (x, residual), torch.ones_like(y) * 0.37)
    return [y, *gradients, mean, var]


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    torch.manual_seed(0)
    x, residual = (draw(8, 32, 23, 19, dtype=torch.bfloat16) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bits(x, residual, 4)
        torch.set_num_threads(3)
        for a, b in zip(alone, bits(x, residual, 4), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    half = [t.detach()[4:].requires_grad_() for t in (x, residual)]
    for a, b in zip(alone[:3], bits(*half, 4)[:3], strict=True):
        assert torch.equal(a[4:], b)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_level_of_the_processor_computes_the_meaning(dtype: torch.dtype) -> None:
    """Code for 128, 256 and 512 bits; the wider two to the same bit."""
    loops = native_batch_norm.library()
    assert loops is not None
    torch.manual_seed(3)
    x, residual = (draw(6, 48, 13, 7, dtype=dtype) for _ in range(2))
    best = loops.batch_norm_level(4)
    try:
        found = {number: bits(x, residual, 3)
                 for number in (1, 3, 4) if loops.batch_norm_level(number) == number}
    finally:
        loops.batch_norm_level(4)
    assert set(found) == {1, best} | ({3} if best == 4 else set())
    wide = [t.detach().double().requires_grad_() for t in (x, residual)]
    weight, bias = (torch.linspace(-1, 2, 48).double() for _ in range(2))
    y, _, _ = reference.ghost_batch_norm(wide[0], weight, bias, 3, 1e-5, wide[1], True)
    wanted = [y, *torch.autograd.grad(y, wide, torch.ones_like(y) * 0.37)]
    for outcome in found.values():
        for a, b in zip(outcome, wanted, strict=False):
            error, largest = (a.detach() - b).abs().max(), float(b.detach().abs().max())
            assert error <= 2 * TOLERANCE[dtype] * max(1.0, largest)
    for a, b in zip(found[best], found[3] if best >= 3 else found[best], strict=True):
        assert torch.equal(a, b)


def test_statistics_keep_their_digits_far_from_zero() -> None:
    torch.manual_seed(0)
    x = draw(8, 16, 19, 9).detach() + 1000
    _, mean, var = kernels.ghost_batch_norm(x, torch.ones(16), torch.zeros(16), 4, 1e-5)
    groups = x.double().unflatten(0, (2, 4)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), groups.var(2), rtol=1e-3, atol=0)


def test_what_is_no_number_is_handed_on() -> None:
    x = draw(2, 16, 4, 4, dtype=torch.bfloat16).detach()
    x[1, 3, 0, 1] = float("nan")
    y, _, _ = kernels.ghost_batch_norm(x, torch.ones(16), torch.zeros(16), 1, 1e-5,
                                       torch.zeros_like(x), True)
    assert torch.isnan(y).flatten(2).any(2).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("case", ["channels", "layout", "dtype"])
def test_what_does_not_suit_is_left_to_the_library(case: str) -> None:
    x = torch.randn(4, 15 if case == "channels" else 16, 4, 4)
    x = x.contiguous(memory_format=torch.contiguous_format if case == "layout" else NHWC)
    x = x.double() if case == "dtype" else x
    ones = torch.ones(x.shape[1], dtype=x.dtype)
    assert not native_batch_norm.suits(x, ones, None)
    y = kernels.ghost_batch_norm(x, ones, ones, 2, 1e-5)[0]
    torch.testing.assert_close(y, reference.ghost_batch_norm(x, ones, ones, 2, 1e-5)[0])


def test_loops_and_torch_share_one_set_of_threads() -> None:
    """Two OpenMP runtimes in a process would run twice the threads."""
    # In a process of its own: other tests load scikit-learn, which brings a runtime along.
    script = ("from pathlib import Path; from resnet_dist.kernels import native_batch_norm;"
              "assert native_batch_norm.library() is not None;"
              "maps = Path('/proc/self/maps').read_text().splitlines();"
              "print(*{line.split()[-1] for line in maps"
              " if 'libgomp' in line or 'libiomp' in line}, sep=chr(10))")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           check=True)
    assert len(found.stdout.split()) == 1, found.stdout
