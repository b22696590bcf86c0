"""Signals only set a flag, and what was there before comes back."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from resnet_dist.ranks.distributed import World
from resnet_dist.ranks.preemption import STOP_SIGNALS, SignalFlag

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_is_known_at_the_step_after_and_does_nothing_else(number: int) -> None:
    before = signal.getsignal(number)
    with SignalFlag() as flag:
        assert flag.should_stop(ALONE) == 0
        os.kill(os.getpid(), number)
        assert flag.should_stop(ALONE) == 0  # sent off now ...
        assert flag.should_stop(ALONE) == number  # ... agreed at the next boundary
        assert flag.settle() == number
    assert signal.getsignal(number) is before


def test_the_first_signal_is_the_one_that_counts() -> None:
    with SignalFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.received == signal.SIGUSR2


def test_control_c_asks_first_and_insists_the_second_time() -> None:
    with SignalFlag(foreground=True) as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_the_background_control_c_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with SignalFlag():
        assert signal.getsignal(signal.SIGINT) is before
