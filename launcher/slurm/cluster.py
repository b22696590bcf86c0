"""Would SLURM take this job? Asked of sinfo, scontrol and sacctmgr on the login node.

In: a configuration. Out: one line a problem, with key, value and remedy. What does not answer is
not judged: SLURM itself has the last word.
"""

from __future__ import annotations

import getpass
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.slurm.sbatch import gpus_per_node
from launcher.slurm.scheduler import ask
from resnet_dist.config.explain import nearest
from resnet_dist.config.schema import Config

_FORMAT = "%P|%l|%a|%D|%c|%m|%G|%f"
_GPU = re.compile(r"\bgpu(?::([^:,()]+))?:(\d+)(?=[(,]|$)")
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int
    memory_mb: int
    gpus: Counter[str]  # by type; "" where the site gives none
    features: frozenset[str]

    def gpus_of(self, kind: str | None) -> int:
        return self.gpus[kind] if kind else self.gpus.total()


@dataclass(frozen=True)
class Partition:
    name: str
    default: bool
    up: bool
    max_minutes: float
    nodes: list[Nodes]


def partitions() -> dict[str, Partition] | None:
    """As sinfo tells them; None where it does not answer."""
    text = ask(["sinfo", "--noheader", "--exact", f"--format={_FORMAT}"], _PATIENCE_S)
    if text is None:
        return None
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, limit, state, count, cpus, memory, gres, features = line.strip().split("|", 7)
        alike = Nodes(int(count), int(cpus.rstrip("+")), int(memory.rstrip("+")), _gpus(gres),
                      frozenset(features.replace("(null)", "").split(",")) - {""})
        plain = name.rstrip("*")
        found.setdefault(plain, Partition(plain, name.endswith("*"), state == "up", minutes(limit),
                                          [])).nodes.append(alike)
    return found


def cluster_problems(config: Config, runs: int = 1) -> list[str]:
    """Why SLURM would not start this job, or an array of so many, as far as it can be asked."""
    known = partitions()
    if known is None:
        return []
    wanted = config.launch.partition
    if wanted is None:
        chosen = [each for each in known.values() if each.default]
        if not chosen:
            return ["launch.partition = null: the cluster has no default partition; pick one of "
                    + ", ".join(sorted(known))]
    else:
        if unknown := [name for name in wanted.split(",") if name not in known]:
            near = nearest(unknown[0], sorted(known))
            return [f"launch.partition = {wanted}: the cluster has no such partition{near}"]
        chosen = [known[name] for name in wanted.split(",")]  # SLURM takes whichever starts first
    found = [[*_partition_problems(config, each), *_node_problems(config, each, known)]
             for each in chosen]
    settings = ask(["scontrol", "show", "config"], _PATIENCE_S) or ""
    said = dict(re.findall(r"^(\w+)\s*=\s*(\S*)", settings, re.M))
    most = int(said.get("MaxArraySize", 0))
    too_many = [f"--sweep: makes {runs} runs, and the cluster takes arrays of at most {most}; "
                "submit parts of it"] if runs > most > 0 else []
    return [*min(found, key=len), *too_many,
            *_account_problems(config, said.get("AccountingStorageEnforce", ""))]


def unasked_gpus(config: Config) -> str:
    """That the nodes have GPUs and the job asks for none, where nobody said that CPUs are meant."""
    if config.device != "auto" or gpus_per_node(config) or config.launch.gpu_request == "none":
        return ""
    wanted = (config.launch.partition or "").split(",")
    for each in (partitions() or {}).values():
        if any(nodes.gpus for nodes in each.nodes) and (
                each.name in wanted or (each.default and config.launch.partition is None)):
            return (f"device = auto: partition {each.name} has GPUs and this job asks for none; "
                    "device=cuda asks for one a rank, device=cpu says that CPUs are meant")
    return ""


def _partition_problems(config: Config, chosen: Partition) -> Iterator[str]:
    if not chosen.up:
        yield (f"launch.partition = {chosen.name}: is not up; `sinfo` shows which are")
    if config.launch.time_minutes > chosen.max_minutes:
        yield (f"launch.time_minutes = {config.launch.time_minutes}: partition {chosen.name} "
               f"allows {chosen.max_minutes:.0f}; a run saves at the limit and queues itself "
               "again, so a shorter one costs nothing")


def _node_problems(config: Config, chosen: Partition, known: dict[str, Partition]
                   ) -> Iterator[str]:
    """Each demand alone first, so that the message names the one that cannot be met."""
    launch, nodes = config.launch, chosen.nodes
    gpus = gpus_per_node(config) if launch.gpu_request != "none" else 0
    cpus = (launch.cpus_per_rank or 1) * launch.ranks_per_node
    memory_mb = (launch.mem_gb or 0) * 1024
    features = set(re.findall(r"[\w.:-]+", launch.constraint or ""))
    one_of = bool(launch.constraint and re.search(r"[|\[*]", launch.constraint))
    there = frozenset().union(*(each.features for each in nodes))
    for word in sorted(features - there):
        if not (one_of and (features & there or word.isdigit())):
            listed = ", ".join(sorted(there)) or "none"
            yield (f"launch.constraint = {launch.constraint}: no node of partition {chosen.name} "
                   f"has {word}; their features: {listed}")
            return
    types = {kind for each in nodes for kind in each.gpus}
    if gpus and not types:
        others = sorted(each.name for each in known.values() if any(n.gpus for n in each.nodes))
        have = f"partitions with GPUs: {', '.join(others)}" if others else \
            "no partition has any; device=cpu trains without"
        yield f"launch.partition = {chosen.name}: its nodes have no GPUs; {have}"
        return
    if gpus and launch.gpu_type and launch.gpu_type not in types:
        named = sorted(filter(None, types))
        yield (f"launch.gpu_type = {launch.gpu_type}: partition {chosen.name} has "
               + (f"{', '.join(named)}" if named else "GPUs without a type; leave it out"))
        return
    demands = (
        ("launch.ranks_per_node", launch.ranks_per_node, "GPUs", gpus,
         [each.gpus_of(launch.gpu_type) for each in nodes]),
        ("launch.cpus_per_rank" if launch.cpus_per_rank else "launch.ranks_per_node",
         launch.cpus_per_rank or launch.ranks_per_node, "cores", cpus,
         [each.cpus for each in nodes]),
        ("launch.mem_gb", launch.mem_gb, "MB of memory", memory_mb,
         [each.memory_mb for each in nodes]))
    for key, value, what, needed, offered in demands:
        if needed > max(offered):
            yield (f"{key} = {value}: needs {needed:g} {what} a node, those of partition "
                   f"{chosen.name} have {max(offered)}")
            return
    fitting = sum(each.count for each in nodes
                  if (one_of or features <= each.features) and each.cpus >= cpus
                  and each.memory_mb >= memory_mb and each.gpus_of(launch.gpu_type) >= gpus)
    if launch.nodes > fitting:
        yield (f"launch.nodes = {launch.nodes}: partition {chosen.name} has {fitting} that fit; "
               "the same run goes on fewer nodes, with more ranks a node or alone")


def _account_problems(config: Config, enforce: str) -> Iterator[str]:
    """Only where SLURM enforces associations: elsewhere it takes any name."""
    launch = config.launch
    enforced = set(enforce.split(","))
    if not enforced & {"associations", "limits", "qos", "safe", "all"}:
        return
    text = ask(["sacctmgr", "--noheader", "--parsable2", "show", "associations",
                f"user={getpass.getuser()}", "format=Account,Partition,QOS"], _PATIENCE_S)
    rows = [line.split("|") for line in (text or "").splitlines() if line.count("|") == 2]
    if not rows:
        return
    accounts = sorted({row[0] for row in rows})
    if launch.account and launch.account not in accounts:
        yield (f"launch.account = {launch.account}: {getpass.getuser()} may charge "
               f"{', '.join(accounts)}")
        return
    mine = [row for row in rows if not launch.account or row[0] == launch.account]
    levels = sorted({name for row in mine for name in row[2].split(",") if name})
    if launch.qos and enforced & {"qos", "all"} and launch.qos not in levels:
        yield f"launch.qos = {launch.qos}: your account has {', '.join(levels) or 'none'}"


def minutes(limit: str) -> float:
    """SLURM's `[days-]hours:minutes:seconds`, `minutes:seconds` or `infinite` in minutes."""
    days, _, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
    except ValueError:
        return math.inf  # infinite, UNLIMITED, n/a
    if days:
        parts += [0] * (3 - len(parts))  # 2-12 is two days and twelve hours
    hours, mins, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _gpus(gres: str) -> Counter[str]:
    return sum((Counter({kind: int(count)}) for kind, count in _GPU.findall(gres)), Counter())
