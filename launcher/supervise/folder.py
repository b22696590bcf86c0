"""The run's folder as a supervisor sees it: what it cannot read now it waits for, within limits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from launcher.journal.events import Event, read_events
from launcher.journal.progress import checkpoint_step, checkpoint_steps
from resnet_dist.run.file_errors import NEWS_S, waited_out
from resnet_dist.run.lease import holder
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

T = TypeVar("T")
LOOK_S = 0.5  # between two looks, at what may be a network's file system


class Folder:
    """Reads of one run's folder. Raises: OSError once it has failed for NEWS_S."""

    def __init__(self, run: RunPaths) -> None:
        self._run = run
        self.owner = ""  # what the lease says while the run is ours
        self._looked_at: dict[str, float] = {}
        self._deaf_since: float | None = None

    def events(self) -> list[Event]:
        return waited_out(partial(read_events, self._run), NEWS_S)

    def step(self) -> int:
        return waited_out(partial(checkpoint_step, self._run), NEWS_S)

    def steps(self) -> list[int]:
        return waited_out(partial(checkpoint_steps, self._run), NEWS_S)

    def successor(self) -> str:
        """Who has taken the run over, "" where nobody has."""
        other = waited_out(partial(holder, self._run), NEWS_S)
        return other if other != self.owner else ""

    def superseded(self) -> bool:
        """Whether a successor is seen, as far as there is news."""
        return self._look("lease", partial(holder, self._run)) not in (None, "", self.owner)

    def stop_requested(self) -> bool:
        return self._look("stop", self._run.stop_request.stat) is not None

    def _look(self, what: str, ask: Callable[[], T]) -> T | None:
        """`ask`'s answer where it is time to look again; None without one: the ranks may be
        healthy while a file system is not."""
        now = time.monotonic()
        if now - self._looked_at.get(what, 0.0) < LOOK_S:
            return None
        self._looked_at[what] = now
        try:
            answer = ask()
        except FileNotFoundError:
            answer = None
        except OSError as error:
            if self._deaf_since is None:
                log.warning("no news from the run's folder: %s", error)
                self._deaf_since = now
            if now - self._deaf_since > NEWS_S:
                raise
            return None
        self._deaf_since = None
        return answer
