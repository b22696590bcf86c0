"""Worker processes for shards, watched: one that dies or hangs is an error that names its shard.

Each worker is `python -m data_prep.conversion.worker DST`, told a shard a line on its input and
answering with JSON lines on its output. Pipes instead of queues: the death of either side is the
end of a file, so nothing can wait for a process that is no more.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_prep.conversion.plan import Plan, ShardId

PROJECT = Path(__file__).parents[2]
HANG_S = 600.0  # longest silence of a worker on one image


class ConvertError(RuntimeError):
    """A conversion that could not finish, though what was asked for made sense."""


class Worker:
    def __init__(self, plan: Plan) -> None:
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.conversion.worker", str(plan.dst)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        self.shards: list[ShardId] = []  # given and not finished: at most two
        self.at = ""  # image in hand
        self.heard = time.monotonic()
        self._rest = b""

    def give(self, shard: ShardId) -> None:
        self.shards.append(shard)
        self.at, self.heard = "", time.monotonic()
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its death is noticed on its output
            self.process.stdin.write(f"{shard.split} {shard.index}\n".encode())
            self.process.stdin.flush()

    def hear(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived; None at the end of its output."""
        assert self.process.stdout
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def no_more(self) -> None:
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()

    def end(self) -> None:
        assert self.process.stdout
        try:
            self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    @property
    def work(self) -> str:
        return " and ".join(map(str, self.shards))

    def last_words(self) -> str:
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 4000))
        return self.log.read().decode("utf-8", "replace").strip()


def run_shards(plan: Plan, shards: Sequence[ShardId], workers: int,
               done: Callable[[int], None]) -> None:
    """Convert `shards`, in order, on `workers` processes; `done(n)` after every few images.

    Raises: ConvertError naming shard and reason when a worker fails, dies or falls silent.
    """
    waiting = iter(shards)
    with _workers(plan, min(workers, len(shards))) as team, selectors.DefaultSelector() as ears:
        for worker in team:
            assert worker.process.stdout
            ears.register(worker.process.stdout, selectors.EVENT_READ, worker)
            worker.give(next(waiting))
        while any(worker.shards for worker in team):
            for key, _ in ears.select(timeout=1.0):
                worker = key.data
                messages = worker.hear()
                if messages is None:
                    raise ConvertError(_death(worker))
                for message in messages:
                    if "at" in message:
                        worker.at = message["at"]
                    done(message.get("images", 0))
                    if "error" in message:
                        raise ConvertError(f"{worker.work}: {message['error']}")
                    if message.get("finished"):
                        worker.shards.pop(0)
                    if message.get("ready") and (following := next(waiting, None)) is not None:
                        worker.give(following)
            for worker in team:
                if worker.shards and time.monotonic() - worker.heard > HANG_S:
                    raise ConvertError(f"{worker.work}: no progress for {HANG_S:.0f} s at image "
                                       f"{worker.at!r}; the worker was stopped")


@contextmanager
def _workers(plan: Plan, count: int) -> Iterator[list[Worker]]:
    team: list[Worker] = []
    try:
        for _ in range(count):
            team.append(Worker(plan))
        yield team
    except BaseException:
        for worker in team:
            worker.process.kill()
        raise
    finally:
        for worker in team:
            worker.no_more()
        for worker in team:
            worker.end()


def _death(worker: Worker) -> str:
    code = worker.process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    words = worker.last_words()
    where = f" at image {worker.at!r}" if worker.at else ""
    hint = " (the machine may be out of memory: use fewer workers)" if code == -9 else ""
    return f"{worker.work}: its worker {how}{where}{hint}" + (f"\n{words}" if words else "")
