"""`precision=auto`: what the device has, and for a run what it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.config.load import config_from_dict
from resnet_dist.engine import precision
from resnet_dist.engine.precision import autocast_dtype, cpu_has_bf16, settled
from resnet_dist.ranks.distributed import World

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)


def config(value: str) -> Any:
    return config_from_dict({"name": "test", "precision": value})


@pytest.mark.parametrize(("line", "has"), [
    ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
    ("flags\t\t: fpu amx_bf16 amx_tile", True),
    ("Features\t: fp asimd bf16 i8mm", True),
    ("flags\t\t: fpu avx avx2 fma", False),
    ("flags\t\t: fpu avx512f avx512vnni", False),
    ("model name\t: bf16", False),
])
def test_a_cpu_is_asked_for_its_instructions(line: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert cpu_has_bf16(tmp_path / "cpuinfo") is has


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_bf16_only_where_the_cpu_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    assert settled(config("auto"), WORLD, None).precision == ("bf16" if has else "fp32")
    assert autocast_dtype(config("auto"), CPU) == (torch.bfloat16 if has else None)


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
@pytest.mark.parametrize("has", [True, False])
def test_a_run_keeps_what_it_began_with_on_another_node(
        begun: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    assert settled(config("auto"), WORLD, {"config": {"precision": begun}}).precision == begun


def test_what_was_asked_for_is_computed_and_a_slow_choice_is_told(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert settled(config("bf16"), WORLD, None).precision == "bf16"
    assert "precision=fp32" in caplog.text
    caplog.clear()
    assert settled(config("fp32"), WORLD, None).precision == "fp32"
    assert not caplog.text
