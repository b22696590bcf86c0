"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)
LINE_EVERY_S = 30.0


class Ticker:
    """Counts units of work towards a total. `shown=False` says nothing at all."""

    def __init__(self, what: str, total: int, unit: str, shown: bool) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done = 0
        self._start = time.monotonic()
        self._said = self._start
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=False)
            self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> Ticker:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def skip(self, count: int) -> None:
        """Work that was done before; counts for the bar, not for the rate."""
        self._total -= count
        if self._bar and count:
            self._bar.update(self._task, total=self._total)

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        if self._bar:
            self._bar.update(self._task, advance=count, rate=f"{rate:,.0f} {self._unit}/s")
        elif self._shown and now - self._said >= LINE_EVERY_S:
            self._said = now
            left_s = (self._total - self._done) / max(rate, 1e-9)
            log.info("%s: %d of %d %s, %.0f/s, %.0f min left", self._what, self._done,
                     self._total, self._unit, rate, left_s / 60)
