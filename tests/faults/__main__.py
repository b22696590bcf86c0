"""`make faults`: make the 36 faults, one after the other, and print what followed.

    python -m tests.faults [--only 1,17,26] [--json PATH] [--scratch DIR]

Needs root and Debian's SLURM packages, for the faults of the cluster, and mount namespaces and a
writable memory cgroup. Exits with 1 where anything differs from what is expected.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.ground import Difference, Ground
from tests.faults.table import FAULTS, Fault
from tests.slurm.cluster import Cluster, why_not

console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", help="numbers, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--scratch", type=Path, help="work here, and leave it")
    asked = parser.parse_args()
    numbers = {int(word) for word in asked.only.split(",")} if asked.only else None
    chosen = [fault for fault in FAULTS if numbers is None or fault.number in numbers]
    os.umask(0o022)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended even then
    folder = (asked.scratch or Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    folder.mkdir(exist_ok=True)
    for run in (folder / "runs").glob("*"):
        if not run.name.startswith("undisturbed"):  # those of an earlier call serve again
            shutil.rmtree(run)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    ground = Ground(folder, cache(lambda: _up(cluster)))
    rows = []
    try:
        ground.undisturbed()  # so that no fault's time contains it
        for fault in chosen:
            rows.append(judge(fault, ground))
            console.print(f"{fault.number:>2}  {fault.what}: {rows[-1]['seen']}", highlight=False,
                          style=None if rows[-1]["as_expected"] else "red")
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        ground.close()
        cluster.script("down", "--purge")
    show(rows)
    if not asked.scratch:
        console.print(f"runs and logs: {folder}")
    return int(not all(row["as_expected"] for row in rows))


def _up(cluster: Cluster) -> Cluster:
    if reason := why_not():
        raise Difference(f"not made: {reason}")
    started = cluster.script("up")
    if started.returncode:
        raise Difference(f"the local SLURM did not start: {started.stderr}")
    return cluster


def judge(fault: Fault, ground: Ground) -> dict[str, Any]:
    """Make a fault; its row. Whatever goes wrong is a difference."""
    began, seen, problem = time.monotonic(), [], ""
    for make in fault.make:
        try:
            seen.append(make(ground))
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            if not isinstance(error, Difference):
                traceback.print_exc()
    row = {"number": fault.number, "fault": fault.what, "expected": fault.expected,
           "as_expected": not problem, "seen": "; ".join(each.text for each in seen),
           "instead": fault.instead, "seconds": round(time.monotonic() - began, 1)}
    if problem:
        row["seen"] = f"DIFFERS: {problem}"
    for key in ("redone", "recover_s", "notice_s", "start_s"):
        values = [getattr(each, key) for each in seen if getattr(each, key) is not None]
        row[key] = round(max(values), 2) if values else None
    return row


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "fault", "expected", "seen", "redone", "recovered, s", show_lines=True)
    for row in rows:
        told = row["seen"] + (f"\n[dim]{row['instead']}[/]" if row["instead"] else "")
        table.add_row(str(row["number"]), row["fault"], row["expected"], told,
                      *("" if row[key] is None else f"{row[key]:g}"
                        for key in ("redone", "recover_s")),
                      style=None if row["as_expected"] else "red")
    console.print(table)
    for key, what in (("notice_s", "to notice"), ("start_s", "from allocation to the first step"),
                      ("recover_s", "from the fault to the first step after it")):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            console.print(f"median {what}: {statistics.median(values):.2f} s of {len(values)}")
    differing = [str(row["number"]) for row in rows if not row["as_expected"]]
    console.print(f"{len(rows) - len(differing)} of {len(rows)} as expected"
                  + (f"; different: {', '.join(differing)}" if differing else ""))


if __name__ == "__main__":
    sys.exit(main())
