"""A sweep and chains on a real SLURM, submitted from a checkout that is edited right afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.frozen.freeze import read_provenance
from launcher.frozen.source import code_fingerprint, freeze_code
from launcher.journal.events import read_events
from resnet_dist.config.load import load_frozen
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines
from tests.conftest import ROOT
from tests.unit.data_prep.material import make_tree

RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
STEPS = 12
SETTINGS = (f"steps={STEPS}", "batch_size=32", "bn_batch=8", "threads=1", "log.every_steps=4",
            "checkpoint.every_steps=6", "eval.every_steps=1000", "schedule.warmup_steps=2",
            "launch.ranks_per_node=1", "launch.cpus_per_rank=1", "launch.partition=main",
            "launch.environment.SITE=here", "launch.options.comment=sweep")
pytestmark = pytest.mark.timeout(600)  # whichever test is first waits for all jobs
CONVERSION = ("convert.workers=1", "convert.slurm_tasks=2", "convert.slurm_mem_gb=0.5")


@dataclass
class Checkout:
    """A copy of the product in which one may edit, and its command."""

    root: Path
    runs: Path

    def __call__(self, *words: str | Path, limit_s: float = 150
                 ) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "launcher.cli", *map(str, words)],
                              cwd=self.root, capture_output=True, text=True, timeout=limit_s,
                              env={**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "150"})

    def submit(self, *words: str | Path) -> list[dict[str, Any]]:
        done = self("submit", RECIPE, f"runs={self.runs}", *SETTINGS, "--json", *words)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def run(self, name: str) -> RunPaths:
        return RunPaths(self.runs / name)


@pytest.fixture(scope="module")
def campaign(slurm: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A sweep, a chain, and a chain whose conversion fails, watched until all are over."""
    folder = tmp_path_factory.mktemp("campaign")
    copy = RunPaths(folder / "here")
    copy.root.mkdir()
    freeze_code(copy)
    checkout = Checkout(copy.code, folder / "runs")
    bad = make_tree(folder / "bad", per_class=3)
    (bad / "train" / "ant" / "0.jpg").write_bytes(b"")
    checkout.submit(f"data={folder}/made", "name=chain", "--convert", "digits", "--eval", "1crop",
                    *CONVERSION)
    checkout.submit(f"data={folder}/never", "name=broken", "--convert", bad, *CONVERSION)
    checkout.submit(f"data={digits}", "name=sweep", "--sweep", "seed=0,1,2,3", "--parallel", "2")
    for module in ("resnet_dist/train.py", "resnet_dist/evaluate/report.py",
                   "launcher/supervise/supervisor.py", "data_prep/convert.py"):
        path = checkout.root / module
        path.chmod(0o644)
        path.write_text("raise SystemExit('edited')\n")
    watched = checkout("status", "--watch", "--runs", checkout.runs, limit_s=500)
    assert watched.returncode == 0, watched.stderr
    return checkout


def status(checkout: Checkout, name: str) -> dict[str, Any]:
    done = checkout("status", name, "--runs", checkout.runs, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_sweep_is_one_array_of_one_run_each_trained_to_the_end(campaign: Checkout) -> None:
    runs = [campaign.run(f"sweep-seed{seed}") for seed in range(4)]
    told = [status(campaign, run.name) for run in runs]
    assert [each["state"] for each in told] == ["finished"] * 4, told
    arrays = {each["job"].split("_")[0] for each in told}
    assert len(arrays) == 1
    assert [each["job"].split("_")[1] for each in told] == ["0", "1", "2", "3"]
    assert [load_frozen(run.config).seed for run in runs] == [0, 1, 2, 3]
    sweeps = [read_provenance(run)["sweep"] for run in runs]
    assert [sweep["values"] for sweep in sweeps] == [{"seed": str(seed)} for seed in range(4)]
    assert len({sweep["id"] for sweep in sweeps}) == 1
    losses = {read_lines(run.metrics, "train")[-1]["loss"] for run in runs}
    assert len(losses) == 4, "four seeds are four runs"


def test_no_job_saw_the_edits_made_after_it_was_queued(campaign: Checkout) -> None:
    edited = campaign("train", RECIPE)
    assert (edited.returncode, edited.stderr.strip()) == (1, "edited"), "the edits do break it"
    run = campaign.run("sweep-seed3")
    assert read_provenance(run)["code"]["sha256"] == code_fingerprint(run.code)
    assert read_provenance(run)["code"]["sha256"] != code_fingerprint(campaign.root)


def test_a_chain_converts_trains_and_evaluates(campaign: Checkout) -> None:
    run = campaign.run("chain")
    assert status(campaign, "chain")["state"] == "finished"
    events = read_events(run)
    (judged,) = [event for event in events if event["event"] == "evaluated"]
    assert judged["top1"] == pytest.approx(read_lines(run.metrics, "val")[-1]["top1"], abs=0.6)
    manifest = Path(str(load_frozen(run.config).data.path)) / "dataset.json"
    started = next(event["time"] for event in events if event["event"] == "started")
    assert manifest.stat().st_mtime < started, "training waited for the data set"
    assert len(read_provenance(run)["dataset"]["sha256"]) == 64, "recorded once it was there"


def test_a_failed_conversion_ends_what_waits_for_it_and_status_says_so(campaign: Checkout) -> None:
    told = status(campaign, "broken")
    assert told["state"] == "failed"
    conversion = told["after"][-1]
    said, _, logs = told["cause"].partition("; see ")
    assert said == f"conversion: job {conversion}, which it waited for, ended as FAILED"
    assert any("1 of 18 images could not be used" in path.read_text()
               for path in Path(logs).glob(f"{conversion}_*.err"))
    shown = campaign("status", "--runs", campaign.runs).stdout
    assert f"broken: {said}" in shown


def test_the_dry_run_shows_the_very_script_that_is_submitted(campaign: Checkout) -> None:
    run = campaign.run("chain")
    frozen = load_frozen(run.config)
    from launcher.slurm.sbatch import batch_script

    (submitted,) = [path.read_text() for path in run.submitit.glob("*_submission.sh")
                    if "job-name=chain" in path.read_text()]
    after = next(event["after"] for event in read_events(run) if event["event"] == "submitted")
    assert batch_script(frozen, run, after) == submitted
