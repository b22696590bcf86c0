"""What the launcher asks of SLURM, with short patience: it may be down while training goes on."""

from __future__ import annotations

import getpass
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

log = logging.getLogger(__name__)


def have_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


@dataclass(frozen=True)
class JobFacts:
    """A job as the controller knows it."""

    state: str
    restarts: int
    preempted: bool  # within GraceTime: warned, still running, soon to be requeued

    def given_up(self, restart: int) -> bool:
        """Whether SLURM has ended the incarnation of that restart count, to start another."""
        return self.restarts > restart or self.state in (
            "PENDING", "REQUEUED", "NODE_FAIL", "PREEMPTED")


def job_facts(job: str, timeout_s: float = 5) -> JobFacts | None:
    """None where SLURM does not answer."""
    text = ask(["scontrol", "show", "job", "--oneliner", job], timeout_s)
    if text is None:
        return None
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobFacts(values.get("JobState", ""), int(values.get("Restarts") or 0),
                    values.get("PreemptTime", "None") not in ("None", ""))


def requeue(job: str, restart: int, patience_s: float) -> bool:
    """Put the job, which is ours and runs, back into the queue; False when SLURM did not obey.

    A controller that is busy obeys a request whose sender has lost patience, and refuses the next
    one: after each try that did not work the job's restart count tells.

    Args:
        restart: restart count of this incarnation.
    """
    deadline, pause = time.monotonic() + patience_s, 0.5
    # Without its controller or munge, scontrol itself waits long: a try must leave time for others.
    try_s = min(10.0, max(1.0, 0.4 * patience_s))
    while True:
        if ask(["scontrol", "requeue", job], try_s) is not None:
            return True
        facts = job_facts(job, min(try_s, max(1.0, deadline - time.monotonic())))
        if facts and facts.given_up(restart):
            return True
        if time.monotonic() + pause > deadline:
            return False
        log.warning("scontrol requeue %s did not work; again in %.1f s", job, pause)
        time.sleep(pause)
        pause *= 2


def exclude(job: str, node: str) -> bool:
    """Keep a job that waits off one more node; whether SLURM obeyed."""
    text = ask(["scontrol", "show", "job", "--oneliner", job], 5) or ""
    known = re.search(r"ExcNodeList=(\S+)", text)
    nodes = [] if known is None or known[1] == "(null)" else [known[1]]
    return ask(["scontrol", "update", f"JobId={job}",
                f"ExcNodeList={','.join([*nodes, node])}"], 5) is not None


def cancel(job: str, *, kill: bool) -> str:
    """End a job for good; `kill`: without the grace in which it saves. Returns SLURM's refusal."""
    _, refusal = answer(["scancel", job], 15)
    if kill and not refusal:
        answer(["scancel", "--full", "--signal=KILL", job], 15)
    return refusal


@dataclass(frozen=True)
class Queued:
    """One line of squeue or sacct."""

    state: str
    reason: str
    nodes: str


def queue_states(jobs: Iterable[str], timeout_s: float = 5) -> dict[str, Queued] | None:
    """State of each job, from one call of squeue, and one of sacct for those squeue has forgotten.

    None where SLURM does not answer.
    """
    wanted = set(jobs)
    if not wanted or not have_slurm():
        return {} if not wanted else None
    # --array and %i: a task of an array has a line and a name (12_3) of its own.
    text = ask(["squeue", "--noheader", "--array", "--states=all", "--user", getpass.getuser(),
                "--format=%i|%T|%r|%N"], timeout_s)
    if text is None:
        return None
    found = {}
    for line in text.splitlines():
        job, state, reason, nodes = [*line.strip().split("|"), "", "", ""][:4]
        if job in wanted:
            found[job] = Queued(state, reason, nodes)
    if rest := wanted - set(found):
        text = ask(["sacct", "--noheader", "--allocations", "--parsable2", "--format",
                    "JobID,State,NodeList", "--jobs", ",".join(sorted(rest))], timeout_s) or ""
        for line in text.splitlines():
            job, state, nodes = [*line.split("|"), "", ""][:3]
            found[job] = Queued(state.split()[0] if state else "", "", nodes)
    return found


def node_names(node_list: str) -> list[str]:
    """`n[1-2],login` -> `["n1", "n2", "login"]`."""
    from submitit.slurm.slurm import _parse_node_list

    names: list[str] = _parse_node_list(node_list)
    return names


def ask(command: list[str], timeout_s: float) -> str | None:
    """Standard output, or None where the command fails or takes too long."""
    text, refusal = answer(command, timeout_s)
    if refusal:
        log.warning("%s: %s", " ".join(command), refusal)
    return text


def answer(command: list[str], timeout_s: float) -> tuple[str | None, str]:
    """Standard output and "", or None and why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s,
                              env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None, f"timed out after {timeout_s:.0f} s"
    except OSError as error:
        return None, str(error)
    if done.returncode:
        return None, done.stderr.strip() or f"exit {done.returncode}"
    return done.stdout, ""
