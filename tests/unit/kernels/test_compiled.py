"""What Triton's interpreter lets pass and its compiler does not: every kernel is compiled, here.

The compiler wants kernels that are not interpreted, and so a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from launcher import bench

pytest.importorskip("triton", reason="triton is not installed; the test extra brings it")


def compiled(*pairs: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "resnet_dist.bench.compiled", *pairs],
                          env=environment, capture_output=True, text=True)


def check(*pairs: str) -> list[dict[str, object]]:
    done = compiled(*pairs)
    assert done.returncode == 0, done.stderr
    assert "TRITON_DEFAULT_FP_FUSION" not in done.stderr  # every launch says what it wants
    rows: list[dict[str, object]] = json.loads(done.stdout)["rows"]
    assert not [f"{row['kernel']} [{row['variant']}] in {row['dtype']} for sm_{row['architecture']}"
                f": {row['registers']} registers of {row['allowed']}, {row['stack']} bytes spilled"
                for row in rows if not row["fits"]]
    return rows


def test_every_kernel_compiles_into_its_registers() -> None:
    """Each dtype on one architecture and each architecture with one dtype."""
    rows = check("bf16:90", "fp16:100", "fp32:80")
    assert len(rows) > 60
    # Whole vectors: what no odd width prevents is loaded 128 bits at a time.
    for row in rows:
        if "batch_norm" in str(row["kernel"]) and "odd" not in str(row["variant"]):
            assert "128" in row["loads"]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture() -> None:
    check()


def test_the_table_shows_what_spills_and_fails(monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kernel": "a._kernel", "variant": "RELU=1", "dtype": "bf16", "architecture": 80,
           "registers": 40, "allowed": 64, "stack": 0, "shared": 0, "instructions": 500,
           "loads": {"128": 4, "32": 2}, "stores": {"16": 1}, "fits": True}
    rows = [row, {**row, "architecture": 90, "registers": 255, "stack": 48, "fits": False}]
    monkeypatch.setattr(bench, "_measured", lambda *_: {"triton": "3", "rows": rows[:1]})
    bench.kernels_compiled(Console(width=160), as_json=False)
    assert "4 of 128, 2 of 32" in capsys.readouterr().out
    monkeypatch.setattr(bench, "_measured", lambda *_: {"triton": "3", "rows": rows})
    with pytest.raises(SystemExit, match="1 of 2 spill"):
        bench.kernels_compiled(Console(width=160), as_json=False)
    assert "40/255" in capsys.readouterr().out
