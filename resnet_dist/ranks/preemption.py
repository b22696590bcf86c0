"""Being asked to stop: signals set a flag, ranks agree at a step boundary.

In: SIGTERM, SIGUSR1 or SIGUSR2 from SLURM, a supervisor or a person (and SIGINT in the foreground).
Out: the number of the signal that some rank received, the same on every rank at the same step.

The handler does nothing else: Python runs it late while a rank waits inside a collective (12 s seen
in gloo), and saving from it would find the ranks at different steps.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from resnet_dist.ranks.distributed import Agreement, World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class SignalFlag:
    """Context manager that catches the stop signals and tells all ranks at a step boundary.

    Args:
        foreground: catch SIGINT too. A second SIGINT then raises KeyboardInterrupt, for whoever
            does not want to wait for the save.
    """

    def __init__(self, *, foreground: bool = False) -> None:
        self._signals = STOP_SIGNALS + ((signal.SIGINT,) if foreground else ())
        self._previous: dict[int, Any] = {}
        self._agreement: Agreement | None = None
        self.received = 0  # number of the first signal this rank received; 0: none

    def __enter__(self) -> SignalFlag:
        assert threading.current_thread() is threading.main_thread(), "signals need the main thread"
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or number

    def should_stop(self, world: World) -> int:
        """Signal number that all ranks agree on, 0 while there is none.

        A signal counts one call later, on every rank: its number travels while a step computes.
        Collective: once after every step.
        """
        if self._agreement is None:
            self._agreement = Agreement(world)
        return self._agreement.exchange(self.received)

    def settle(self) -> int:
        """What the last `should_stop` sent off, for after the last step. Collective."""
        return self._agreement.settle() if self._agreement is not None else 0
