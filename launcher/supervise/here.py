"""Supervision in the foreground of this machine."""

from __future__ import annotations

import logging
import os
import sys

from launcher.supervise.incarnation import Held, Place, log_to_stderr
from launcher.supervise.supervisor import Supervisor
from launcher.supervise.workers import BAD_INPUT, DIVERGED, SAVED
from resnet_dist.config.load import load_frozen
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)


def supervise_here(run: RunPaths) -> int:
    """Supervise a run until it ends; the exit code, 75 where it was stopped before its last step.

    Ctrl-C, SIGTERM and a terminal that is closed save and stop.
    """
    config = load_frozen(run.config)
    log_to_stderr(0)
    place = Place("foreground", job=str(os.getpid()))
    try:
        outcome = Supervisor(run, config, place, echo=sys.stderr.buffer).run()
    except Held as error:
        log.error("%s", error)
        return 1
    if outcome.kind == "failed":
        log.error("failed: %s", outcome.cause)
        return outcome.code if outcome.code in (BAD_INPUT, DIVERGED) else 1
    if outcome.kind == "stopped":
        log.warning("stopped; the same command, or `resnet-dist resume %s`, continues", run.name)
        return SAVED
    return 0
