"""Who may run a run, and who may commit to it. Imports no torch.

The lease file names its holder, the leading supervisor of one incarnation. A commit is made while
the commit lock is held and the lease still names the committing incarnation; whoever takes the
lease over holds the same lock. So a commit of an incarnation that has been replaced either comes
before the takeover, and the successor finds it, or is refused.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resnet_dist.run.paths import RunPaths

OWNER = "RESNET_DIST_OWNER"  # in a rank's environment: the lease under which it was started
COMMIT_WAIT_S = 20.0


def holder(run: RunPaths) -> str:
    """What the lease says, "" without one."""
    try:
        return run.lease.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


@contextmanager
def commit_right(run: RunPaths, mine: str) -> Iterator[None]:
    """Inside, nobody takes the run over. Raises: OSError where somebody has."""
    with locked(run.commit_lock, COMMIT_WAIT_S) as lock:
        # A network file system may remember an old file of that name; not under a lock.
        locked_by = os.pread(lock, 4096, 0).decode(errors="replace").strip()
        for owner in (holder(run), locked_by or mine):
            if owner != mine:
                raise OSError(f"{run.root} is run by {owner or 'nobody'} now, and not by "
                              f"{mine or 'a process without a lease'}")
        yield


@contextmanager
def locked(path: Path, limit_s: float) -> Iterator[int]:
    """An exclusive lock on `path`, waited for; a process that ends lets go of it. Inside, a handle.

    Raises: OSError where another process holds it for longer than `limit_s`.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(f"{path}: locked by another process for more than "
                                  f"{limit_s:.0f} s") from None
                time.sleep(0.02)
        yield handle
    finally:
        os.close(handle)
