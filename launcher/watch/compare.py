"""`resnet-dist compare`: runs side by side: settings that differ, where they stand, their curves.

Reads config.yaml and metrics.jsonl alone. The first run is what the others are compared with.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import plotext
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.watch.status import run_status
from resnet_dist.config.explain import nearest
from resnet_dist.config.load import config_to_dict, flat, load_frozen
from resnet_dist.config.schema import ConfigError
from resnet_dist.run.curves import read_lines
from resnet_dist.run.paths import RunPaths

_OWN = ("name", "runs")  # differ between any two runs
Curve = list[tuple[int, float]]


def compare_runs(console: Console, runs: list[RunPaths], curve: str, png: Path | None, *,
                 as_json: bool) -> None:
    """Print what differs.

    Args:
        curve: a figure of metrics.jsonl, drawn of training and of validation where both have it.
        png: also draw the curves to this file.

    Raises: ConfigError where fewer than two runs are named, or no run has such a curve.
    """
    if len({run.root for run in runs}) < len(runs):
        raise ConfigError(f"RUN = {', '.join(run.name for run in runs)}: name different runs")
    settings = differing([flat(config_to_dict(load_frozen(run.config))) for run in runs])
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.root) for run in runs]
    standing = [_standing(run) for run in runs]
    drawn = {kind: [curve_of(run, kind, curve) for run in runs] for kind in ("train", "val")}
    if not any(any(curves) for curves in drawn.values()):
        known = sorted({key for run in runs for line in read_lines(run.metrics)
                        if line["kind"] != "event" for key in line} - {"step", "kind", "time"})
        if known:
            raise ConfigError(f"--curve = {curve}: no such figure{nearest(curve, known)}")
    if png is not None:
        _draw_png(png, labels, drawn, curve)
    if as_json:
        console.file.write(json.dumps({
            "runs": labels, "settings": settings, "standing": standing,
            "curve": curve, **{kind: dict(zip(labels, curves, strict=True))
                               for kind, curves in drawn.items()}}) + "\n")
        return
    console.print(_table("settings that differ", labels, settings) if settings
                  else "all settings are equal")
    console.print(_table("where they stand", labels, {
        key: [each[key] for each in standing] for key in standing[0]}))
    for kind, curves in drawn.items():
        if any(curves):
            console.print(_terminal(labels, curves, f"{kind} {curve}", console))
    if png is not None:
        console.print(f"curves  {png}")


def differing(trees: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Of every key that is not the same in all: its values, None where a tree has none."""
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in _OWN)
    values = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: each for key, each in values.items() if any(one != each[0] for one in each)}


def curve_of(run: RunPaths, kind: str, key: str) -> Curve:
    return [(line["step"], line[key]) for line in read_lines(run.metrics, kind)
            if isinstance(line.get(key), int | float)]


def _standing(run: RunPaths) -> dict[str, Any]:
    """The figures that people compare first."""
    status, top1 = run_status(run), curve_of(run, "val", "top1")
    rates = [rate for _, rate in curve_of(run, "train", "images_per_s")]
    best = max(top1, key=lambda point: point[1], default=None)
    return {"state": status.state, "step": status.step, "steps": status.steps,
            "loss": status.loss, "last top-1": status.top1,
            "best top-1": best and best[1], "at step": best and best[0],
            "images/s, median": sorted(rates)[len(rates) // 2] if rates else None,
            "restarts": status.restarts}


def _table(title: str, labels: list[str], rows: dict[str, list[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", *labels):
        table.add_column(name, overflow="fold")
    for key, values in rows.items():
        first = values[0]
        table.add_row(key, *(Text(_shown(value), style="" if value == first else "yellow")
                             for value in values))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def _terminal(labels: list[str], curves: list[Curve], title: str, console: Console) -> Text:
    """The curves in characters, in the terminal's width."""
    plotext.clear_figure()
    plotext.theme("pro" if console.is_terminal else "clear")
    plotext.plotsize(min(console.width, 100), 18)
    plotext.title(title)
    for label, curve, marker in zip(labels, curves, cycle("ox+*#@"), strict=False):
        if curve:
            steps, values = zip(*curve, strict=True)
            plotext.plot(list(steps), list(values), label=label,
                         **({} if console.is_terminal else {"marker": marker}))
    plotext.xlabel("step")
    return Text.from_ansi(plotext.build())


def _draw_png(path: Path, labels: list[str], drawn: dict[str, list[Curve]], curve: str) -> None:
    from matplotlib.figure import Figure  # its import takes longer than everything else here

    kinds = [kind for kind, curves in drawn.items() if any(curves)]
    figure = Figure(figsize=(6.0 * max(1, len(kinds)), 4.0), layout="constrained")
    for axes, kind in zip(figure.subplots(1, max(1, len(kinds)), squeeze=False)[0], kinds,
                          strict=False):
        for label, points in zip(labels, drawn[kind], strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), label=label, lw=1.2,
                          marker="o" if len(points) < 30 else None, ms=3)
        axes.set(xlabel="step", ylabel=f"{kind} {curve}")
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png = {path}: cannot be written ({error})") from None
