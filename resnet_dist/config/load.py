"""From a recipe (YAML), `key=value` overrides and a cluster's profile to a checked `Config`.

Raises everywhere: `ConfigError`, whose lines name key, value and remedy. Imports no torch, so that
a login node answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from resnet_dist.config.explain import explain
from resnet_dist.config.profiles import load_profile
from resnet_dist.config.rules import broken_rules
from resnet_dist.config.schema import Config, ConfigError

# `data=PATH` means `data.path=PATH`: the field a section is known by.
LEADING_FIELD = {"data": "path", "augment": "name", "model": "name", "optimizer": "name",
                 "schedule": "name", "loss": "name"}

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def load_config(recipe: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe, lay `key=value` overrides over it, and check the result.

    Raises: ConfigError, naming every wrong key with its value and the remedy.
    """
    recipe = Path(recipe)
    try:
        loaded = OmegaConf.load(recipe)
    except FileNotFoundError:
        raise ConfigError(f"CONFIG = {recipe}: no such file; configs/ holds the recipes") from None
    except IsADirectoryError:
        raise ConfigError(f"CONFIG = {recipe}: is a directory; name a .yaml file") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"CONFIG = {recipe}: not valid YAML ({reason})") from None
    values = OmegaConf.to_container(loaded, resolve=False) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"CONFIG = {recipe}: expected `key: value` lines at the top level")
    layers = [_expand(values), parse_overrides(overrides)]
    if profile := _profile(layers):
        layers.insert(0, profile)
    merged = OmegaConf.merge(*layers)
    tree = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(tree, dict)
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9_-]", "_", recipe.stem))
    return config_from_dict(tree)


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["a.b=1"]` -> `{"a": {"b": 1}}`; `optimizer=sgd` means `optimizer.name=sgd`. The order says
    nothing. Raises: ConfigError where an item is not `key=value`, or two contradict each other."""
    said: dict[str, Any] = {}
    layers = []
    for item in overrides:
        layer = _expand(_parsed(item))
        for key, value in flat(layer).items():
            if said.setdefault(key, value) != value:
                raise ConfigError(f"{key} = {said[key]}: said twice, also as {value}; keep one")
        layers.append(layer)
    tree = OmegaConf.to_container(OmegaConf.merge({}, *layers), resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _parsed(item: str) -> dict[str, Any]:
    if not re.fullmatch(r"[A-Za-z_][\w.-]*=.*", item, re.DOTALL):
        raise ConfigError(f"override = {item!r}: write it as key=value, e.g. steps=1000")
    key, _, value = item.partition("=")
    if re.fullmatch(r"[+-]?0[0-9_]+", value):
        raise ConfigError(f"{key} = {value}: with a zero in front YAML counts in eights; write "
                          f"{key}={value.lstrip('+-0_') or 0}, or {key}='\"{value}\"' for a text")
    if re.fullmatch(r"\d+(?::\d+)+", value):  # YAML 1.1 takes 10:12 for ten times sixty and twelve
        item = f'{key}="{value}"'
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override = {item!r}: {' '.join(str(error).split())}") from None
    assert isinstance(tree, dict)
    return tree


def config_from_dict(values: dict[str, Any]) -> Config:
    """Check a plain tree. Raises: ConfigError with one line a problem."""
    try:
        config = _ADAPTER.validate_json(json.dumps(_expand(values)), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None
    except TypeError as error:
        raise ConfigError(f"config: holds a value that is not plain data ({error})") from None
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved tree as plain data; `config_from_dict` reads it back."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`: the leaves by the keys that a user writes."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, width=100)


def load_frozen(path: Path) -> Config:
    """A run's own configuration. Raises: ConfigError where `path` is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"RUN = {path.parent}: not a run directory (no {path.name}); "
                          "`resnet-dist status` lists the runs") from error
    return config_from_dict(yaml.safe_load(text))


def validate(config: Config) -> None:
    """Rules that join several fields. Raises: ConfigError with one line a broken rule."""
    problems = broken_rules(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """Turn `data: PATH` into `data: {path: PATH}`, for every section with a leading field, and
    `cluster: NAME` into `launch: {cluster: NAME}`."""
    full = {key: {LEADING_FIELD[key]: value}
            if key in LEADING_FIELD and isinstance(value, str) else value
            for key, value in tree.items()}
    if "cluster" in full and isinstance(full.get("launch", {}), dict):
        full["launch"] = {**full.get("launch", {}), "cluster": full.pop("cluster")}
    return full


def _profile(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cluster that the last layer names has to say; {} where none is named."""
    launches = [layer["launch"] for layer in layers if isinstance(layer.get("launch"), dict)]
    named = [launch["cluster"] for launch in launches if "cluster" in launch]
    if not named or named[-1] is None:
        return {}
    return load_profile(named[-1])


def with_overrides(config: Config, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """A resolved tree with `key=value` laid over it; a newly named cluster counts as said now.

    Not checked yet: `config_from_dict` does.
    """
    said = parse_overrides(overrides)
    merged = OmegaConf.merge(config_to_dict(config), _profile([said]), said)
    tree = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
