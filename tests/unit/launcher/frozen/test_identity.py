"""A run that goes on is what it was, or the difference is shown and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from launcher.foreground import train_here
from launcher.frozen.freeze import create_run, read_provenance, write_provenance
from launcher.frozen.identity import check_identity
from launcher.journal.events import read_events, record
from launcher.submission.control import resume
from resnet_dist.config.load import config_from_dict, load_frozen
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.run.paths import RunPaths


@pytest.fixture
def run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A stopped run with its own copy of the data."""
    shutil.copytree(digits, tmp_path / "data")
    monkeypatch.setattr("launcher.submission.control.submit", lambda *_, **__: "1")
    run = create_run(config_of(tmp_path))
    record(run, "submitted", where="local", nodes=1, steps=60, batch_size=32)
    record(run, "stopped", step=20, cause="")
    return run


def config_of(folder: Path, **changes: object) -> Config:
    return config_from_dict(tree_of(folder, **changes))


def tree_of(folder: Path, **changes: object) -> dict[str, object]:
    return {"name": "run", "runs": str(folder), "data": str(folder / "data"), "model": "resnet20",
            "steps": 60, "batch_size": 32, "augment": {"name": "pad_crop", "size": 32}, **changes}


def test_a_run_as_it_was_goes_on(run: RunPaths) -> None:
    assert resume(run, [], local=True) == "1"
    assert resume(run, ["steps=70"], local=True) == "1"
    assert resume(run, [], local=True) == "1", "a change by the command is on record"


def test_an_edited_configuration_is_shown_and_refused_until_allowed(run: RunPaths) -> None:
    tree = yaml.safe_load(run.config.read_text())
    tree["optimizer"]["lr"], tree["seed"] = 0.05, 7
    run.config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as refusal:
        resume(run, [], local=True)
    assert "config: optimizer.lr: 0.1 -> 0.05" in str(refusal.value)
    assert "config: seed: 0 -> 7" in str(refusal.value)
    assert "resnet-dist resume run --allow config" in str(refusal.value)
    resume(run, [], local=True, allow=["config"])
    (event,) = [event for event in read_events(run) if event["event"] == "allowed"]
    assert event["differences"] == ["seed: 0 -> 7", "optimizer.lr: 0.1 -> 0.05"]
    resume(run, [], local=True)


def test_other_data_at_the_same_path_is_refused_until_allowed(run: RunPaths) -> None:
    manifest = run.root.parent / "data" / "dataset.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(tree | {"mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ConfigError, match=r"data: fingerprint: \w{12} -> \w{12}\n.*--allow data"):
        resume(run, [], local=True)
    with pytest.raises(ConfigError, match="data: fingerprint"):
        resume(run, [], local=True, allow=["config", "code"])
    resume(run, [], local=True, allow=["data"])


def test_another_path_with_the_same_data_is_no_difference(run: RunPaths) -> None:
    moved = run.root.parent / "moved"
    (run.root.parent / "data").rename(moved)
    assert resume(run, [f"data={moved}"], local=True) == "1"


def test_edited_code_and_other_packages_are_refused_until_allowed(run: RunPaths) -> None:
    module = run.code / "resnet_dist" / "engine" / "optim.py"
    module.chmod(0o644)
    module.write_text(module.read_text() + "# edited\n")
    told = read_provenance(run)
    write_provenance(run, told | {"packages": told["packages"] | {"torch": "1.0"}})
    with pytest.raises(ConfigError) as refusal:
        resume(run, [], local=True)
    assert "code: sources: " in str(refusal.value)
    assert "code: torch: 1.0 -> " in str(refusal.value)
    resume(run, [], local=True, allow=["code"])
    resume(run, [], local=True)


def test_the_foreground_refuses_other_code_and_then_runs_it(
        run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.foreground.supervise_here", lambda run: 0)
    recipe = run.root.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree_of(run.root.parent)))
    assert train_here(recipe, []) == 0
    told = read_provenance(run)
    write_provenance(run, told | {"code": {"sha256": "0" * 64}})
    with pytest.raises(ConfigError, match=r"code: sources: 0{12} -> \w{12}"):
        train_here(recipe, [])
    assert train_here(recipe, [], ["code"]) == 0
    assert train_here(recipe, []) == 0


def test_an_unknown_kind_is_named(run: RunPaths) -> None:
    with pytest.raises(ConfigError, match="--allow = all: pick from config, code, data"):
        check_identity(run, load_frozen(run.config), ["all"])
