"""Cluster profiles: what one cluster wants to be told, kept out of the recipes.

A profile is a YAML file with keys of the section `launch`, and `scratch`, the nodes' own disk,
which becomes `data.stage_dir`. `cluster=NAME` finds NAME.yaml in ~/.config/resnet-dist, then in
slurm/; a path is taken as it is. What it says is laid under the recipe and the command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from resnet_dist.config.explain import explain, nearest
from resnet_dist.config.rules import launch_problems
from resnet_dist.config.schema import ConfigError, LaunchConfig

_ADAPTER: TypeAdapter[LaunchConfig] = TypeAdapter(LaunchConfig)
# A run's own: how many nodes it takes is no property of a cluster.
_NOT_A_CLUSTERS = ("cluster", "nodes")
KEYS = ("scratch", *(field.name for field in dataclasses.fields(LaunchConfig)
                     if field.name not in _NOT_A_CLUSTERS))


def profile_folders() -> tuple[Path, Path]:
    """Where names are looked up: the user's folder, then the checkout's."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return own / "resnet-dist", Path(__file__).resolve().parents[2] / "slurm"


def profile_names() -> list[str]:
    return sorted({path.stem for folder in profile_folders() for path in folder.glob("*.yaml")})


def load_profile(name: str) -> dict[str, Any]:
    """A profile as a layer of the configuration.

    Raises: ConfigError naming the file, the key, its value and the remedy.
    """
    path = _find(str(name))
    where = f"cluster = {name}: {path}"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected `key: value` lines")
    problems = [f"{key} = {value}: unknown key{nearest(str(key), KEYS)}"
                for key, value in tree.items() if key not in KEYS]
    scratch = tree.pop("scratch", None)
    if scratch is not None and not isinstance(scratch, str):
        problems.append(f"scratch = {scratch}: name a folder of the node, e.g. $TMPDIR")
    try:
        launch = _ADAPTER.validate_json(json.dumps(
            {key: value for key, value in tree.items() if key in KEYS}), strict=True)
        problems += [problem.removeprefix("launch.") for problem in launch_problems(launch)]
    except ValidationError as error:
        problems += explain(error, LaunchConfig).splitlines()
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    layer: dict[str, Any] = {"launch": tree}
    return layer | ({"data": {"stage_dir": scratch}} if scratch else {})


def _find(name: str) -> Path:
    if os.sep in name or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"cluster = {name}: no such file; a name without '/' is looked up in "
                              + " and ".join(str(folder) for folder in profile_folders()))
        return Path(name)
    for folder in profile_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(f"cluster = {name}: no such profile{nearest(name, profile_names())}; "
                      "docs/cluster-guide.md says how to write one")
