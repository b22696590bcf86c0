"""What `doctor` makes of settings and measurements."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.doctor import machine
from launcher.doctor.machine import examine
from launcher.doctor.nodes import DoctorJob, _merged, between_nodes, job_config
from launcher.doctor.slurm import finding, judged, slurm_findings
from resnet_dist.config.load import dump_config
from resnet_dist.config.schema import ConfigError
from resnet_dist.ranks import probe
from tests.unit.launcher import slurm_stand_in

GOOD = {"JobRequeue": "1", "KillWait": "30 sec", "PreemptMode": "REQUEUE",
        "PreemptParameters": "send_user_signal", "RequeueExit": "77"}


@pytest.mark.parametrize(("setting", "value", "state", "remedy"), [
    ("JobRequeue", "1", "ok", ""), ("JobRequeue", "0", "ok", "asks for --requeue itself"),
    ("KillWait", "30 sec", "ok", ""), ("KillWait", "10 sec", "note", "within 10 s of scancel"),
    ("PreemptMode", "CANCEL", "note", "not queued again by SLURM"),
    ("PreemptMode", "SUSPEND,GANG", "note", "GPUs' contents"), ("PreemptMode", "OFF", "ok", ""),
    ("PreemptParameters", "(null)", "ok", "without send_user_signal"),
    ("PreemptParameters", "send_user_signal", "ok", ""),
    ("RequeueExit", "(null)", "ok", "77 there"), ("RequeueExit", "77", "ok", "")])
def test_each_setting_is_judged_by_what_it_costs_a_run(setting: str, value: str, state: str,
                                                       remedy: str) -> None:
    lines = {line["what"]: line for line in judged(GOOD | {setting: value})}
    line = lines[f"slurm {setting}"]
    assert line["state"] == state
    assert (remedy in line["remedy"]) if remedy else (line["remedy"] == "")


def measured(**facts: object) -> dict[str, dict[str, str]]:
    told = {"backend": "nccl", "ranks": 16, "gradient_s": 0.01, "bus_gb_per_s": 20.0,
            "link_gb_per_s": [25.0] * 16, "clock_skew_s": 0.001,
            "folder": {"seen_s": 0.1, "lock": True}, **facts}
    return {line["what"]: line for line in between_nodes(told, 2)}


def test_good_nodes_have_no_remedies() -> None:
    lines = measured()
    assert {line["state"] for line in lines.values()} == {"ok"}
    assert not any(line["remedy"] for line in lines.values())
    assert "20.00 GB/s of the link's 25.0" in lines["all-reduce"]["found"]


@pytest.mark.parametrize(("facts", "what", "remedy"), [
    ({"bus_gb_per_s": 1.1}, "all-reduce", "NCCL_SOCKET_IFNAME"),
    ({"clock_skew_s": 7.0}, "clocks", "chrony"),
    ({"folder": {"seen_s": None, "lock": True}}, "shared folder", "runs=DIR"),
    ({"folder": {"seen_s": 0.1, "lock": False}}, "shared locks", "-o flock")])
def test_each_defect_between_nodes_is_a_problem_with_a_remedy(facts: dict, what: str,
                                                              remedy: str) -> None:
    lines = measured(**facts)
    assert [name for name, line in lines.items() if line["state"] == "problem"] == [what]
    assert remedy in lines[what]["remedy"]


def test_without_gpus_it_says_that_nccl_was_not_tried() -> None:
    lines = measured(backend="gloo", link_gb_per_s=[None] * 16)
    assert "not tried" in lines["NCCL"]["found"]
    assert "link speed unknown" in lines["all-reduce"]["found"]


def test_what_all_nodes_say_alike_is_one_line() -> None:
    alike, other = finding("ok", "a", "1"), finding("problem", "b", "2", "do")
    merged = _merged([[alike | {"where": "n1"}],
                      [alike | {"where": "n2"}, other | {"where": "n2"}]])
    assert [(line["what"], line["where"]) for line in merged] == [("a", "all"), ("b", "n2")]


def test_the_job_takes_settings_of_the_cluster_alone(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("partition: gpu\nranks_per_node: 3\n")
    config = job_config([f"cluster={profile}", "launch.nodes=5", "data=d"])
    assert (config.launch.partition, config.world) == ("gpu", 15)
    assert config.launch.time_minutes == 10, "it does not wait for a long slot in the queue"
    assert config.data.path == str(Path("d").absolute())
    with pytest.raises(ConfigError, match=r"steps = 5: doctor takes settings of launch, cluster"):
        job_config(["steps=5"])


def test_slurms_lines_come_from_a_cluster_that_answers(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm_stand_in.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert {"slurm", "slurm KillWait", "slurm sacct"} <= {f["what"] for f in slurm_findings()}
    slurm_stand_in.program(folder, "scontrol", "echo 'Unable to contact controller' >&2; exit 1")
    (line,) = slurm_findings()
    assert (line["state"], line["found"]) == ("problem", "Unable to contact controller")


def test_a_data_set_is_looked_at_where_one_is_named(digits: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.doctor.machine._NATIVE", {})
    monkeypatch.setattr("launcher.doctor.machine._gpus", list)
    found = examine(tmp_path, slurm=False, data=str(digits))[-1]
    assert (found["state"], found["what"]) == ("ok", "data set")
    assert "1,438 train" in found["found"]
    assert examine(tmp_path, slurm=False, data="/nowhere")[-1]["state"] == "problem"


def test_the_probe_measures_one_rank_alone(tmp_path: Path) -> None:
    """The whole path with a world of one; tests/slurm has two nodes."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "RANK": "0",
                                "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    (tmp_path / "config.yaml").write_text(dump_config(job_config(["data=d"])))
    done = subprocess.run([sys.executable, "-m", "resnet_dist.ranks.probe", str(tmp_path)],
                          text=True, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["folder"]["lock"] is True
    assert told["folder"]["seen_s"] is not None
    assert told["gradient_s"] > 0


def test_the_ranks_meet_as_training_ranks_do(tmp_path: Path) -> None:
    """By the job's configuration: two on one GPU, say, are refused in training's words."""
    config = job_config(["data=d", "launch.ranks_per_node=2"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    job = DoctorJob(str(tmp_path), 2, None)
    found = {line["what"]: line for line in job._together(0, ["n1"], "7")}
    assert "gloo, 2 ranks on 1 node" in found["all-reduce"]["found"], found
    (tmp_path / "config.yaml").write_text(dump_config(replace(config, device="cuda")))
    (line,) = job._together(0, ["n1"], "8")
    assert "device = cuda" in line["found"]
    assert line["remedy"] == "", "the message has one"


def test_ports_without_a_link_carry_nothing(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for port, (state, rate) in enumerate([("4: ACTIVE", "400 Gb/sec (4X NDR)"),
                                          ("1: DOWN", "400 Gb/sec (4X NDR)"),
                                          ("2: INIT", "10 Gb/sec (4X SDR)")]):
        folder = tmp_path / f"mlx5_{port}" / "ports" / "1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
        (folder / "rate").write_text(rate + "\n")
    monkeypatch.setattr(probe, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(probe.dist, "get_backend", lambda: "nccl")
    assert probe.link_gb_per_s() == 50.0


@pytest.mark.parametrize(("gpus", "cores", "state", "said"), [
    (8, 128, "ok", "16 cores a GPU: enough"), (8, 48, "note", "6 cores a GPU: an H200 would wait "
     "for images with heavy"), (4, 8, "note", "of any ResNet-50"), (8, 2, "note", "2 cores for 8")])
def test_it_says_whether_the_cores_can_feed_the_gpus(
        gpus: int, cores: int, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_child", lambda *_: finding("ok", "gpus", ", ".join(
        ["NVIDIA H200"] * gpus)))
    monkeypatch.setattr(machine, "_driver", list)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(cores)))
    line = machine._gpus()[-1]
    assert (line["what"], line["state"]) == ("feeding", state)
    assert said in line["found"]
