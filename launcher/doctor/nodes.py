"""`doctor --slurm`: the same examination on the nodes that a job would get, and between them.

In: settings of the section `launch`. Out: findings with the nodes they are of. One task a node
examines its machine; the ranks that training would have try each other out in child processes
(`resnet_dist.ranks.probe`), so that this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.doctor.machine import examine
from launcher.doctor.slurm import Finding, finding, verdict
from launcher.job import here
from launcher.slurm.cluster import cluster_problems
from launcher.slurm.sbatch import executor
from launcher.slurm.scheduler import cancel, have_slurm, queue_states
from launcher.submission.submit import handed_to_slurm
from launcher.supervise.channel import address_of_leader
from launcher.supervise.workers import last_error
from resnet_dist.config.load import config_from_dict, dump_config, with_overrides
from resnet_dist.config.schema import Config, ConfigError

_SECTIONS = ("launch", "cluster", "data", "runs", "device")
_JOB_MINUTES = 10
_PATIENCE_S = 300  # for the ranks: packages are imported on a cold node
_SKEW_S = 1.0
_SLOW_S = 0.3  # an all-reduce that a step of ResNet-50 would notice, where no link speed is known
_INTERFACE = ("is the interface between nodes the right one? NCCL_SOCKET_IFNAME, "
              "GLOO_SOCKET_IFNAME in launch.environment")


class DoctorJob:
    """One node's examination; on node 0 also what was found between the nodes."""

    def __init__(self, folder: str, ranks: int, data: str | None) -> None:
        """folder: shared by the nodes; its config.yaml is the job's, which the ranks go by."""
        self.folder, self.ranks, self.data = folder, ranks, data

    def __call__(self) -> list[Finding]:
        place = here()
        os.chdir(self.folder)  # where runs would be written
        findings = examine(Path(self.folder), slurm=False, data=self.data)
        between = self._together(place.node, place.names, place.job)
        node = os.environ.get("SLURMD_NODENAME", platform.node())
        return [each | {"where": node} for each in findings] + (
            [each | {"where": "all"} for each in between] if place.node == 0 else [])

    def _together(self, node: int, names: Sequence[str], job: str) -> list[Finding]:
        """Start this node's ranks; what rank 0 found. [] on other nodes."""
        leader = address_of_leader(names[0], names[1]) if len(names) > 1 else "127.0.0.1"
        port = 21_000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 8000
        ranks = []
        for local in range(self.ranks):
            environment = {**os.environ, "MASTER_ADDR": leader, "MASTER_PORT": str(port),
                           "RANK": str(node * self.ranks + local), "LOCAL_RANK": str(local),
                           "LOCAL_WORLD_SIZE": str(self.ranks),
                           "WORLD_SIZE": str(len(names) * self.ranks)}
            ranks.append(subprocess.Popen(
                [sys.executable, "-m", "resnet_dist.ranks.probe", self.folder], env=environment,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        try:
            told = [rank.communicate(timeout=_PATIENCE_S) for rank in ranks]
        except subprocess.TimeoutExpired:
            return [finding("problem", "all-reduce", f"no answer within {_PATIENCE_S} s",
                            _INTERFACE)]
        finally:
            for rank in ranks:
                rank.kill()
        if node:
            return []
        if failed := [err for rank, (_, err) in zip(ranks, told, strict=True) if rank.returncode]:
            reason = last_error(failed[0].splitlines())
            return [finding("problem", "all-reduce", reason,
                            "" if "ConfigError" in reason else _INTERFACE)]
        return list(between_nodes(json.loads(told[0][0].splitlines()[-1]), len(names)))


def between_nodes(found: dict[str, Any], nodes: int) -> Iterator[Finding]:
    """What `resnet_dist.ranks.probe` measured, judged."""
    speed, seconds = found["bus_gb_per_s"], found["gradient_s"]
    links = [each for each in found["link_gb_per_s"] if each]
    text = (f"{found['backend']}, {found['ranks']} ranks on {nodes} node{'s' * (nodes > 1)}: "
            f"ResNet-50's gradient in {seconds * 1e3:.0f} ms, {speed:.2f} GB/s")
    if nodes > 1 and links:
        expected = min(links)
        yield verdict(speed >= 0.3 * expected, "all-reduce",
                      f"{text} of the link's {expected:.1f}",
                      _INTERFACE + "; NCCL_DEBUG=INFO tells which is used")
    else:
        yield verdict(seconds <= _SLOW_S or found["ranks"] == 1, "all-reduce",
                      text + ", link speed unknown",
                      "each step exchanges a gradient of that size", "note")
    if found["backend"] == "gloo":
        yield finding("note", "NCCL", "not tried: no GPUs on these nodes", "")
    skew = found["clock_skew_s"]
    yield verdict(skew < _SKEW_S, "clocks", f"{skew * 1e3:.0f} ms apart", "let the nodes keep time "
                  "(chrony, ntpd): logs are merged, and ages told, by the clock")
    seen, lock = found["folder"]["seen_s"], found["folder"]["lock"]
    if seen is None:
        yield finding("problem", "shared folder", "a renamed file is not seen on all nodes",
                      "name a folder that all nodes mount: runs=DIR")
    else:
        yield finding("ok" if seen < 5 else "note", "shared folder",
                      f"a renamed file is seen on all nodes within {seen:.1f} s")
    yield verdict(lock, "shared locks", f"{'held' if lock else 'not kept'} between nodes",
                  "mount with locks (NFS: without nolock; Lustre: -o flock): they keep two jobs "
                  "from running one run")


def examine_nodes(console: Console, overrides: Sequence[str]) -> list[Finding]:
    """Submit the job, wait for it, and merge what the nodes say. Raises: ConfigError."""
    if not have_slurm():
        raise ConfigError("--slurm: there is no sbatch here; `resnet-dist doctor` examines this "
                          "machine")
    config = job_config(overrides)
    if problems := cluster_problems(config):
        raise ConfigError("\n".join(problems))
    folder = Path(config.runs).absolute() / f".doctor-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    slurm = executor(config, folder, folder)
    with handed_to_slurm():
        job = slurm.submit(DoctorJob(str(folder), config.launch.ranks_per_node, config.data.path))
    try:
        findings = _merged(_results(console, job, config))
    except KeyboardInterrupt:
        cancel(str(job.job_id), kill=True)
        raise
    shutil.rmtree(folder)
    return findings


def job_config(overrides: Sequence[str]) -> Config:
    """A job's configuration out of settings of the cluster alone. Raises: ConfigError."""
    for item in overrides:
        if item.partition("=")[0].split(".")[0] not in _SECTIONS:
            raise ConfigError(f"{item.replace('=', ' = ', 1)}: doctor takes settings of "
                              f"{', '.join(_SECTIONS)}")
    tree = with_overrides(Config(name="doctor"), tuple(overrides))
    launch = tree["launch"]
    world = int(launch["nodes"]) * int(launch["ranks_per_node"])
    tree |= {"batch_size": 32 * world, "bn_batch": 32}
    if tree["data"]["path"] is not None:
        tree["data"]["path"] = os.path.abspath(tree["data"]["path"])
    config = config_from_dict(tree)
    limit = replace(config.launch, time_minutes=min(_JOB_MINUTES, config.launch.time_minutes),
                    hang_s=_PATIENCE_S / 4)
    return replace(config, launch=limit)


def _results(console: Console, job: Any, config: Config) -> list[list[Finding]]:
    said = ""
    while not job.done():
        queued = (queue_states([str(job.job_id)]) or {}).get(str(job.job_id))
        words = f"job {job.job_id}: {queued.state.lower()} {queued.reason}" if queued else ""
        if words and words != said and console.is_terminal:
            console.print(words, highlight=False)
        said = words
        time.sleep(1)
    try:
        results: list[list[Finding]] = job.results()
    except Exception as error:  # whatever ended it, submitit says it in words
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"--slurm: job {job.job_id} on {config.launch.nodes} nodes ended without "
                          f"an answer ({lines[-1] if lines else type(error).__name__}); its logs "
                          f"are in {job.paths.folder}") from None
    return results


def _merged(results: list[list[Finding]]) -> list[Finding]:
    """One line for what all nodes say alike, in the order of the first."""
    where: dict[tuple[str, ...], list[str]] = {}
    for findings in results:
        for each in findings:
            key = (each["state"], each["what"], each["found"], each["remedy"])
            where.setdefault(key, []).append(each["where"])
    every = len(results)
    order = {each["what"]: place for findings in results for place, each in enumerate(findings)}
    return [finding(*key) | {"where": "all" if len(nodes) == every else ",".join(sorted(nodes))}
            for key, nodes in sorted(where.items(), key=lambda pair: order[pair[0][1]])]
