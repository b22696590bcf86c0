"""Real processes for tests: `run_ranks(work, world, ...)` runs `work` once per rank over gloo.

Ranks are forked from a server that has imported torch and DeepSpeed, so that a test pays
milliseconds and not seconds per process. Each has its own output file; when one fails, the error
shows its traceback and every rank's output, tagged with the rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when imported
_context.set_forkserver_preload(["torch.distributed", "resnet_dist.engine.ddp", "deepspeed",
                                 "resnet_dist.evaluate.report", "resnet_dist.train"])


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(work: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120,
              environment: dict[str, str] | None = None, fresh: bool = False) -> list[Any]:
    """Call `work(*arguments)` in `world` processes; their results in rank order.

    `work` must be importable (a module's function), arguments and results picklable. The
    environment has what a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).
    fresh: processes that have imported nothing yet, for what DeepSpeed reads when imported.
    Raises: RankFailed, with what every rank wrote.
    """
    context = multiprocessing.get_context("spawn") if fresh else _context
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    port = _free_port()
    # Pickled here, whole: multiprocessing would pass tensors as shared memory of a process that
    # may have ended before the other looks.
    content = pickle.dumps((work, arguments))
    processes, pipes = [], []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        variables = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                     "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port), **(environment or {})}
        process = context.Process(target=_child, daemon=True, args=(
            send, folder / f"rank_{rank}", variables, content))
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    try:
        return _collect(pipes, time.monotonic() + timeout, folder)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(folder)


def _collect(pipes: list[Connection], deadline: float, folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} did not end in time"
                             + _outputs(folder))
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                fine, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died" + _outputs(folder)) from None
            if not fine:
                raise RankFailed(f"rank {rank} raised\n{value}" + _outputs(folder))
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(send: Connection, output: Path, variables: dict[str, str], content: bytes) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    try:
        work, arguments = pickle.loads(content)
        result = pickle.dumps((True, work(*arguments)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    send.send_bytes(result)


def _outputs(folder: Path) -> str:
    lines = [f"[{path.name}] {line}" for path in sorted(folder.iterdir())
             for line in path.read_text(errors="replace").splitlines()[-40:]]
    return "\n" + "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
