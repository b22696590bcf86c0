"""What an error of a file system means, and how long it is waited out. Imports no torch.

The one policy of supervisors, ranks, loader and checkpoints; the cluster guide has it as a table.
An errno is never bad input: what a run reads was there when it was submitted.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_S = 45.0  # inside a rank: below the shortest silence that counts as a hang
NEWS_S = 300.0  # a supervisor, whose ranks may be healthy all the while

# What servers and clients of NFS, Lustre, BeeGFS and CIFS answer while they recover.
_PASSING = frozenset((
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.EKEYEXPIRED,
    errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ENOLCK))
# A mount that is not on this node, or that the kernel has made read-only.
_MOUNT = frozenset((errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EROFS))


def errno_of(error: BaseException | None) -> int | None:
    """The errno of an error, or of the one that it was raised from; None without any."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__
    return None


def passes(error: BaseException) -> bool:
    """Whether it may be over when tried again."""
    return errno_of(error) in _PASSING


def node_at_fault(error: BaseException) -> bool:
    """Whether another node may do better, for an error that was waited out in vain."""
    return errno_of(error) in _PASSING | _MOUNT


def waited_out(act: Callable[[], T], limit_s: float | None = None,
               hurry: threading.Event | None = None) -> T:
    """What `act` returns, tried again while what it raises may pass, for `limit_s` (WAIT_S).

    Args:
        hurry: once it is set, the next try is the last.
    """
    hurry = hurry or threading.Event()
    deadline, pause = time.monotonic() + (WAIT_S if limit_s is None else limit_s), 0.1
    while True:
        try:
            return act()
        except Exception as error:
            if not passes(error) or hurry.is_set() or time.monotonic() + pause > deadline:
                raise
            log.warning("%s: %s; again in %.1f s", type(error).__name__, error, pause)
        hurry.wait(pause)
        pause = min(2 * pause, 5.0)
