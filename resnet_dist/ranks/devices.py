"""Which device a rank computes on, which cores feed it, and what all ranks must have alike.

In: the configuration, the driver, /proc and /sys, and the store where ranks meet. Out: the rank's
device with its settings, and the number of cores it may use. What does not fit is refused before a
process group is made, because there it would be a time-out of minutes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_dist.config.schema import Config, ConfigError

log = logging.getLogger(__name__)

_DEV = Path("/dev")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_PCI = Path("/sys/bus/pci/devices")
# A core makes 1,400 images/s of 224 pixels (RESULTS.md) and no GPU takes 10,000 of ResNet-50, so
# twice as many are plenty, whatever is drawn on top.
_PLENTY = 16
_BROKEN = re.compile(
    r"\bECC\b|\bXid\b|fallen off the bus|hardware stack error|unhandled cuda error|NVLink|"
    r"CUDA (driver )?error: (?!out of memory|device-side assert|invalid|an illegal|misaligned|no "
    r"kernel image|too many resources)", re.IGNORECASE)


def choose_device(config: Config, local_rank: int) -> torch.device:
    """This rank's device, which becomes the current one.

    `device=auto` is a GPU where there is one, and a CPU only where nothing says that GPUs were
    meant: nobody asked for one, and none is here. Raises: ConfigError; RuntimeError where the node,
    not the configuration, is at fault.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        # SLURM may show each rank its own GPU alone (index 0) or all of the node's.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    here = sorted(path.name for path in _DEV.glob("nvidia[0-9]*"))
    if config.device == "auto" and not config.launch.gpus_per_rank and (_hidden() or not here):
        return torch.device("cpu")
    reason = _why_not()
    found = f"has {', '.join(here)}, but torch {torch.__version__} cannot use them" if here else \
        f"shows torch {torch.__version__} no GPU"
    asked = f"launch.gpus_per_rank = {config.launch.gpus_per_rank}, " * (
        config.device == "auto" and bool(config.launch.gpus_per_rank))
    text = f"{asked}device = {config.device}: {socket.gethostname()} {found} ({reason})"
    if here and torch.version.cuda is not None and "too old" not in reason:
        raise RuntimeError(f"CUDA error: {text}; `nvidia-smi` there should say why")
    raise ConfigError(f"{text}; install a driver and a torch that fit each other, ask for GPUs "
                      "with launch.gpus_per_rank=1, or use device=cpu")


def broken_gpu(error: BaseException) -> bool:
    """Whether the card or its driver failed, as far as CUDA tells; not the program, nor memory."""
    return bool(_BROKEN.search(f"{type(error).__name__}: {error}"))


def _hidden() -> bool:
    """Whether whoever started this rank let it see no GPU."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown is not None and not re.match(r"\d|GPU-|MIG-", shown)


def _why_not() -> str:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return "no reason given"


# -- What ranks tell each other --------------------------------------------------------------------

@dataclass(frozen=True)
class Seat:
    """Where a rank computes."""

    host: str
    device: str  # cuda or cpu
    gpu: str = ""  # its UUID
    number: int = 0  # as this rank counts GPUs
    gpus: int = 0  # that it sees
    near: tuple[int, ...] = ()  # cores beside the GPU that this rank may use; () where not known


def seat(device: torch.device) -> Seat:
    """This rank's."""
    if device.type != "cuda":
        return Seat(socket.gethostname(), device.type)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return Seat(socket.gethostname(), "cuda", uuid, device.index, torch.cuda.device_count(),
                tuple(sorted(cores_near(uuid) & os.sched_getaffinity(0))))


def agree(own: Seat, store: Any, rank: int, size: int, config: Config) -> list[Seat]:
    """Every rank's seat. Collective.

    Raises: ConfigError, on all ranks, where some compute on GPUs and others on CPUs, or two on one
    GPU.
    """
    store.set(f"seat/{rank}", json.dumps(asdict(own)))
    told = [json.loads(text) for text in store.multi_get([f"seat/{r}" for r in range(size)])]
    seats = [Seat(**{**each, "near": tuple(each["near"])}) for each in told]
    problem = _disagreement(seats, config)
    store.add("seats read", 1)
    if problem:
        # The store ends with rank 0: let the others read it first, and say the same.
        deadline = time.monotonic() + 10
        while rank == 0 and store.add("seats read", 0) < size and time.monotonic() < deadline:
            time.sleep(0.05)
        raise ConfigError(problem)
    return seats


def order_of_sums(seats: list[Seat]) -> str:
    """What decides in which order a backend adds gradients over ranks, as far as it can be told.

    NCCL chooses rings, trees or the switch by its version, the cards and how they are wired.
    """
    if seats[0].device != "cuda":
        return f"gloo, {len(seats)} ranks"
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    nodes = Counter(each.host for each in seats).values()
    return f"NCCL {version}, {torch.cuda.get_device_name()}, {'+'.join(map(str, nodes))} ranks"


def _disagreement(seats: list[Seat], config: Config) -> str:
    first = {kind: rank for rank, kind in reversed(list(enumerate(s.device for s in seats)))}
    if len(first) > 1:
        where = " and ".join(f"rank {rank} on {seats[rank].host} computes on {kind}"
                             for kind, rank in sorted(first.items()))
        return (f"device = {config.device}: {where}; give every rank a GPU "
                "(launch.gpus_per_rank=1; `resnet-dist doctor` on the node without), or use "
                "device=cpu")
    owner: dict[str, int] = {}
    for rank, each in enumerate(seats):
        if each.gpu and owner.setdefault(each.gpu, rank) != rank:
            return (f"launch.ranks_per_node = {config.launch.ranks_per_node}: ranks "
                    f"{owner[each.gpu]} and {rank} would share GPU {each.number} of {each.host}, "
                    f"and a GPU takes one rank; set launch.ranks_per_node={each.gpus}, or "
                    "device=cpu")
    return ""


# -- Cores -----------------------------------------------------------------------------------------

def cores_per_rank(config: Config) -> int:
    """Cores this rank may use: what the launch gives it, or its share of this machine."""
    ranks_here = environment_int("LOCAL_WORLD_SIZE", config.launch.ranks_per_node)
    cores = config.launch.cpus_per_rank or len(os.sched_getaffinity(0)) // max(ranks_here, 1)
    return max(cores, 1)


def cores_near(uuid: str) -> set[int]:
    """The cores of the memory that a GPU is attached to; {} where the system does not tell."""
    for facts in _DRIVER.glob("*/information"):
        if uuid in facts.read_text():
            listed = _PCI / facts.parent.name / "local_cpulist"
            return parse_cpus(listed.read_text()) if listed.exists() else set()
    return set()


def parse_cpus(text: str) -> set[int]:
    """The kernel's way to write a set: 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def take_cores(own: Seat, seats: list[Seat], config: Config) -> int:
    """Bind this rank, and every thread that it will start, near its GPU; the cores for it.

    Its memory follows: the kernel gives pages where the thread runs that first writes them. Ranks
    whose GPUs hang on the same memory share its cores. Not where that would leave a rank with fewer
    cores than `launch.cpus_per_rank` asks for, or than are plenty: a GPU that waits for images is
    slower than one that is fed from afar.
    """
    cores = cores_per_rank(config)
    sharing = Counter((each.host, each.near) for each in seats)[own.host, own.near]
    share = len(own.near) // max(sharing, 1)
    if not own.near or share < (config.launch.cpus_per_rank or min(cores, _PLENTY)):
        return cores
    os.sched_setaffinity(0, own.near)
    log.info("bound to the %d cores near GPU %d, which %d rank(s) share", len(own.near),
             own.number, sharing)
    return min(cores, share)


# -- Settings --------------------------------------------------------------------------------------

def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back.

    By default it maps every large block afresh and unmaps it when freed, so that each activation of
    each step is paged in and zeroed again by the kernel: a ResNet-50 step at batch 32 took 480,000
    page faults and a third of its time; then none. Takes effect for what is allocated from now on.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, ...
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(top_pad, 64 << 20)


def settle_cuda(config: Config) -> None:
    """Choose kernels by shape alone, so that a resumed run computes the same bits.

    cuDNN's benchmark may pick another algorithm in every process, and some backward kernels add
    with atomics unless told not to.
    """
    allow_tf32(config.precision == "tf32")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory would cost a kernel per allocation; nothing here reads it unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def allow_tf32(allowed: bool) -> None:
    """TF32 for all float32 convolutions and matrix products on GPUs, or for none.

    torch would run convolutions in it by default, but not matrix products. Said in torch's older
    words, which set the newer `fp32_precision` as well: where only the newer were set, whoever
    reads the older ones (torch.compile does) gets an exception.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def environment_int(key: str, default: int) -> int:
    """A whole number that the launcher sets. Raises: ConfigError."""
    text = os.environ.get(key, str(default))
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"{key} = {text}: expected a whole number; the launcher sets it")
    return value
