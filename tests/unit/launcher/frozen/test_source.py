"""A run's own copy of the code: complete, and run by its jobs whatever is edited meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.frozen.freeze import create_run, read_provenance, rewrite_config, write_provenance
from launcher.frozen.source import (
    SOURCE_ROOT,
    code_fingerprint,
    freeze_code,
    frozen_environment,
    frozen_exports,
    quoted,
)
from launcher.job import RunFailed, TrainJob
from launcher.journal.events import read_events, record
from launcher.slurm.sbatch import sbatch_parameters
from launcher.submission.control import resume
from resnet_dist.config.load import config_from_dict, load_frozen
from resnet_dist.config.schema import ConfigError
from resnet_dist.run.paths import RunPaths
from tests.unit.launcher.stand_in import make_run

WHERE = "import launcher.job, resnet_dist.config.load as c; print(c.__file__)"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run directory with nothing but its copy; its name needs quoting."""
    run = RunPaths(tmp_path_factory.mktemp("it's") / "run")
    run.root.mkdir()
    freeze_code(run)
    return run


def test_the_copy_has_the_fingerprint_of_the_running_code(frozen: RunPaths) -> None:
    assert code_fingerprint(frozen.code) == code_fingerprint()
    kinds = {path.suffix for path in frozen.code.rglob("*") if path.is_file()}
    assert kinds == {".py", ".so"}, "nothing else: it is made for every run"


def test_every_edit_addition_and_renaming_changes_the_fingerprint(frozen: RunPaths,
                                                                  tmp_path: Path) -> None:
    shutil.copytree(frozen.code, tmp_path / "c")
    seen = {code_fingerprint(tmp_path / "c")}
    train = tmp_path / "c" / "resnet_dist" / "train.py"
    train.chmod(0o644)
    train.write_text(train.read_text() + "#")
    seen.add(code_fingerprint(tmp_path / "c"))
    (tmp_path / "c" / "launcher" / "new.py").write_text("")
    seen.add(code_fingerprint(tmp_path / "c"))
    train.rename(train.with_name("training.py"))
    seen.add(code_fingerprint(tmp_path / "c"))
    library = next((tmp_path / "c").rglob("*.so"))
    library.chmod(0o644)
    library.write_bytes(library.read_bytes() + b"\0")
    seen.add(code_fingerprint(tmp_path / "c"))
    assert len(seen) == 5


def test_python_imports_the_copy_even_from_inside_the_checkout(frozen: RunPaths) -> None:
    shown = subprocess.run([sys.executable, "-c", WHERE], cwd=SOURCE_ROOT, capture_output=True,
                           text=True, env=os.environ | frozen_environment(frozen))
    assert shown.stdout.startswith(str(frozen.code)), shown.stderr


@pytest.mark.parametrize("others", ["", "/nowhere"])
def test_the_batch_scripts_lines_mean_the_same(frozen: RunPaths, others: str) -> None:
    script = "\n".join([*frozen_exports(quoted(frozen)),
                        f'{sys.executable} -c "{WHERE}"', 'echo "$PYTHONPATH"'])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(["bash", "-c", script], cwd=SOURCE_ROOT, capture_output=True, text=True,
                           env=environment | ({"PYTHONPATH": others} if others else {}))
    imported, path = shown.stdout.splitlines()
    assert imported.startswith(str(frozen.code)), shown.stderr
    assert path == ":".join(filter(None, [str(frozen.code), others]))


def test_the_copy_is_chosen_after_the_users_own_lines() -> None:
    config = config_from_dict({"name": "x", "launch": {"setup": ["module load python"]}})
    setup = sbatch_parameters(config, code="CODE")["slurm_setup"]
    assert setup.index("module load python") < setup.index("export PYTHONSAFEPATH=1")


def test_a_job_that_would_run_other_code_fails_and_names_both(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    run.submitit.mkdir(mode=0o700)
    freeze_code(run)
    with pytest.raises(RunFailed, match=f"{run.code}.*but the job runs {SOURCE_ROOT}"):
        TrainJob(str(run.root))()


def test_a_new_run_has_its_code_and_its_fingerprint(digits: Path, tmp_path: Path) -> None:
    run = create_run(config_from_dict({
        "name": "new", "runs": str(tmp_path), "data": str(digits), "model": "resnet20",
        "augment": {"name": "pad_crop", "size": 32}}))
    assert read_provenance(run)["code"]["sha256"] == code_fingerprint(run.code)


def ended(root: Path) -> RunPaths:
    """A run of 60 steps that was stopped at step 20, with older code than today's."""
    run, config = make_run(root)
    run.code.mkdir()
    (run.code / "launcher").mkdir()
    (run.code / "launcher" / "cli.py").write_text("# of last week\n")
    write_provenance(run, {"code": {"sha256": code_fingerprint(run.code)}, "user": "me"})
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(run, "stopped", step=20, cause="")
    return run


def test_resume_keeps_the_code_unless_told_otherwise(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.submission.control.submit", lambda *_, **__: "1")
    run = ended(tmp_path / "run")
    before = code_fingerprint(run.code)
    resume(run, [], local=True)
    assert code_fingerprint(run.code) == before
    resume(run, [], local=True, code="current")
    assert code_fingerprint(run.code) == code_fingerprint() != before
    assert read_provenance(run)["code"]["sha256"] == code_fingerprint()
    assert read_provenance(run)["user"] == "me"
    (event,) = [event for event in read_events(run) if event["event"] == "code"]
    assert (event["before"], event["after"]) == (before, code_fingerprint())
    with pytest.raises(ConfigError, match="--code = newest: pick one of frozen, current"):
        resume(run, [], local=True, code="newest")


def test_a_rewritten_configuration_says_nothing_older_code_does_not_know(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    tree = yaml.safe_load(run.config.read_text())
    del tree["launch"]["hang_s"], tree["ema"], tree["init_from"]  # keys of a later version
    tree["steps"] = 70
    run.config.write_text(yaml.safe_dump(tree))
    rewrite_config(run, config_from_dict(tree | {"launch": tree["launch"] | {"nodes": 2}}))
    written = yaml.safe_load(run.config.read_text())
    assert "ema" not in written
    assert "hang_s" not in written["launch"]
    assert written["launch"]["nodes"] == 2
    rewrite_config(run, config_from_dict(tree | {"launch": {"hang_s": 7.0}}))
    assert load_frozen(run.config).launch.hang_s == 7.0, "a key that was set is written"
