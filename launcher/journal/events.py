"""jobs.jsonl: what happened to a run's jobs, one JSON object a line, append only.

Written by `submit`, by the leading supervisor, and by `stop` where no supervisor is left to do it.
Read by `status`, and by the supervisor of a later incarnation, which continues the numbering of
attempts and the count of restarts without progress.

Events: submitted, queued (the scheduler's id), started (one incarnation), attempt (workers are
up), exit (a worker failed), crashed (why an attempt ended), rolled_back (it had diverged), signal,
saved, requeued, and the three last words: finished, failed, stopped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

Event = dict[str, Any]
LAST_WORDS = ("finished", "failed", "stopped")
# What the disk has not taken yet: it counts in this process all the same, and goes out with the
# next event. Lines by file.
_unwritten: dict[Path, list[str]] = {}


def record(run: RunPaths, event: str, **facts: Any) -> None:
    """Append one event and flush it to the disk.

    A full disk must not end a healthy run, so a failure is logged and not raised.
    """
    line = json.dumps({"time": round(time.time(), 6), "event": event, **facts})
    _unwritten.setdefault(run.jobs, []).append(line)
    if error := write_events(run):
        log.error("ALARM: %s not written: %s; the event was %s", run.jobs, error, line)


def write_events(run: RunPaths) -> OSError | None:
    """Put what was recorded on the disk; why it is not there, where it is not.

    In a single write, so that a reader never sees two writers' lines mixed.
    """
    lines = _unwritten.get(run.jobs, [])
    text = "".join(f"{line}\n" for line in lines).encode()
    try:
        handle = os.open(run.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if _torn(run.jobs):
                text = b"\n" + text
            if os.write(handle, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        return error
    lines.clear()
    return None


def _torn(path: Path) -> bool:
    """Whether the last line lacks its end, because its writer died or the disk was full."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_events(run: RunPaths) -> list[Event]:
    """All events, oldest first; a torn line is left out, one that was written again counts once."""
    try:
        text = run.jobs.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    events = []
    for line in dict.fromkeys([*text.splitlines(), *_unwritten.get(run.jobs, ())]):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def last_attempt(events: Sequence[Event]) -> int:
    """Number of the newest attempt, 0 before the first."""
    return max((event["attempt"] for event in events if event["event"] == "attempt"), default=0)


def restarts_without_progress(events: Sequence[Event]) -> int:
    """Crashes in a row, since the run was submitted, between which no checkpoint was committed.

    A divergence is no crash: `rollbacks_in_a_row` counts those.
    """
    count, newest = 0, -1
    for event in events:
        if event["event"] == "submitted":
            count, newest = 0, -1
        elif event["event"] == "crashed" and "diverged_at" not in event:
            count = count + 1 if event["checkpoint"] <= newest else 1
            newest = max(newest, event["checkpoint"])
    return count


def rollbacks_in_a_row(events: Sequence[Event], checkpoint: int) -> list[Event]:
    """Rollbacks since the run was submitted, or since it last went beyond where it had diverged.

    checkpoint: step of the newest one now.
    """
    row: list[Event] = []
    for event in events:
        if event["event"] == "submitted":
            row = []
        elif event["event"] == "rolled_back":
            row = [*_not_passed(row, event["checkpoint"]), event]
    return _not_passed(row, checkpoint)


def _not_passed(row: list[Event], checkpoint: int) -> list[Event]:
    return row if row and checkpoint <= max(each["diverged_at"] for each in row) else []


def redone_steps(events: Sequence[Event]) -> int:
    """Steps computed twice: what each attempt had reached beyond where the next one began."""
    return sum(max(0, event["reached"] - event["step"])
               for event in events if event["event"] == "attempt")


@dataclass(frozen=True)
class Process:
    """A process that can be told from a later one with the same pid."""

    host: str
    boot: str  # changes when the machine restarts
    pid: int
    began: int  # clock ticks after boot

    @staticmethod
    def this() -> Process:
        return Process(platform.node(), _boot(), os.getpid(), _began(os.getpid()) or 0)

    def alive(self) -> bool | None:
        """Whether it still runs; None where it belongs to another machine."""
        if self.host != platform.node():
            return None
        return self.boot == _boot() and _began(self.pid) == self.began

    @property
    def facts(self) -> dict[str, Any]:
        return {"host": self.host, "boot": self.boot, "pid": self.pid, "began": self.began}

    @staticmethod
    def of(event: Event) -> Process | None:
        """The process that a `started` event names."""
        try:
            return Process(event["host"], event["boot"], int(event["pid"]), int(event["began"]))
        except (KeyError, ValueError):
            return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _began(pid: int) -> int | None:
    """Start time of a living process; None for one that is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
