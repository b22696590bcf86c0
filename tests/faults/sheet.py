"""The rows of the faults as a table: on a terminal, and as RESULTS.md has it."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

HEAD = ("", "fault", "expected", "seen", "redone iterations", "seconds to recover")
HUNG = {26}  # the rank is alive and silent
QUEUED = set(range(17, 26))  # SLURM gives the run another allocation, when it thinks fit
TIMES = (("notice_s", "to notice a dead rank", lambda number: number not in HUNG),
         ("notice_s", "to notice a hung rank", lambda number: number in HUNG),
         ("recover_s", "from the fault to the first step after it, in the same allocation",
          lambda number: number not in QUEUED),
         ("recover_s", "from the fault to the first step after it, through SLURM's queue",
          lambda number: number in QUEUED),
         ("start_s", "from SLURM's allocation to the first step", lambda number: True))


def cells(row: dict[str, Any]) -> list[str]:
    """One row; "-" where nothing was redone, or recovered, because the fault leaves nothing to."""
    told = row["seen"] + (f" ({row['instead']})" if row["instead"] else "")
    return [str(row["number"]), row["fault"], row["expected"], told,
            *("-" if row[key] is None else f"{row[key]:.{digits}f}"
              for key, digits in (("redone", 0), ("recover_s", 1)))]


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(*HEAD, show_lines=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in cells(row)),
                      style=None if row["as_expected"] else "red")
    console.print(table)
    for line in (*medians(rows), verdict(rows)):
        console.print(line, highlight=False)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *(cells(row) for row in rows)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in medians(rows)), "", verdict(rows), ""])


def medians(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each time; a row counts as often as it was made."""
    lines = []
    for key, what, counts in TIMES:
        values = [row[key] for row in rows if row[key] is not None and counts(row["number"])
                  and row["redone"] is not None]  # a run's, not a conversion's
        if values:
            lines.append(f"median {what}: {statistics.median(values):.2f} s of {len(values)} "
                         f"({min(values):.2f} to {max(values):.2f})")
    return lines


def verdict(rows: list[dict[str, Any]]) -> str:
    differing = [str(row["number"]) for row in rows if not row["as_expected"]]
    return (f"{len(rows) - len(differing)} of {len(rows)} as expected"
            + (f"; different: {', '.join(differing)}" if differing else ""))
