"""Faults of a run's course: divergence, another world, a second job, edited settings and code."""

from __future__ import annotations

import yaml

from launcher.journal.events import LAST_WORDS
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import read_rollbacks
from tests.faults.ground import Ground, Seen, expect, hashes


def not_a_number(ground: Ground) -> Seen:
    """Once, as a fault of the hardware; then always, as a recipe that diverges by itself."""
    whole, trial = ground.undisturbed(), ground.train("nan-once", fault="nan:1:33")
    trial.wait(lambda: trial.events("rolled_back") or trial.over, "the rollback")
    back = trial.events("rolled_back")[0]
    recover_s = trial.again(back["time"])
    trial.finished()
    trial.same_as(whole)
    expect(back["to"] == 30, f"back to {back['to']}")
    always = ground.train("nan-always", 1, optimizer={"lr": 1e30}, schedule={"name": "constant"},
                          divergence={"max_rollbacks": 1})
    code, last = always.code(), always.events()[-1]
    expect(code == 3, f"exit code {code}")
    expect("the loss is not finite; tried again from step 0" in last["cause"], last["cause"])
    expect(not always.run.checkpoints_on_disk(), "a checkpoint was committed")
    expect(len(read_rollbacks(always.run)) == 1, "other rollbacks than one")
    return Seen(f"once: back to step {back['to']}, same bits; always: nothing committed, exit code "
                f"3 after 1 rollback: {last['cause'].removeprefix('rank 0: ').split('.')[0]}",
                trial.redone, recover_s)


def other_world(ground: Ground) -> Seen:
    """4, 2, 4 ranks in exact mode; 3 do not divide the batch."""
    exact = {"mode": "exact", "schedule": {"name": "constant"}}
    whole = ground.undisturbed(1, steps=30, **exact)
    trial = ground.train("worlds", 4, steps=10, **exact)
    expect(trial.code() == 0, trial.said())
    for ranks, steps in ((2, 20), (4, 30)):
        changed = ground.command("train", ground.recipe("worlds", ranks, steps=steps, **exact),
                                 code=2)
        expect("launch.ranks_per_node" in changed and "resume" in changed, changed)
        ground.command("resume", "worlds", f"steps={steps}", f"launch.ranks_per_node={ranks}",
                       "--local", "--runs", ground.runs)
        trial.wait(lambda: trial.events()[-1]["event"] in LAST_WORDS, f"step {steps}")
    refused = ground.command("resume", "worlds", "steps=40", "launch.ranks_per_node=3", "--local",
                             "--runs", ground.runs, code=2)
    expect("must divide batch_size / bn_batch" in refused, refused)
    same = [_weights(run) for run in (trial.run, whole)]
    expect(same[0] == same[1], "the weights differ")
    return Seen("refused without being told; told, the same bits as one rank; 3 ranks refused", 0)


def _weights(run: RunPaths) -> tuple[str, str]:
    found = hashes(run, 30)
    return found["model.safetensors"], found["optimizer.safetensors"]


def two_jobs(ground: Ground) -> Seen:
    whole, trial = ground.undisturbed(), ground.train("two-jobs", fault="slow:*:0:1:0.2")
    trial.wait_for_step(5)
    second = ground.train("two-jobs")
    code = second.code()
    said = (ground.folder / "two-jobs.log").read_text()
    assert trial.process is not None
    expect(code == 1 and f"is run by foreground job {trial.process.pid}.0" in said,
           f"exit code {code}; {said[-500:]}")
    trial.finished()
    trial.same_as(whole)
    return Seen("the second names the first and ends with exit code 1; the first: same bits",
                trial.redone)


def edited(ground: Ground) -> Seen:
    """config.yaml, the run's copy of the code, and a package's version on record."""
    name = "edited"
    trial = ground.train(name, 1, steps=10)
    expect(trial.code() == 0, trial.said())
    run, words = trial.run, ("resume", name, "steps=20", "--local", "--runs", str(ground.runs))
    tree = yaml.safe_load(run.config.read_text())
    tree["optimizer"]["lr"] = 0.05
    run.config.write_text(yaml.safe_dump(tree))
    answer = ground.command(*words, "--allow", "schedule", code=2)
    expect("optimizer.lr: 0.1 -> 0.05" in answer and "--allow config" in answer, answer)
    ground.command(*words, "--allow", "config,schedule")
    trial.wait(lambda: trial.events()[-1]["event"] == "finished", "the end")
    module = next(run.code.rglob("optim.py"))
    module.chmod(0o644)
    module.write_text(module.read_text() + "\n# edited\n")
    words = ("resume", name, "steps=30", "--local", "--runs", str(ground.runs))
    answer = ground.command(*words, "--allow", "schedule", code=2)
    expect("code" in answer and "--allow code" in answer, answer)
    provenance = run.provenance.read_text()
    run.provenance.write_text(provenance.replace('"torch": "', '"torch": "0.'))
    answer = ground.command(*words, "--allow", "schedule", code=2)
    expect("torch: 0." in answer, answer)
    run.provenance.write_text(provenance)
    ground.command(*words, "--allow", "code,schedule")
    trial.wait(lambda: trial.events()[-1]["event"] == "finished" and trial.checkpoint == 30,
               "the end")
    return Seen("config, code and a package's version: each difference shown and refused; told, it "
                "went on")
