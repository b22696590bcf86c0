"""Which device and which cores a rank takes: the driver's answers are stand-ins, the refusals, the
store and the processes are real."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.ranks import devices, distributed
from resnet_dist.ranks.devices import Seat, parse_cpus, take_cores
from resnet_dist.train import other_sums
from tests.dist.harness import run_ranks
from tests.dist.runs import make_config


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev, driver and PCI bus of our own, and a torch that cannot use a GPU."""
    for name in ("dev", "driver", "pci"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(devices, "_DEV", tmp_path / "dev")
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(devices, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def wants(device: str = "auto", **launch: Any) -> Config:
    return make_config(1, device=device, launch={"ranks_per_node": 1, **launch})


# -- Is it a GPU? ----------------------------------------------------------------------------------

def test_auto_is_a_cpu_where_nothing_says_that_gpus_were_meant(machine: Path) -> None:
    (machine / "dev" / "nvidiactl").touch()  # a driver without a card
    assert devices.choose_device(wants(), 0).type == "cpu"


def test_auto_never_trains_on_cpus_where_gpus_were_asked_for(machine: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch.gpus_per_rank = 1, device = auto: \S+ shows "
                                          r"torch \S+ no GPU .*device=cpu"):
        devices.choose_device(wants(gpus_per_rank=1), 0)


def test_auto_never_trains_on_cpus_beside_a_gpu_that_torch_cannot_use(
        machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "dev" / "nvidia0").touch()
    with pytest.raises(ConfigError, match=r"device = auto: \S+ has nvidia0, but torch \S+ cannot"):
        distributed.init_world(wants())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="has nvidia0"):
        distributed.init_world(wants())
    assert devices.choose_device(wants("cpu"), 0).type == "cpu", "unless it is told to"


@pytest.mark.parametrize("shown", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_on_purpose_are_not_missed(
        machine: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    (machine / "dev" / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert devices.choose_device(wants(), 0).type == "cpu"


def test_a_node_whose_gpus_fail_is_at_fault_and_not_the_configuration(
        machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor answers a crash with another attempt, and bad input with the end of the run;
    a driver that is too old for torch is bad input."""
    (machine / "dev" / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def init(reason: str) -> Any:
        def fails() -> None:
            raise RuntimeError(reason)
        return fails

    monkeypatch.setattr(torch.cuda, "init", init("Error 802: system not yet initialized"))
    with pytest.raises(RuntimeError, match=r"CUDA error: device = cuda: .*Error 802"):
        devices.choose_device(wants("cuda"), 0)
    monkeypatch.setattr(torch.cuda, "init", init("The NVIDIA driver on your system is too old "
                                                 "(found version 11040). Please update."))
    with pytest.raises(ConfigError, match="too old"):
        devices.choose_device(wants("cuda"), 0)


# -- Do all ranks have one, and each its own? ------------------------------------------------------

def start(seats: list[Seat]) -> str:
    """Join a group as `seats` says; how many ranks there are, or what is refused."""
    devices_own = seats[int(os.environ["RANK"])]
    distributed.seat = lambda _: devices_own  # type: ignore[attr-defined]
    distributed.order_of_sums = lambda _: ""  # type: ignore[attr-defined]
    try:
        world = distributed.init_world(make_config(len(seats)))
    except ConfigError as error:
        return str(error)
    distributed.shutdown()
    return str(world.size)


GPUS = [Seat(node, "cuda", f"{node} {gpu}", gpu, 2) for node in ("n1", "n2") for gpu in (0, 1)]


def test_ranks_that_agree_start() -> None:
    assert run_ranks(start, 4, GPUS) == ["4"] * 4


def test_every_rank_refuses_at_once_where_some_have_gpus_and_others_do_not() -> None:
    """They would wait ten minutes for each other, one in NCCL, the other in gloo."""
    said = run_ranks(start, 4, [*GPUS[:3], Seat("n7", "cpu")], timeout=60)
    assert set(said) == {said[0]}
    assert "device = cpu: rank 3 on n7 computes on cpu and rank 0 on n1 computes on cuda" in said[0]


def test_every_rank_refuses_to_share_a_gpu() -> None:
    """NCCL would say "Duplicate GPU detected", after a minute, and be restarted three times."""
    seats = [Seat("n1", "cuda", "a", 0, 1), Seat("n1", "cuda", "a", 0, 1)]
    said = run_ranks(start, 2, seats, timeout=60)
    assert set(said) == {said[0]}
    assert said[0].startswith("launch.ranks_per_node = 2: ranks 0 and 1 would share GPU 0 of n1, ")
    assert "set launch.ranks_per_node=1, or device=cpu" in said[0]


def test_ranks_that_each_see_their_own_gpu_as_number_0_do_not_share_it() -> None:
    seats = [Seat("n1", "cuda", name, 0, 1) for name in "ab"]
    assert run_ranks(start, 2, seats) == ["2", "2"]


def test_a_checkpoint_says_what_decides_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    sums = devices.order_of_sums(GPUS)
    assert sums == "NCCL 2.27.3, NVIDIA H100, 2+2 ranks"
    assert devices.order_of_sums([Seat("n1", "cpu"), Seat("n2", "cpu")]) == "gloo, 2 ranks"
    world = distributed.World(0, 4, 0, torch.device("cuda", 0), sums=sums)
    fast, exact = make_config(4), make_config(4, mode="exact")
    for config, before, warned in (
            (fast, {"sums": sums}, False), (fast, None, False), (fast, {}, False),
            (fast, {"sums": "NCCL 2.21.5, NVIDIA H100, 2+2 ranks"}, True),
            (exact, {"sums": "gloo, 2 ranks"}, False)):
        assert bool(other_sums(config, world, before)) is warned


# -- Cores -----------------------------------------------------------------------------------------

def test_a_gpus_cores_are_those_of_its_memory(machine: Path) -> None:
    for number, cores in enumerate(("0-3,8-11", "4-7,12-15")):
        address = f"0000:{number}b:00.0"
        (machine / "driver" / address).mkdir()
        (machine / "driver" / address / "information").write_text(
            f"Model:\t\t NVIDIA H100\nGPU UUID:\t GPU-{number}f-1\nBus Location: \t {address}\n")
        (machine / "pci" / address).mkdir()
        (machine / "pci" / address / "local_cpulist").write_text(cores + "\n")
    assert devices.cores_near("1f-1") == {4, 5, 6, 7, 12, 13, 14, 15}
    assert devices.cores_near("other") == set()
    assert parse_cpus("") == set()


SOCKETS = tuple(range(32)), tuple(range(32, 64))


def bound(monkeypatch: pytest.MonkeyPatch, seats: list[Seat], **launch: Any) -> tuple[int, Any]:
    """Cores of the first rank, and what it bound itself to, on a machine of 64."""
    taken = []
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(devices, "os", types.SimpleNamespace(
        environ=os.environ, sched_getaffinity=lambda _: set(range(64)),
        sched_setaffinity=lambda _, cores: taken.append(cores)))
    config = wants("cuda", **{"ranks_per_node": len(seats), **launch})
    return take_cores(seats[0], seats, config), taken


def eight(near: tuple[tuple[int, ...], ...]) -> list[Seat]:
    return [Seat("n1", "cuda", str(gpu), gpu, 8, near[gpu // 4]) for gpu in range(8)]


def test_ranks_share_the_cores_of_their_gpus_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound(monkeypatch, eight(SOCKETS)) == (8, [SOCKETS[0]])
    assert bound(monkeypatch, eight(SOCKETS), cpus_per_rank=4) == (4, [SOCKETS[0]])
    alone = [Seat("n1", "cuda", "a", 0, 1, SOCKETS[1])]
    assert bound(monkeypatch, alone) == (32, [SOCKETS[1]])


def test_no_rank_is_bound_where_that_would_starve_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system says nothing, or a quarter of the machine has all the GPUs."""
    assert bound(monkeypatch, eight(((), ()))) == (8, [])
    quarter = tuple(range(16))
    assert bound(monkeypatch, eight((quarter, quarter))) == (8, [])
    assert bound(monkeypatch, eight(SOCKETS), cpus_per_rank=12) == (12, [])


def test_threads_that_start_later_stay_near_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(threads_cores, 1) == [True]


def threads_cores() -> bool:
    import threading

    core = min(os.sched_getaffinity(0))
    own = Seat("n1", "cuda", "a", 0, 1, (core,))
    take_cores(own, [own], make_config(1, device="cuda", launch={"cpus_per_rank": 1}))
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found == [{core}]


# -- Settings --------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_tf32_is_on_or_off_as_a_whole_in_torchs_old_words_and_new(precision: str) -> None:
    assert run_ranks(tf32_of, 1, precision) == [{precision == "tf32"}]


def tf32_of(precision: str) -> set[bool]:
    devices.settle_cuda(make_config(1, precision=precision))
    backends = torch.backends
    return {backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision() != "highest",
            *(part.fp32_precision == "tf32" for part in (
                backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul))}


def test_a_cpu_rank_takes_its_share_and_is_not_bound(machine: Path) -> None:
    before = os.sched_getaffinity(0)
    world = distributed.init_world(wants("cpu", cpus_per_rank=1))
    assert world.cores == 1
    assert os.sched_getaffinity(0) == before


def test_what_hidden_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown, hidden in (("0,1", False), ("GPU-8f", False), ("MIG-1", False), ("", True)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert devices._hidden() is hidden


