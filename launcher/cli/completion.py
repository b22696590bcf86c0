"""What the shell offers at TAB: recipes, runs, settings. Nothing is imported that takes long."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def recipes(incomplete: str) -> list[str]:
    """Folders and YAML files that begin like this; `configs/` where nothing is typed yet."""
    folder = Path(incomplete or "configs/") if incomplete.endswith("/") or not incomplete \
        else Path(incomplete).parent
    if not folder.is_dir():
        return []
    found = [f"{entry}/" if entry.is_dir() else str(entry) for entry in sorted(folder.iterdir())
             if entry.is_dir() or entry.suffix in (".yaml", ".yml")]
    return [path for path in found if path.startswith(incomplete)]


def run_names(context: typer.Context, incomplete: str) -> list[str]:
    """Runs under --runs, the newest first."""
    folder = Path(context.params.get("runs") or "runs")
    if not folder.is_dir():
        return []
    found = [entry for entry in os.scandir(folder) if entry.name.startswith(incomplete)
             and os.path.exists(os.path.join(entry.path, "config.yaml"))]
    return [entry.name for entry in sorted(found, key=lambda entry: -entry.stat().st_mtime)]


def settings(incomplete: str) -> list[str]:
    """`lau` -> `launch.`, `launch.no` -> `launch.nodes=`, `cluster=` -> the profiles."""
    if incomplete.startswith("cluster="):
        from resnet_dist.config.profiles import profile_names

        return [f"cluster={name}" for name in profile_names()
                if f"cluster={name}".startswith(incomplete)]
    from resnet_dist.config.load import config_to_dict
    from resnet_dist.config.schema import Config

    tree = config_to_dict(Config())
    section, dot, _ = incomplete.partition(".")
    if dot and isinstance(tree.get(section), dict):
        words = [f"{section}.{key}=" for key in tree[section]]
    else:
        words = [f"{key}." if isinstance(value, dict) and value else f"{key}="
                 for key, value in tree.items()] + ["cluster="]
    return [word for word in words if word.startswith(incomplete)]
