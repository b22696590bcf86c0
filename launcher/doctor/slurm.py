"""`doctor`'s lines about SLURM: the settings that decide whether a run survives."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from launcher.slurm.scheduler import answer, ask

Finding = dict[str, str]

_SAVE_S = 30  # within which a checkpoint should fit, between a signal and the end


def finding(state: str, what: str, found: str, remedy: str = "") -> Finding:
    """One line: `state` is ok, note or problem."""
    return {"state": state, "what": what, "found": found, "remedy": remedy}


def verdict(good: bool, what: str, found: str, remedy: str, bad: str = "problem") -> Finding:
    """ok without a remedy, or `bad` with it."""
    return finding("ok", what, found) if good else finding(bad, what, found, remedy)


def slurm_findings() -> list[Finding]:
    """The client programs, the controller, accounting, and the settings that matter to a run."""
    if not shutil.which("sbatch"):
        return [finding("note", "slurm", "no sbatch here", "`submit` runs jobs on this machine")]
    text, refusal = answer(["scontrol", "show", "config"], 10)
    if text is None:
        return [finding("problem", "slurm", refusal.splitlines()[0],
                        "is slurmctld running? or use --local")]
    settings = {key.strip(): value.strip() for key, _, value in
                (line.partition("=") for line in text.splitlines())}
    return [finding("ok", "slurm", settings.get("SLURM_VERSION", "unknown version")),
            *judged(settings), *_partitions(), _accounting()]


def judged(settings: dict[str, str]) -> Iterator[Finding]:
    """Each setting of `scontrol show config` that decides what a preemption or a limit costs."""
    requeue = settings.get("JobRequeue", "1")
    yield finding("ok", "slurm JobRequeue", requeue, "" if requeue != "0" else
                  "off by default, but every job here asks for --requeue itself")
    wait = int((re.findall(r"^\d+", settings.get("KillWait", "30")) or [0])[0])
    yield verdict(wait >= _SAVE_S, "slurm KillWait", f"{wait} s", "a checkpoint must be written "
                  f"within {wait} s of scancel or requeue; keep checkpoint.every_steps small",
                  "note")
    mode = settings.get("PreemptMode", "OFF")
    remedy = {"CANCEL": "a preempted job is not queued again by SLURM; the run does it itself "
                        "where it is warned (GraceTime, send_user_signal)",
              "SUSPEND": "a suspended job keeps its memory and its GPUs' contents"}
    said = remedy.get(mode.split(",")[0], "")
    yield verdict(not said, "slurm PreemptMode", mode, said, "note")
    parameters = settings.get("PreemptParameters", "(null)")
    warned = "send_user_signal" in parameters
    yield finding("ok", "slurm PreemptParameters", parameters, "" if warned or mode == "OFF" else
                  "without send_user_signal the warning is SIGTERM, GraceTime before the end")
    exits = settings.get("RequeueExit", "(null)")
    yield finding("ok", "slurm RequeueExit", exits, "" if "77" in exits else
                  "77 there lets a job requeue itself even where scontrol does not answer")


def _partitions() -> Iterator[Finding]:
    """Where a preemption gives no time to save."""
    text = ask(["scontrol", "show", "partition", "--oneliner"], 10) or ""
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        grace, mode = int(values.get("GraceTime") or 0), values.get("PreemptMode", "OFF")
        facts = f"MaxTime {values.get('MaxTime', '?')}, PreemptMode {mode}, GraceTime {grace} s"
        yield finding("ok", f"partition {values.get('PartitionName', '?')}", facts,
                      "" if mode == "OFF" or grace else
                      "a preempted job has KillWait alone to save in")


def _accounting() -> Finding:
    if not shutil.which("sacct"):
        return finding("problem", "slurm sacct", "missing", "submitit needs it")
    silent = ask(["sacct", "--noheader", "--allocations", "--jobs", "1"], 10) is None
    return verdict(not silent, "slurm sacct", "does not answer" if silent else "answers",
                   "`status` knows ended jobs from the runs' files alone", "note")
