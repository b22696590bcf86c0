"""`resnet-dist logs`: what all ranks said, merged by time, and only what was asked for.

An entry is a stamped line with the lines without a stamp that follow it: a traceback stays whole,
and is filtered whole.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from launcher.journal.events import read_events
from launcher.watch.status import run_status
from resnet_dist.config.schema import ConfigError
from resnet_dist.run.paths import RunPaths

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STAMP = re.compile(r"([-\d]{10} [\d:]{8})[.,](\d+)(Z?)(?: rank \d+)?(?: ([A-Z]+))?:? ?")
_AGE = re.compile(r"(\d+)\s*([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
_POLL_S = 0.5


@dataclass
class Entry:
    time: float  # seconds since 1970; 0 before the first stamp of a file
    rank: int
    level: str
    lines: list[str]


def _moment(since: str) -> float:
    """`10m`, `2h`, `1d`, or a date with or without a time and an offset -> seconds since 1970."""
    if age := _AGE.fullmatch(since.strip()):
        return time.time() - int(age[1]) * _UNITS_S[age[2]]
    try:
        return datetime.fromisoformat(since).timestamp()
    except ValueError:
        raise ConfigError(f"--since = {since}: write an age as 30s, 10m, 2h or 1d, or a moment "
                          "as '2026-11-21 11:30'") from None


def print_logs(console: Console, run: RunPaths, *, ranks: Sequence[int] = (),
               grep: str | None = None, since: str | None = None, level: str | None = None,
               attempt: int | None = None, follow: bool = False, as_json: bool = False) -> None:
    """Print the ranks' entries in the order of their stamps; by default all of them.

    Args:
        grep: a regular expression that a line of the entry has.
        since: an age, or a moment.
        level: at least.
        follow: go on as lines arrive, until the run is over or Ctrl-C.
        as_json: one object an entry.

    Raises: ConfigError where a filter is none, a rank has no log, or the run no such attempt.
    """
    if level is not None and level.upper() not in LEVELS:
        raise ConfigError(f"--level = {level}: pick one of {', '.join(LEVELS).lower()}")
    try:
        pattern = re.compile(grep or "")
    except re.error as error:
        raise ConfigError(f"--grep = {grep}: not a regular expression ({error}); escape "
                          "special characters with \\") from None
    for rank in ranks:
        if not run.rank_log(rank).exists():
            raise ConfigError(f"--rank = {rank}: no log of it in {run.logs}")
    least, earliest = LEVELS.index((level or "debug").upper()), _moment(since) if since else 0.0
    spans = _attempts(run)
    if attempt is not None and attempt not in spans and not follow:
        have = ", ".join(map(str, spans)) or "none yet"
        raise ConfigError(f"--attempt = {attempt}: {run.name} has {have}")
    if not any(run.logs.glob("rank_*.log")) and not follow:
        console.print(f"no logs yet in {run.logs}; `resnet-dist status {run.name}` says why")
        return
    logs: dict[Path, Iterator[list[Entry]]] = {}
    try:
        while True:
            over = run_status(run).over  # asked before reading, so that the last lines are read
            spans = _attempts(run)
            files = map(run.rank_log, ranks) if ranks else run.logs.glob("rank_*.log")
            entries = [entry for file in sorted(files)
                       for entry in next(logs.setdefault(file, _read(file)))]
            for entry in sorted(entries, key=lambda entry: entry.time):
                number = max((each for each, began in spans.items() if began <= entry.time),
                             default=None)
                if entry.time >= earliest and LEVELS.index(entry.level) >= least \
                        and attempt in (None, number) and any(map(pattern.search, entry.lines)):
                    _print(console, entry, number, as_json)
            if not follow or over:
                return
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return


def _read(file: Path) -> Iterator[list[Entry]]:
    """One rank's log: the entries of all whole lines since the last time, again and again.

    Lines that continue an entry which was given before come as one of its time and level.
    """
    offset, last = 0, Entry(0.0, int(file.stem.removeprefix("rank_")), "INFO", [])
    while True:
        with open(file, "rb") as handle:
            handle.seek(offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        offset += end
        entries = [replace(last, lines=[])]
        for text in data[:end].decode(errors="replace").splitlines():
            if found := _STAMP.match(text):
                # Without a Z, as earlier versions wrote it, it is the local time of a node.
                moment = datetime.fromisoformat(f"{found[1]}.{found[2]}{found[3]}")
                level = found[4] if found[4] in LEVELS else "INFO"
                entries.append(Entry(moment.timestamp(), last.rank, level, []))
            entries[-1].lines.append(text)
        last = entries[-1]
        yield [entry for entry in entries if entry.lines]


def _attempts(run: RunPaths) -> dict[int, float]:
    """When the workers of every attempt were started."""
    return {event["attempt"]: event["time"] for event in read_events(run)
            if event["event"] == "attempt"}


def _print(console: Console, entry: Entry, attempt: int | None, as_json: bool) -> None:
    if as_json:
        moment = datetime.fromtimestamp(entry.time, UTC).isoformat(" ", "milliseconds")
        console.file.write(json.dumps({
            "time": moment, "rank": entry.rank, "attempt": attempt, "level": entry.level,
            "text": "\n".join(entry.lines)}) + "\n")
        return
    for line in entry.lines:
        console.print(f"[{entry.rank:04d}] {line}", style=_COLOURS.get(entry.level), markup=False,
                      highlight=False, soft_wrap=True)
