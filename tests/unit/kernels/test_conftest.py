"""Where the kernels' tests run: on the GPU that torch sees, or else in Triton's interpreter."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.conftest import a_gpu_computes


@pytest.mark.parametrize(("driver", "seen", "computes"), [
    (True, True, True), (True, False, False), (False, True, False)])
def test_a_gpu_computes_where_torch_sees_one(driver: bool, seen: bool, computes: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError("no such file")

    def no_path(path: Path) -> bool:
        raise AssertionError(f"{path} was asked for")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(Path, "exists", no_path)
    assert a_gpu_computes() == computes
