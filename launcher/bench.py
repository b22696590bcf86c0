"""`resnet-dist bench`: measurements side by side with what a user would pick instead, as tables.

Each benchmark alternates its competitors in one run and reports medians, because machines drift.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.bench import bench_convert, summary
from resnet_dist.data.manifest import load_manifest


def convert_beside_ffcv(console: Console, source: str, scratch: Path | None, *, images: int,
                        workers: int, repeats: int, as_json: bool) -> None:
    """Conversion against FFCV's DatasetWriter. Raises: ConfigError, ConvertError."""
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
        rows = bench_convert(source, scratch or Path(temporary), images=images, workers=workers,
                             repeats=repeats, progress=_tell)
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    table = Table("case", "system", "images/s", "slowest to fastest", "times FFCV", "CPU ms/image",
                  "peak MB", title=f"conversion of {images:,} images, {workers} workers")
    for row in summary(rows):
        table.add_row(row["case"], row["system"], f"{row['images_per_s']:,.0f}",
                      f"{row['slowest']:,.0f} to {row['fastest']:,.0f}", f"{row['ratio']:.2f}",
                      f"{row['cpu_ms_an_image']:.2f}", f"{row['peak_mb']:,.0f}")
    console.print(table)


def loaders_side_by_side(console: Console, dataset: Path, *, size: int, threads: int, rounds: int,
                         images: int, sheet: Path | None, as_json: bool) -> None:
    """Ours, stock FFCV and a Pillow folder loader, in a process of their own that may use torch.

    Raises: ConfigError where `dataset` is none.
    """
    load_manifest(dataset)
    command = [sys.executable, "-m", "resnet_dist.data.bench", str(dataset), "--size", str(size),
               "--threads", str(threads), "--rounds", str(rounds), "--images", str(images)]
    done = subprocess.run(command + ([] if sheet is None else ["--sheet", str(sheet)]),
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    if as_json:
        sys.stdout.write(done.stdout)
        return
    result: dict[str, Any] = json.loads(done.stdout)
    table = Table("loader", "images/s", "slowest to fastest", "ours is", "CPU ms/image",
                  title=f"{size} px, {threads} threads, {rounds} rounds of {images:,} images")
    for name, median in result["median"].items():
        rates = result["rates"][name]
        times = result["speedup"].get(name)
        table.add_row(name, f"{median:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}",
                      "" if times is None else f"{times:.2f}x", f"{result['cpu_ms'][name]:.2f}")
    console.print(table)
    error = result["error"]
    console.print(f"mean error to a float64 area resize, grey levels: ours {error['ours']:.3f}, "
                  f"FFCV {error['ffcv']:.3f}")


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
