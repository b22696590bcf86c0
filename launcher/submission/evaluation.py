"""The job behind a run: when training has finished, its last checkpoint is judged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from launcher.job import RunFailed, refuse_foreign, refuse_other_code
from launcher.journal.events import read_events, record
from launcher.submission.submit import queue
from launcher.supervise.workers import last_error
from resnet_dist.config.load import load_frozen
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths


class EvalJob:
    """Evaluate the run in `run_dir` on one node, and record the outcome in its events."""

    def __init__(self, run_dir: str, protocol: str) -> None:
        self.run_dir, self.protocol = run_dir, protocol

    def __call__(self) -> str:
        """Returns: the accuracy in words. Raises: RunFailed."""
        os.umask(0o077)
        run = RunPaths(Path(self.run_dir))
        refuse_foreign(run)
        refuse_other_code(run)
        ranks = load_frozen(run.config).launch.ranks_per_node
        if not any(event["event"] == "finished" for event in read_events(run)):
            return self._fail(run, "training has not finished")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={ranks}", "-m", "resnet_dist.evaluate.report", str(run.root),
             "--protocol", self.protocol], capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            return self._fail(run, last_error(done.stderr.splitlines()) or
                              f"exit code {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
        record(run, "evaluated", protocol=self.protocol,
               top1=round(result["top1"], 3), top5=round(result["top5"], 3),
               samples=result["samples"], report=result["report"])
        return f"top-1 {result['top1']:.2f}%"

    def _fail(self, run: RunPaths, why: str) -> str:
        record(run, "unevaluated", protocol=self.protocol, why=why)
        raise RunFailed(why)


def queue_evaluation(config: Config, run: RunPaths, job: EvalJob, after: str) -> str:
    """Queue the evaluation behind the training job `after`; its id. Raises: ConfigError."""
    launch = dataclasses.replace(config.launch, nodes=1)
    name = f"eval-{config.name}"[:100]
    one_node = dataclasses.replace(config, name=name, launch=launch)
    number = queue(one_node, run, job, [after])
    record(run, "evaluation queued", protocol=job.protocol, eval_job=number)
    return number
