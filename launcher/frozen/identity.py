"""Whether a run that is about to go on is still what it was: settings, code, packages, data.

provenance.json records what a run is. In: a run directory. Out: what differs from the record, in
words. A difference is refused until the user allows its kind; then it is recorded, in
provenance.json as what the run is from now on and in jobs.jsonl as what happened.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from launcher.frozen.freeze import read_provenance, surroundings, write_provenance
from launcher.frozen.source import code_fingerprint
from launcher.journal.events import record
from resnet_dist.config.load import config_to_dict, flat
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.run.paths import RunPaths

KINDS = ("config", "code", "data")
# A directory may be moved, and renamed; its content is what counts.
_PLACES = ("name", "runs", "data.path", "data.stage_dir")


def check_identity(run: RunPaths, config: Config, allow: Collection[str] = (), *,
                   code: Path | None = None) -> None:
    """Refuse what is not what it was; record what is allowed to differ.

    Args:
        config: as config.yaml has it now.
        allow: kinds of difference that the user accepts.
        code: root of the code that will run; None: the run's own copy.

    Raises: ConfigError listing every difference that is not allowed, or a kind that is none.
    """
    for kind in allow:
        if kind not in KINDS:
            raise ConfigError(f"--allow = {kind}: pick from {', '.join(KINDS)}")
    if not run.provenance.exists():
        return  # nothing is on record to compare with
    told = read_provenance(run)
    now = _now(run, config, code or run.code)
    found = {kind: _differences(kind, told, now) for kind in KINDS}
    refused = [f"{kind}: {line}" for kind in KINDS if kind not in allow for line in found[kind]]
    if refused:
        kinds = ",".join(kind for kind in KINDS if found[kind])
        raise ConfigError(
            f"RUN = {run.name}: is not what it was:\n" + "\n".join(refused)
            + f"\nundo it, or go on with it: `resnet-dist resume {run.name} --allow {kinds}`")
    for kind, lines in found.items():
        if lines:
            record(run, "allowed", kind=kind, differences=lines)
    if any(found.values()):
        write_provenance(run, told | now)


def _now(run: RunPaths, config: Config, code: Path) -> dict[str, Any]:
    """What provenance.json would say about the run as it is."""
    manifest = load_manifest(config.data.path) if config.data.path else None
    return {"config": config_to_dict(config),
            "code": {"sha256": code_fingerprint(code)} if code.is_dir() else None,
            **surroundings(manifest)}


def _differences(kind: str, told: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`what: recorded -> found`; what was never recorded cannot differ."""
    if kind == "config":
        before, after = flat(told.get("config") or {}), flat(now["config"])
        lines = [(key, before[key], after[key]) for key in after if key in before
                 and key not in _PLACES]
    else:
        packages = (told.get("packages") or {}) | {"python": told.get("python", now["python"])}
        found = now["packages"] | {"python": now["python"]}
        what, name = ("dataset", "fingerprint") if kind == "data" else ("code", "sources")
        lines = [(name, told[what]["sha256"][:12], now[what]["sha256"][:12])] \
            if told.get(what) and now[what] else []
        lines += [(each, packages[each], found[each]) for each in found
                  if kind == "code" and each in packages]
    return [f"{what}: {before} -> {after}" for what, before, after in lines if before != after]
