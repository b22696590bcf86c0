"""`resnet-dist bench`: measurements side by side with what a user would pick instead, as tables.

Each benchmark alternates its competitors in one run and reports medians, because machines drift.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.bench import CASES, bench_convert, summary
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import load_manifest


def convert_beside_ffcv(console: Console, source: str, scratch: Path | None, *, images: int,
                        workers: int, repeats: int, case: str | None, as_json: bool) -> None:
    """Conversion against FFCV's DatasetWriter. Raises: ConfigError, ConvertError."""
    if case is not None and case not in CASES:
        raise ConfigError(f"--case = {case}: pick one of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
        rows = bench_convert(source, scratch or Path(temporary), images=images, workers=workers,
                             repeats=repeats, cases=(case,) if case else CASES, progress=_tell)
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    _show(console, f"conversion of {images:,} images, {workers} workers",
          {"case": "{case}", "system": "{system}", "images/s": "{images_per_s:,.0f}",
           "slowest to fastest": "{slowest:,.0f} to {fastest:,.0f}", "times FFCV": "{ratio:.2f}",
           "CPU ms/image": "{cpu_ms_an_image:.2f}", "peak MB": "{peak_mb:,.0f}"}, summary(rows))


def loaders_side_by_side(console: Console, dataset: Path, arguments: list[str], *,
                         as_json: bool) -> None:
    """Ours, stock FFCV and a Pillow folder loader, in a process of their own that may use torch.

    Raises: ConfigError where `dataset` is none.
    """
    load_manifest(dataset)
    result = _measured("loader", [str(dataset), *arguments], as_json)
    _show(console, "{size} px, {threads} threads, rounds of {images:,} images".format(**result),
          {"loader": "{name}", "images/s": "{rate:,.0f}",
           "slowest to fastest": "{low:,.0f} to {high:,.0f}", "ours is": "{times}",
           "CPU ms/image": "{cpu_ms:.2f}"},
          [{"name": name, "rate": median, "low": min(result["rates"][name]),
            "high": max(result["rates"][name]), "cpu_ms": result["cpu_ms"][name],
            "times": _times(result["speedup"].get(name))}
           for name, median in result["median"].items()])
    error = result["error"]
    console.print(f"mean error to a float64 area resize, grey levels: ours {error['ours']:.3f}, "
                  f"FFCV {error['ffcv']:.3f}")


def step_beside_torch(console: Console, arguments: list[str], *, as_json: bool) -> None:
    """The training step against the same network in torch's own modules."""
    result = _measured("step", arguments, as_json)
    _show(console, "{model}, batch {batch}, {size} px, {precision}, {device}, {rounds} rounds"
          .format(**result),
          {"step": "{name}", "images/s": "{images_per_s[median]:,.1f}",
           "slowest to fastest": "{images_per_s[low]:,.1f} to {images_per_s[high]:,.1f}",
           "ours is": "{times}", "CPU ms/image": "{cpu_ms_an_image[median]:.2f}",
           "peak MB": "{peak_mb[median]:,.0f}"},
          [{**numbers, "name": name, "times": _times(result["ours_is"].get(name))}
           for name, numbers in result["competitors"].items()])
    for level, floor in result["levels"].items():
        console.print(f"{level} kernels move {floor['bytes'] / 1e9:.2f} GB and compute "
                      f"{floor['flops'] / 1e12:.3f} TFLOP a step: at most "
                      f"{floor['images_per_s']:,.1f} images/s here; ours reaches "
                      f"{100 * floor['ours']:.0f}%", highlight=False)
    console.print(f"measured here: copies {result['bytes_per_s'] / 1e9:,.1f} GB/s, products "
                  f"{result['flops_per_s'] / 1e12:,.2f} TFLOP/s", highlight=False)


def step_account(console: Console, arguments: list[str], *, as_json: bool) -> None:
    """Launches, bytes and milliseconds of a step by kind, ours and torch's; nothing is measured.

    Raises: ConfigError where Triton, whose launches are counted, is missing.
    """
    _needs_triton("--account")
    result = _measured("account", arguments, as_json)
    table = Table("kind", *(f"{who}, {what}" for who in result["steps"]
                            for what in ("launches", "GB", "ms")),
                  title=f"a step of {result['model']}, batch {result['batch']}, "
                        f"{result['size']} px, {result['precision']}, counted: "
                        f"{result['bytes_per_s'] / 1e12:g} TB/s, "
                        f"{result['flops_per_s'] / 1e12:g} TFLOP/s, "
                        f"a launch at least {result['launch_us']:g} us")
    kinds = sorted({kind for rows in result["steps"].values() for kind in rows} - {"all"})
    for kind in (*kinds, "all"):
        row = [rows.get(kind, {"launches": 0, "bytes": 0, "s": 0})
               for rows in result["steps"].values()]
        table.add_row(kind, *(text for each in row for text in (
            f"{each['launches']:.0f}", f"{each['bytes'] / 1e9:.2f}", f"{1e3 * each['s']:.2f}")))
    console.print(table)


def kernels_beside_torch(console: Console, arguments: list[str], *, as_json: bool) -> None:
    """Each kernel against its plain formulation."""
    result = _measured("kernels", arguments, as_json)
    others = list(result["rows"][0]["ours_is"])
    _show(console, "forward and backward, batch {batch} in groups of {bn_batch}, {precision}, "
          "{device}".format(**result),
          {"kernel": "{kernel}", "shape": "{shape}",
           **{f"{name}, ms": f"{{ms[{name}]:.2f}}" for name in ("ours", *others)},
           **{f"times {name}": f"{{ours_is[{name}]:.2f}}" for name in others},
           "GB/s": "{gb_per_s:,.1f}", "of a copy": "{of_copy:.0%}"},
          [{**row, "gb_per_s": row["bytes_per_s"] / 1e9} for row in result["rows"]])


def kernels_compiled(console: Console, *, as_json: bool) -> None:
    """What every kernel's machine code needs, by architecture; exits with 1 where that is too much.

    Raises: ConfigError where there is no compiler.
    """
    _needs_triton("--compile-only")
    result = _measured("compiled", [], as_json)
    by_kernel: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_kernel.setdefault((row["kernel"], row["variant"], row["dtype"]), []).append(row)
    architectures = sorted({row["architecture"] for row in result["rows"]})
    table = Table("kernel", "variant", "dtype", "registers", "allowed", "spilled", "shared",
                  "instructions", "loads", "stores",
                  title=f"Triton {result['triton']}, compiled for "
                        f"{', '.join(f'sm_{number}' for number in architectures)}; loads and "
                        "stores: how many of how many bits")
    for names, rows in by_kernel.items():
        registers, *each = ("/".join(str(row[key]) for row in rows)
                            for key in ("registers", "stack", "shared", "instructions"))
        widths = [", ".join(f"{count} of {bits}" for bits, count in rows[-1][key].items())
                  for key in ("loads", "stores")]
        table.add_row(*names, registers, str(rows[0]["allowed"]), *each, *widths,
                      style=None if all(row["fits"] for row in rows) else "red")
    console.print(table)
    bad = sum(not row["fits"] for row in result["rows"])
    if bad:
        sys.exit(f"{bad} of {len(result['rows'])} spill, or take more registers than is allowed "
                 "beside the kernel")


def scaling_here(console: Console, arguments: list[str], *, planned: bool, as_json: bool) -> None:
    """Measured scaling on this machine's ranks; `planned`: ResNet-50 on many GPUs instead."""
    result = _measured("scaling", arguments, as_json)
    if planned:
        return _show_plan(console, result)
    _show(console, "{model}, {size} px, ranks of one thread on {cores} cores".format(**result),
          {"scaling": "{scaling}", "ranks": "{ranks}", "images a rank": "{images}",
           "step, s": "{step_s:,.3f}", "slowest to fastest": "{spread[1]:,.3f} to {spread[0]:,.3f}",
           "images/s": "{images_per_s:,.0f}", "model, s": "{model_s:,.3f}",
           "error": "{error:+.0%}", "fitted": "{seen}"},
          sorted(result["points"], key=lambda row: (row["scaling"], row["ranks"])))


def _show_plan(console: Console, result: dict[str, Any]) -> None:
    names = {"strong": "batch 256 on all GPUs together", "weak": "32 images a GPU",
             "weak_256": "256 images a GPU"}
    for key, name in names.items():
        table = Table(title=f"ResNet-50, 153.6 million images, {name}: planned, not measured",
                      box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in ("GPUs", "batch", "bn_\nbatch", "step\nms", "1,000\nimg/s", "eff.",
                        "hours", "cores\n/GPU", "GB/s", "saves\nevery", "faults\na run",
                        "min\neach"):
            table.add_column(heading, justify="right", no_wrap=True)  # 12 columns fit in 80
        for row in result[key]:
            table.add_row(f"{row['gpus']:,}", f"{row['batch_size']:,}", str(row["bn_batch"]),
                          f"{row['step_ms']:.2f}", f"{row['images_per_s'] / 1e3:,.1f}",
                          f"{100 * row['efficiency']:.0f}%", f"{row['hours']:.3f}",
                          f"{row['loader_cores_a_gpu']:.2f}",
                          f"{row['data_bytes_per_s'] / 1e9:,.1f}",
                          f"{row['checkpoint_every_s']:.0f} s", f"{row['failures']:.4f}",
                          f"{row['lost_minutes_a_failure']:.1f}")
        console.print(table, "")
    console.print(f"a batch of 256 stops scaling at {result['batch_stops_scaling_at']} GPUs: twice "
                  "as many are less than 1.5 times as fast")


def saves_side_by_side(console: Console, scratch: Path | None, arguments: list[str], *,
                       as_json: bool) -> None:
    """Checkpoints in the background against checkpoints that the step waits for."""
    with tempfile.TemporaryDirectory(prefix="bench-save-", dir=scratch) as folder:
        found = _measured("save", [folder, *arguments], as_json)
    _show(console, "{model}, checkpoints of {mb:.0f} MB, a step takes {step_s:.2f} s, medians of "
          "{rounds}".format(**found),
          {"a save that is": "{way}", "the step waits, s": "{stall_s:.3f}",
           "taken from training, s": "{lost_s:.2f}", "of a minute": "{share:.2%}"},
          [{**found[way], "way": way, "share": found[way]["lost_s"] / 60}
           for way in ("synchronous", "asynchronous")])


def _show(console: Console, title: str, columns: dict[str, str],
          rows: Iterable[dict[str, Any]]) -> None:
    """A table: each column's heading, and the format of what a row has for it."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(text.format(**row) for text in columns.values()))
    console.print(table)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _needs_triton(option: str) -> None:
    if find_spec("triton") is None:
        raise ConfigError(f"{option}: Triton, whose kernels are looked at, is not installed; "
                          "`pip install triton`, or the extra `test`, brings it")


def _measured(what: str, arguments: list[str], as_json: bool) -> dict[str, Any]:
    """What `resnet_dist.bench.WHAT` found, in a process that may use torch.

    Exits with that process's code where it fails, and with 0 where JSON was all that was wanted.
    """
    done = subprocess.run([sys.executable, "-m", f"resnet_dist.bench.{what}", *arguments],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode or as_json:
        sys.stdout.write(done.stdout)
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
