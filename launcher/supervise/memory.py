"""Whether the kernel ended a process for want of memory, as far as a user may know."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Processes that the kernel ended so far for want of memory: in this process's memory cgroup,
    or on this machine where no cgroup tells; 0 where nothing does."""
    folder = _memory_cgroup()
    for file in ([folder / "memory.events", folder / "memory.oom_control"] if folder else []):
        if (count := _count(file)) is not None:
            return count
    return _count(Path("/proc/vmstat")) or 0


def limit_text() -> str:
    """The limit of the memory cgroup in words that continue a sentence, "" without one."""
    folder = _memory_cgroup()
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((folder / name).read_text()) if folder else 0
        except (OSError, ValueError):  # none, or "max"
            continue
        if 0 < limit < 1 << 60:  # version 1 writes a huge number for "none"
            return f" (the limit of this job or machine is {limit / 2**30:.1f} GiB: launch.mem_gb)"
    return ""


def _memory_cgroup() -> Path | None:
    """Version 2, or version 1's hierarchy for memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
        if number == "0" and (_ROOT / path.lstrip("/") / "memory.events").exists():
            return _ROOT / path.lstrip("/")
    return None


def _count(file: Path) -> int | None:
    try:
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return None
