"""From a checked configuration to a run directory that will not change under a queued job.

In: `Config`. Out: `runs/NAME` with config.yaml, provenance.json and a copy of the code, or a
`ConfigError` before anything expensive starts.
"""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from launcher.frozen.source import freeze_code, share_code
from resnet_dist.config.load import config_to_dict, dump_config, flat
from resnet_dist.config.rules import NAME_PATTERN
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.shards.manifest import Manifest, check_dataset, manifest_fingerprint
from resnet_dist.run.atomic import write_atomically
from resnet_dist.run.paths import RunPaths

PACKAGES = ("resnet-dist", "torch", "deepspeed", "ffcv", "submitit", "numpy", "numba")


def create_run(config: Config, *, origin: dict[str, Any] | None = None,
               dataset_follows: bool = False, like: RunPaths | None = None) -> RunPaths:
    """Make and fill the run directory. Raises: ConfigError where the name is taken.

    Args:
        origin: what else provenance.json should tell, e.g. the sweep that the run belongs to.
        dataset_follows: a conversion that is queued before the run makes the data set; the job
            then looks at it and completes provenance.json.
        like: a run of the same sweep, just made: the code is the same.
    """
    manifest = None if dataset_follows else check_dataset(config)
    refuse_taken(config)
    config = anchored(config)
    run = RunPaths(Path(config.runs) / str(config.name))
    try:
        run.root.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"runs = {config.runs}: cannot be written ({error.strerror}); "
                          "name another folder with runs=DIR") from None
    try:
        for folder in (run.checkpoints, run.logs, run.heartbeats, run.tensorboard):
            folder.mkdir()
        write_atomically(run.config, dump_config(config))
        if like:
            share_code(run, like)
        told = read_provenance(like) if like else \
            provenance(manifest) | {"code": {"sha256": freeze_code(run)}}
        write_provenance(run, told | {"config": config_to_dict(config), **(origin or {})})
    except BaseException:
        shutil.rmtree(run.root)
        raise
    return run


def refuse_taken(config: Config) -> None:
    """Raises: ConfigError where the run's name is taken, or what it starts from is not there."""
    if config.init_from is not None and not os.path.isfile(config.init_from):
        raise ConfigError(f"init_from = {config.init_from}: no such file; name a .safetensors or "
                          ".pth file")
    root = Path(os.path.abspath(config.runs)) / str(config.name)
    if root.exists():
        raise ConfigError(f"name = {config.name}: {root} exists; `resnet-dist resume "
                          f"{config.name}` continues it, name=OTHER starts another")


def complete_provenance(run: RunPaths, config: Config) -> None:
    """Record the data set of a run that was submitted before there was one.

    Raises: ConfigError where it does not fit the configuration.
    """
    told = read_provenance(run)
    if told["dataset"] is None:
        write_provenance(run, told | {"dataset": surroundings(check_dataset(config))["dataset"]})


def anchored(config: Config) -> Config:
    """The same configuration with absolute paths: a job starts in another folder."""
    assert config.data.path is not None, "check_dataset refuses this"
    weights = config.init_from
    return dataclasses.replace(
        config, runs=os.path.abspath(config.runs),
        init_from=None if weights is None else os.path.abspath(weights),
        data=dataclasses.replace(config.data, path=os.path.abspath(config.data.path)))


def differences(before: Config, after: Config) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    old, new = flat(config_to_dict(before)), flat(config_to_dict(after))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new}
            if old.get(key) != new.get(key)]


def rewrite_config(run: RunPaths, config: Config) -> None:
    """Replace a run's configuration atomically (resume with other nodes or more steps).

    Keys that the file lacks stay out while they have their default: the run's own copy of the code
    may be older than they are.
    """
    before = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    kept = _known_or_set(config_to_dict(config), before, config_to_dict(Config()))
    write_atomically(run.config, yaml.safe_dump(kept, sort_keys=False, width=100))
    if run.provenance.exists():  # the change is the command's, so the run is what it was
        write_provenance(run, read_provenance(run) | {"config": config_to_dict(config)})


def _known_or_set(new: dict[str, Any], old: dict[str, Any],
                  default: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            kept[key] = _known_or_set(value, old[key], default.get(key, {}))
        elif key in old or key not in default or value != default[key]:
            kept[key] = value
    return kept


def renew_code(run: RunPaths) -> tuple[str | None, str]:
    """Let the run go on with the code that is running now: the fingerprints before and after."""
    told = read_provenance(run)
    before, after = told.get("code", {}).get("sha256"), freeze_code(run)
    write_provenance(run, told | {"code": {"sha256": after}, "commit": _git_commit()})
    return before, after


def read_provenance(run: RunPaths) -> dict[str, Any]:
    """Who started the run, with which code, on which data."""
    told: dict[str, Any] = json.loads(run.provenance.read_text(encoding="utf-8"))
    return told


def write_provenance(run: RunPaths, told: dict[str, Any]) -> None:
    write_atomically(run.provenance, json.dumps(told, indent=1) + "\n")


def find_run(name: str, runs: str = "runs") -> RunPaths:
    """A run by name (under `runs`) or by path. Raises: ConfigError where it is not there."""
    by_path = Path(name)
    path = by_path if by_path.is_dir() or os.sep in name else Path(runs) / name
    if os.sep not in name and not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"RUN = {name}: use letters, digits, '_' and '-'")
    run = RunPaths(path.absolute())
    if not run.config.is_file():
        raise ConfigError(f"RUN = {name}: no run directory at {path}; "
                          "`resnet-dist status` lists the runs")
    return run


def provenance(manifest: Manifest | None) -> dict[str, Any]:
    """Who started what, with which code, on which data (None: that does not exist yet)."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": getpass.getuser(),
        "host": platform.node(),
        "command": sys.argv,
        "commit": _git_commit(),
        **surroundings(manifest),
    }


def surroundings(manifest: Manifest | None) -> dict[str, Any]:
    """What a run depends on beside its settings and its code."""
    return {"python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "dataset": manifest and {"name": manifest.name,
                                     "sha256": manifest_fingerprint(manifest)}}


def _git_commit() -> str | None:
    """Commit of the code that runs, with "+" where the checkout was edited; None outside git."""
    here = Path(__file__).resolve().parents[2]
    try:
        commit, dirty = (subprocess.run(["git", "-C", str(here), *words], check=True, text=True,
                                        capture_output=True, timeout=10).stdout.strip()
                         for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")
