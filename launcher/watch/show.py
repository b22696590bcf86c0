"""`resnet-dist status` on the terminal: a table of runs, one run's history, JSON for scripts."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.watch.status import RunStatus, find_runs, statuses

_REFRESH_S = 2.0
_SILENT_S = 60.0


def show_status(console: Console, run: str | None, runs: Path, *, watch: bool,
                as_json: bool) -> int:
    """Print one run in detail or a table of all. Returns the exit code: 1 where the run failed."""
    def current() -> tuple[list[RunStatus], str]:
        if run is None:
            return statuses(find_runs(runs))
        from launcher.frozen.freeze import find_run  # it imports much that a table does without

        return statuses([find_run(run, str(runs))])

    found, note = current()
    if as_json:
        # One object a run, so that a script reads lines.
        for status in found:
            history = {"events": list(status.events)} if run is not None else {}
            console.file.write(json.dumps(status.as_json() | history) + "\n")
    elif not found:
        console.print("no runs yet; `resnet-dist submit CONFIG` makes one")
    elif watch:
        found = _watch(console, current)
    else:
        console.print(_show(console, found, note))
    if run is not None and not as_json:
        _print_history(console, found[0])
    return int(run is not None and found[0].state == "failed")


def _watch(console: Console, current: Any) -> list[RunStatus]:
    """Refresh until every run and what was queued behind it is over, or until Ctrl-C.

    Of evaluations SLURM alone knows whether they are still to come: when it has been silent for
    `_SILENT_S`, nobody waits for them any longer.
    """
    found, note = current()
    heard = time.monotonic()
    try:
        with Live(_show(console, found, note), console=console, auto_refresh=False) as live:
            while not all(status.over for status in found) or (
                    any(status.evaluations for status in found)
                    and time.monotonic() < heard + _SILENT_S):
                time.sleep(_REFRESH_S)
                found, note = current()
                heard = heard if note else time.monotonic()
                live.update(_show(console, found, note), refresh=True)
    except KeyboardInterrupt:
        pass
    return found


_COLOURS = {"running": "green", "finished": "bold green", "failed": "bold red", "pending": "yellow",
            "requeued": "yellow", "stopped": "blue"}


def _table(found: list[RunStatus], width: int) -> Table:
    """Columns by importance: those at the end of the list go first where the terminal is narrow."""
    wanted = ["run", "state", "step", "top-1", "restarts", "images/s", "ETA", "loss", "nodes",
              "checkpoint", "job"]
    rows = [_row(status) for status in found]
    widths = {name: 3 + max(len(name), *(len(row[name]) for row in rows)) for name in wanted}
    while len(wanted) > 4 and sum(widths[name] for name in wanted) >= width:
        wanted.pop()
    table = Table()
    for name in wanted:
        table.add_column(name, no_wrap=name != "run", overflow="fold",
                         justify="left" if name in ("run", "state", "job") else "right")
    lines = [[Text(row[name], _COLOURS[row[name]] if name == "state" else "") for name in wanted]
             for row in rows]
    if sum(widths[name] for name in wanted) < width:
        # Nothing is folded, so a column can be one cell: rich takes a second for 500 rows of cells.
        lines = [[Text("\n").join(cells) for cells in zip(*lines, strict=True)]]
    for line in lines:
        table.add_row(*line)
    return table


def _row(status: RunStatus) -> dict[str, str]:
    checkpoint = "-"
    if status.checkpoint_step is not None and status.checkpoint_age_s is not None:
        checkpoint = f"{status.checkpoint_step:,}, {duration(status.checkpoint_age_s)} ago"
    nodes = str(status.nodes or "-")
    if status.ranks and status.nodes:
        nodes += f" x {status.ranks // status.nodes}"  # ranks on each
    return {"run": status.name, "state": status.state, "job": status.job or "-", "nodes": nodes,
            "step": f"{status.step:,} / {status.steps:,}", "loss": _number(status.loss, ".3f"),
            "top-1": _number(status.top1, ".2f"), "images/s": _number(status.images_per_s, ",.0f"),
            "ETA": "-" if status.eta_s is None else duration(status.eta_s),
            "checkpoint": checkpoint, "restarts": str(status.restarts)}


def _show(console: Console, found: list[RunStatus], note: str) -> Group:
    """The table, and below it what needs words: causes, and silence of SLURM."""
    causes = [Text(f"{status.name}: {status.cause}", style="red" if status.state == "failed"
                   else "yellow") for status in found if status.cause]
    return Group(_table(found, console.width), *causes, *([Text(note, "yellow")] if note else []))


def _print_history(console: Console, status: RunStatus) -> None:
    for event in status.events:
        facts = ", ".join(f"{key} {','.join(map(str, value)) if isinstance(value, list) else value}"
                          for key, value in event.items()
                          if key not in ("time", "event", "boot", "began", "pids", "port")
                          and value not in ("", [], None))
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        console.print(f"{moment}  {event['event']:<10} {facts}", markup=False, highlight=False,
                      soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """`95` -> `1m35s`; two units are enough."""
    seconds = int(seconds)
    units = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    for (size, unit), (less, smaller) in pairwise(units):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // less:02d}{smaller}"
    return f"{seconds}s"
