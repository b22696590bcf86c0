"""Where faults are made: data, runs with the same few steps, and a run that nothing happened to.

Every trial is a real run of two ranks (unless said otherwise) on the handwritten digits, started as
a user starts it. The oracle is the SHA-256 of the files of its last checkpoint, and its curve,
against those of the undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.journal.events import LAST_WORDS, Event, last_attempt, read_events, redone_steps
from launcher.journal.progress import checkpoint_step, heartbeat_steps
from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).parent / "inside"
STEPS, EVERY = 60, 10  # steps of a run, steps between checkpoints
HANG_S = 15.0
PATIENCE_S = 300.0  # for anything a trial waits for: the machine may be busy
SUPERVISE = ("import sys; from pathlib import Path;"
             "from launcher.supervise.here import supervise_here;"
             "from resnet_dist.run.paths import RunPaths;"
             "sys.exit(supervise_here(RunPaths(Path(sys.argv[1]))))")


class Difference(AssertionError):
    """What was seen is not what was expected."""


def expect(holds: object, otherwise: object) -> None:
    """Raises: Difference saying `otherwise`."""
    if not holds:
        raise Difference(str(otherwise))


@dataclass(frozen=True)
class Seen:
    """What a fault led to. Times are in seconds."""

    text: str
    redone: int | None = None  # iterations computed twice
    recover_s: float | None = None  # from the fault to the first step after it
    notice_s: float | None = None  # from the fault to the supervisor's record of it
    start_s: float | None = None  # from the allocation to the first step


class Ground:
    """A scratch folder with data and runs; `close` ends what is left."""

    def __init__(self, folder: Path, cluster: Callable[[], Cluster]) -> None:
        self.folder, self._cluster = folder, cluster
        self.runs = folder / "runs"
        self._trials: list[Trial] = []

    @property
    def cluster(self) -> Cluster:
        """A running SLURM of four nodes."""
        return self._cluster()

    @property
    def digits(self) -> Path:
        """The handwritten digits, as JPEGs."""
        dst = self.folder / "digits"
        if not (dst / "dataset.json").exists():
            self.command("convert", "digits", dst, "encoding=jpeg", "shard_samples=200")
        return dst

    def settings(self, name: str, ranks: int = 2, **changes: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "name": name, "runs": str(self.runs), "data": str(self.digits), "steps": STEPS,
            "batch_size": 16, "bn_batch": 4, "model": "resnet20", "threads": 1, "device": "cpu",
            "augment": {"name": "pad_crop", "size": 32, "flip": False},
            "schedule": {"name": "cosine", "warmup_steps": 5},
            "checkpoint": {"every_steps": EVERY},
            "log": {"every_steps": 5, "panels_every_steps": 0},
            "eval": {"every_steps": 10_000, "resize": None, "size": 32},
            "launch": {"ranks_per_node": ranks, "hang_s": HANG_S, "grace_s": 20}}
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
        return tree

    def config(self, name: str, ranks: int = 2, **changes: Any) -> Config:
        return config_from_dict(self.settings(name, ranks, **changes))

    def recipe(self, name: str, ranks: int = 2, **changes: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings(name, ranks, **changes)))
        return path

    def train(self, name: str, ranks: int = 2, *, fault: str = "", before: tuple[str, ...] = (),
              **changes: Any) -> Trial:
        """Start `resnet-dist train`; the same name again resumes. `before`: words before it."""
        recipe = self.recipe(name, ranks, **changes)
        said = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 (the process keeps it)
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "launcher.cli", "train", str(recipe)], stdout=said,
            stderr=said, cwd=self.folder, env=environment(fault), start_new_session=True)
        said.close()
        return self._note(Trial(RunPaths(self.runs / name), self.folder / f"{name}.log", process))

    def submit(self, name: str, *, nodes: int = 2, fault: str = "", **changes: Any) -> Trial:
        """Queue a run of `nodes` nodes with a rank each on the local SLURM."""
        launch = {"nodes": nodes, "cpus_per_rank": 1, **changes.pop("launch", {})}
        os.environ["SLURM_CONF"] = str(self.cluster.prefix / "etc" / "slurm.conf")
        recipe = self.recipe(name, 1, launch=launch, **changes)
        answer = json.loads(self.command("submit", recipe, "--json", fault=fault))
        return self._note(Trial(RunPaths(Path(answer["run"])), None, None, answer["job"]))

    def command(self, *words: str | Path, fault: str = "", code: int = 0) -> str:
        """The output of `resnet-dist WORDS...`, which must end with `code`."""
        done = subprocess.run([sys.executable, "-m", "launcher.cli", *map(str, words)], text=True,
                              capture_output=True, cwd=self.folder, env=environment(fault),
                              timeout=PATIENCE_S)
        output = done.stdout + (done.stderr if code else "")
        expect(done.returncode == code, f"resnet-dist {words[0]}: exit code {done.returncode}, "
               f"{' '.join((done.stdout + done.stderr).split())[-600:]}")
        return output

    def undisturbed(self, ranks: int = 2, steps: int = STEPS, **changes: Any) -> RunPaths:
        """The run that nothing happens to; trained once."""
        mode = changes.get("mode", "fast")
        run = RunPaths(self.runs / f"undisturbed-{ranks}-{steps}-{mode}")
        if not run.checkpoint(steps).state.exists():
            trial = self.train(run.name, ranks, steps=steps, **changes)
            expect(trial.code() == 0, trial.said())
        return run

    def copy_of(self, run: RunPaths, name: str) -> RunPaths:
        """A copy of a run's directory under another name, as if it had always had that name."""
        target = RunPaths(self.runs / name)
        shutil.copytree(run.root, target.root)
        tree = yaml.safe_load(target.config.read_text())
        target.config.write_text(yaml.safe_dump({**tree, "name": name}, sort_keys=False))
        return target

    def _note(self, trial: Trial) -> Trial:
        self._trials.append(trial)
        return trial

    def close(self) -> None:
        for trial in self._trials:
            trial.end()
        self._trials.clear()


class Trial:
    """A run that something is about to happen to."""

    def __init__(self, run: RunPaths, log: Path | None,
                 process: subprocess.Popen[bytes] | None = None, job: str = "") -> None:
        self.run, self.log, self.process, self.job = run, log, process, job

    def events(self, kind: str | None = None) -> list[Event]:
        return [e for e in read_events(self.run) if kind is None or e["event"] == kind]

    def said(self) -> str:
        """The ends of all logs."""
        files = [*([self.log] if self.log else []), *sorted(self.run.logs.glob("*.log")),
                 *sorted(self.run.submitit.glob("*.err"))]
        return "\n".join(f"[{file.name}] {file.read_text(errors='replace')[-1500:]}"
                         for file in files if file.exists())

    def wait(self, condition: Callable[[], object], what: str = "",
             limit_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            expect(time.monotonic() < deadline, f"waited in vain for {what or 'it'}; "
                   f"{self.events()[-3:]}; {self.said()[-2500:]}")
            time.sleep(0.02)

    @property
    def attempt(self) -> int:
        return last_attempt(self.events())

    @property
    def step(self) -> int:
        """What a rank of the newest attempt has reported last."""
        return max(heartbeat_steps(self.run, self.attempt), default=0)

    @property
    def checkpoint(self) -> int:
        return checkpoint_step(self.run)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        self.wait(lambda: self.over or (self.attempt >= attempt and self.step >= step),
                  f"step {step}")
        expect(self.step >= step, f"it ended before step {step}; {self.said()[-2500:]}")

    def pids(self) -> list[int]:
        """The ranks of the newest attempt on the leading node."""
        return list(self.events("attempt")[-1]["pids"])

    def kill(self, rank: int) -> float:
        """SIGKILL one rank; when."""
        now = time.time()
        os.kill(self.pids()[rank], signal.SIGKILL)
        return now

    def again(self, since: float, attempt: int = 1) -> float:
        """Wait for the first step of a later attempt; seconds since `since`."""
        def stepped() -> bool:
            later = [e for e in self.events("attempt") if e["attempt"] > attempt]
            return bool(later) and self.step > later[-1]["step"]

        self.wait(lambda: stepped() or self.over, "a step of the next attempt")
        return time.time() - since

    @property
    def over(self) -> bool:
        """Whether the process, or the job, has ended."""
        if self.process is not None:
            return self.process.poll() is not None
        events = self.events()
        return bool(events and events[-1]["event"] in LAST_WORDS)

    def code(self, limit_s: float = PATIENCE_S) -> int:
        """Wait for a foreground run's end; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise Difference(f"it does not end; {self.said()[-2500:]}") from None

    def finished(self) -> None:
        """Wait for the end, which must be a good one."""
        self.wait(lambda: self.over, "the end")
        last = self.events()[-1]
        expect(last["event"] == "finished", f"{last}; {self.said()[-2500:]}")
        if self.process is not None:
            expect(self.code() == 0, f"exit code {self.code()}")

    @property
    def redone(self) -> int:
        return redone_steps(self.events())

    def same_as(self, whole: RunPaths, steps: int = STEPS) -> None:
        """The oracle. Raises: Difference where a bit or a line of the curve differs."""
        expect(hashes(self.run, steps) == hashes(whole, steps), "the final state differs")
        expect(curve(self.run) == curve(whole), "the curve differs, or a step is not there once")

    def end(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.job and not self.over:
            subprocess.run(["scancel", "--full", "--signal=KILL", self.job], capture_output=True)
            subprocess.run(["scancel", self.job], capture_output=True)


def environment(fault: str = "") -> dict[str, str]:
    """Of a command: this checkout first, and the fault for the ranks it will start."""
    path = [str(ROOT)] + ([str(INSIDE)] if fault else []) + os.environ.get(
        "PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, path))),
            "FAULT": fault, "OMP_NUM_THREADS": "1"}


def hashes(run: RunPaths, step: int) -> dict[str, str]:
    """SHA-256 of weights with BatchNorm statistics, of the optimizer, and of the ranks' state."""
    state = run.checkpoint(step).state
    expect(state.exists(), f"no checkpoint of step {step}")
    files = json.loads(state.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def curve(run: RunPaths) -> list[tuple[Any, ...]]:
    return [(line["step"], line["kind"], line["loss"], line["top1"])
            for line in read_lines(run.metrics) if line["kind"] in ("train", "val")]
