"""Competitors that take turns: each a process that stays alive and warm, one line a round.

A machine drifts; whoever alternates drifts together. The child reads a line from its input, works,
and answers with one line of JSON: name -> number.
"""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

Numbers = dict[str, float]


class CompetitorFailed(RuntimeError):
    """A competitor ended instead of answering; the message has its last words."""


class Competitor:
    """`python -m MODULE ARGUMENTS`; the first round, which warms it up, is not counted.

    limit_s: for a round; None: none.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str],
                 limit_s: float | None = None) -> None:
        self.name, self._limit_s = name, limit_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=dict(environment))
        self.round()

    def round(self) -> Numbers:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], self._limit_s)[0]:
                raise TimeoutError
            numbers: Numbers = json.loads(self._process.stdout.readline())
            return numbers
        except (BrokenPipeError, json.JSONDecodeError, TimeoutError) as error:
            self._process.kill()
            _, errors = self._process.communicate()
            why = (f"gave no answer in {self._limit_s} s" if isinstance(error, TimeoutError)
                   else "failed")
            raise CompetitorFailed(f"{self.name} {why}:\n{errors[-2000:]}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def alternate(start: Mapping[str, Callable[[], Competitor]], rounds: int,
              progress: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
    """name -> number -> its value in every round; competitors start one after another.

    Raises: CompetitorFailed.
    """
    running: dict[str, Competitor] = {}
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for name, begin in start.items():
            progress(f"starting {name}")
            running[name] = begin()
        for number in range(rounds):
            for name, competitor in running.items():
                for key, value in competitor.round().items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)
                progress(f"round {number + 1}/{rounds}: {name} "
                         f"{found[name]['images_per_s'][-1]:,.1f} images/s")
    finally:
        for competitor in running.values():
            competitor.close()
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def serve(work: Callable[[], Numbers]) -> None:
    """The child's side: a line in, `work()`'s numbers out, until the input ends."""
    for _ in sys.stdin:
        answer: Any = work()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
