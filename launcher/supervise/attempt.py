"""One attempt of a run: what is known of its workers, and whom of them to believe."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launcher.supervise.workers import Exit

_LOST_PEER = re.compile(r"[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|gloo|"
                        r"NCCL|DistBackendError|DistNetworkError|DistStoreError|TCPStore")
PARTING_S = 0.5  # after a failure: peers may still print why they end
ORIGIN_S = 3.0  # after a lost peer: that peer, which knows the cause, may still be ending
STACKS_S = 2.0  # after an abort: stacks of all threads are written


@dataclass
class Attempt:
    """What is known of the attempt that runs."""

    number: int
    ranks: int
    exits: dict[int, Exit] = field(default_factory=dict)
    trouble: str = ""  # a lost node, a hang, a save that took too long
    hang: bool = False
    stopped: bool = False  # the rank that hangs is in state T
    lost: bool = False
    bad_node: int | None = None  # which another allocation shall not get
    killed: bool = False
    stop: str = ""  # why the workers were asked to save
    failures: list[Exit] = field(default_factory=list)  # before `killed`, in the order of arrival

    @property
    def over(self) -> bool:
        return len(self.exits) == self.ranks

    @property
    def failure(self) -> Exit | None:
        """The worker that failed by itself: those that only lost a peer speak of it."""
        return min(self.failures, key=lambda exit: bool(_LOST_PEER.search(exit.reason)),
                   default=None)

    @property
    def troubled(self) -> bool:
        return bool(self.failures or self.trouble)

    @property
    def patience_s(self) -> float:
        """How long workers of a troubled attempt may still take to end by themselves."""
        if self.hang:
            return STACKS_S
        echo = not self.trouble and self.failure and _LOST_PEER.search(self.failure.reason)
        return ORIGIN_S if echo else PARTING_S

    @property
    def cause(self) -> str:
        if self.trouble or not self.failure:
            return self.trouble
        return f"rank {self.failure.rank}: {self.failure.reason}"

    def note_hang(self, rank: int, silence_s: float, stopped: bool) -> None:
        """Of the ranks that are silent, one that is stopped is to blame: the others wait for it."""
        first = not self.trouble and not self.failures and not self.stop
        if first or (self.hang and stopped and not self.stopped):
            self.hang, self.stopped = True, stopped
            self.trouble = (f"rank {rank} made no step for {silence_s:.0f} s"
                            + " and is stopped (state T)" * stopped)


class Echo:
    """Copies what a log file gains to a terminal."""

    def __init__(self, log_file: Path, to: IO[bytes]) -> None:
        self._file, self._to, self._at = log_file, to, 0

    def begin(self) -> None:
        """What is in the file already was shown before."""
        self._at = self._file.stat().st_size if self._file.exists() else 0

    def more(self) -> None:
        if not self._file.exists():
            return
        with open(self._file, "rb") as file:
            file.seek(self._at)
            text = file.read()
        with suppress(OSError):  # the terminal may be gone
            self._to.write(text)
            self._to.flush()
        self._at += len(text)
