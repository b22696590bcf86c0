"""The command as a user meets it: help at once, mistakes told at once, no traceback."""

import json
import resource
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

QUICK = ROOT / "configs" / "cifar10" / "resnet20_quick.yaml"


def test_help_lists_every_verb_and_is_quick(cli: Cli) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = cli("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for verb in ("convert", "verify", "submit", "train", "status", "logs", "stop", "resume", "eval",
                 "tensorboard", "export", "doctor"):
        assert f" {verb} " in shown.stdout
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 0.6, "the help must not import what it does not need"


@pytest.mark.parametrize(("arguments", "key", "value", "remedy"), [
    (["optimizer.lrr=1"], "optimizer.lrr", "1", "did you mean 'lr'"),
    (["steps=soon"], "steps", "soon", "valid integer"),
    (["data=/no/such/folder"], "data.path", "/no/such/folder", "resnet-dist convert"),
    ([], "data.path", "data/cifar10", "resnet-dist convert"),
    (["data.path=null"], "data.path", "null", "data="),
    (["batch_size=130"], "bn_batch", "64", "must divide batch_size = 130"),
    (["launch.nodes=3"], "launch.nodes", "3", "must divide batch_size / bn_batch = 2"),
    (["nonsense"], "override", "nonsense", "key=value"),
])
def test_a_mistake_exits_2_within_two_seconds(
        cli: Cli, tmp_path: Path, arguments: list[str], key: str, value: str,
        remedy: str) -> None:
    began = time.perf_counter()
    done = cli("submit", QUICK, *arguments, cwd=tmp_path)
    seconds = time.perf_counter() - began
    assert done.returncode == 2
    for part in (key, value, remedy):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 2.0
    assert not (tmp_path / "runs").exists()


def test_a_missing_recipe_and_a_missing_run_exit_2(cli: Cli, tmp_path: Path) -> None:
    for arguments in (["submit", "none.yaml"], ["eval", "none"], ["logs", "none"], ["stop", "none"],
                      ["resume", "none"], ["logs", "../../etc"]):
        done = cli(*arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert arguments[1] in done.stderr
        assert "Traceback" not in done.stderr


def test_doctor_finds_this_machine_ready(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json", cwd=tmp_path)
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    for what in ("python", "torch", "ffcv", "deepspeed", "decoder", "submitit", "file system"):
        assert findings[what]["state"] == "ok", findings[what]
