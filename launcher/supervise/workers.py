"""The worker processes of one node: started, watched, signalled, ended.

In: orders of the leading supervisor (start, stop, abort, kill). Out: exits with the reason that the
worker itself gave, and ranks that make no progress.

A worker never outlives its supervisor: the kernel kills it when the supervisor's process ends,
however that ends (SLURM's process tracking by parent loses orphans).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.supervise.memory import limit_text, oom_kills
from resnet_dist.run.file_errors import waited_out
from resnet_dist.run.lease import OWNER
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

FINISHED, CRASHED, BAD_INPUT, DIVERGED, NODE, SAVED = 0, 1, 2, 3, 74, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RESEND_S = 0.5
KILL_S = 10.0
START_S = 180.0  # a rank that has not made a sign of life yet may be importing from a slow disk
# Silence that is suspicious once a rank's pace is known: so many times its longest pause, and not
# below FLOOR_S. `hang_s` bounds both.
PAUSES, FLOOR_S, KNOWN_BEATS = 10.0, 60.0, 20
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit|Diverged|Warning)\b")
_LOG_PREFIX = re.compile(r"^[-\d]{10} [\d:,.]+Z? rank \d+( [A-Z]+)?: ")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Exit:
    """How a worker ended: `code` is negative for a signal; `reason` is one line."""

    rank: int
    code: int
    reason: str

    @property
    def failed(self) -> bool:
        return self.code not in (FINISHED, SAVED)


@dataclass
class Pulse:
    """The signs of life of one rank, on this machine's clock."""

    last: int | None  # the newest sign's time as its file has it; only changes matter
    since: float  # when it was seen to be new
    beats: int = 0
    longest_s: float = 0.0  # pause between two signs
    warned: bool = False

    def feel(self, beat: int | None, now: float) -> None:
        """beat: None where the file system does not tell; then silence proves nothing."""
        if beat is None:
            self.since = now
        if beat is None or beat == self.last:
            return
        if self.beats:
            self.longest_s = max(self.longest_s, now - self.since)
        self.last, self.since, self.warned = beat, now, False
        self.beats += 1

    def limit_s(self, hang_s: float, *, adaptive: bool) -> float:
        """Silence after which the rank counts as hung."""
        if not self.beats:
            return max(hang_s, START_S)
        if not adaptive or self.beats < KNOWN_BEATS:
            return hang_s
        return min(hang_s, max(FLOOR_S, PAUSES * self.longest_s))


def train_command(run: RunPaths) -> list[str]:
    return [sys.executable, "-m", "resnet_dist.train", str(run.root)]


class Workers:
    """Ranks `node * ranks_per_node ...` of a run, on this machine.

    Args:
        command: what one rank runs; its place in the world is in its environment.
        hang_s: seconds without a sign of life after which `hung` names a rank, at the latest.
    """

    def __init__(self, run: RunPaths, command: Sequence[str], *, node: int, ranks_per_node: int,
                 hang_s: float) -> None:
        self._run, self._command, self._hang_s = run, list(command), hang_s
        self._first, self._count = node * ranks_per_node, ranks_per_node
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._log_start: dict[int, int] = {}
        self._pulses: dict[int, Pulse] = {}
        self._adaptive = True
        self._oom_kills = 0
        self.owner: str | None = None  # the lease under which the ranks may commit
        self._stopping = False
        self._resend_at = 0.0

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, attempt: int, world: int, address: str, port: int, *,
              adaptive: bool = True) -> dict[int, int]:
        """Start all ranks of this node; their pids by rank.

        adaptive: a rank's own pace decides what is a hang; else `hang_s` alone, which is for the
        attempt after one that brought nothing.
        """
        assert not self._running, "workers of the attempt before still run"
        self._stopping, self._adaptive = False, adaptive
        self._oom_kills = oom_kills()
        for folder in (self._run.logs, self._run.heartbeats):
            waited_out(partial(folder.mkdir, exist_ok=True))
        for local in range(self._count):
            rank = self._first + local
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(self._count),
                "MASTER_ADDR": address, "MASTER_PORT": str(port),
                "RESNET_DIST_ATTEMPT": str(attempt), "PYTHONUNBUFFERED": "1",
                "PYTHONFAULTHANDLER": "1",  # SIGABRT then writes every thread's stack
            }
            if self.owner is not None:
                environment[OWNER] = self.owner
            with waited_out(partial(open, self._run.rank_log(rank), "ab")) as output:
                self._log_start[rank] = output.seek(0, os.SEEK_END)
                self._running[rank] = subprocess.Popen(
                    self._command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, process_group=0, preexec_fn=_tie_to(os.getpid()))
            self._pulses[rank] = Pulse(self._beat(rank), time.monotonic())
        return {rank: process.pid for rank, process in self._running.items()}

    def poll(self) -> list[Exit]:
        """Workers that ended since the last call; call it several times a second."""
        if self._stopping and time.monotonic() >= self._resend_at:
            # Again and again, because a worker ignores the signal until it is ready for it.
            self._resend_at = time.monotonic() + RESEND_S
            self._signal(signal.SIGUSR2)
        ended = []
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[rank]
                ended.append(Exit(rank, code, self._reason(rank, code)))
        return ended

    def stop(self) -> None:
        """Ask every worker to save at a step boundary and to leave with code 75."""
        self._stopping = True

    def abort(self) -> None:
        """Let every worker write the stacks of its threads to its log, and end."""
        self._signal(signal.SIGABRT)
        self._signal(signal.SIGCONT)  # one that is stopped would never get to it

    def kill(self) -> list[Exit]:
        """End every worker at once and wait for it, for KILL_S at most: one that waits inside a
        driver or for a file server cannot be ended, and stays in `running`."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_S
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return self.poll()

    def hung(self) -> list[tuple[int, float, bool]]:
        """(rank, seconds since its last step, whether it is stopped) of the ranks that are silent
        for too long; one that is stopped comes first.

        The clock is this machine's, and starts when a heartbeat is seen to change: clocks of the
        file server do not matter.
        """
        now, silent = time.monotonic(), []
        for rank in self._running:
            pulse = self._pulses[rank]
            pulse.feel(self._beat(rank), now)
            limit_s = pulse.limit_s(self._hang_s, adaptive=self._adaptive)
            if now - pulse.since > limit_s:
                silent.append((rank, now - pulse.since, _stopped(self._running[rank].pid)))
            elif now - pulse.since > limit_s / 3 and not pulse.warned and pulse.beats:
                pulse.warned = True
                log.warning("rank %d made no step for %.0f s; it will be ended after %.0f s", rank,
                            now - pulse.since, limit_s)
        return sorted(silent, key=lambda each: not each[2])

    def _beat(self, rank: int) -> int | None:
        try:
            return self._run.heartbeat(rank).stat().st_mtime_ns
        except FileNotFoundError:
            return 0
        except OSError:
            return None

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            process.send_signal(number)

    def _reason(self, rank: int, code: int) -> str:
        """One line: the signal that ended the worker, or the last error in its log."""
        if code in (FINISHED, SAVED):
            return ""
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"ended by SIGKILL: out of memory{limit_text()}"
        if code < 0:
            try:
                return f"ended by {signal.Signals(-code).name}"
            except ValueError:
                return f"ended by signal {-code}"
        path, lines = self._run.rank_log(rank), []
        with contextlib.suppress(OSError), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start[rank], size - 16_384))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return last_error(lines) or f"exit code {code} without a word; see {path}"


def _stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    return False


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that names an error, else its last line; at most 500 characters."""
    spoken = [_LOG_PREFIX.sub("", line) for line in lines if line]
    errors = [line for line in spoken[-20:] if _ERROR_LINE.search(line)]
    return (errors or spoken or [""])[-1][:500]


def _tie_to(supervisor: int):  # type: ignore[no-untyped-def]
    """What a worker does between fork and exec."""
    def tie() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != supervisor:  # it ended before the line above
            os._exit(CRASHED)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")  # the kernel shall take a rank, which is restarted, not us
        # SLURM may signal workers directly, long before they are ready for it.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return tie
