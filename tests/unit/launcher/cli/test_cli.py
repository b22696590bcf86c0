"""The command as a user meets it: help at once, mistakes told at once, no traceback."""

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli.verbs import app
from launcher.foreground import train_here
from launcher.journal.events import record
from launcher.watch.board import run_tensorboard
from resnet_dist.run.paths import RunPaths
from tests.conftest import ROOT, Cli

RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
QUICK = ROOT / "configs" / "cifar10" / "resnet20_quick.yaml"


def cpu_s(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of the processes that `call` waits for: other programs' does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def test_help_lists_every_verb_and_is_quick(cli: Cli) -> None:
    bare = [sys.executable, "-c", "import typer.rich_utils, rich.markdown"]
    spent, least = [], []
    for _ in range(3):
        seconds, shown = cpu_s(lambda: cli("--help"))
        spent.append(seconds)
        least.append(cpu_s(lambda: subprocess.run(bare, check=True))[0])
    for verb in ("convert", "verify", "submit", "train", "status", "logs", "stop", "resume", "eval",
                 "tensorboard", "export", "doctor"):
        assert f" {verb} " in shown.stdout
    # 0.3 s on a machine with nothing else to do; on a busy one the same share of what it cannot do
    # without, as a core that is shared takes longer for the same instructions.
    assert min(spent) < max(0.3, 1.6 * min(least)), "the help must not import what it does not need"


def verbs() -> dict[str, Any]:
    """Each command by what is typed for it, those of `bench` too."""
    from typer.main import get_command

    top: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    bench = top.pop("bench").commands
    return top | {f"bench {name}": command for name, command in bench.items()}


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verbs_help_has_an_example_that_names_real_options(verb: str) -> None:
    described = verbs()[verb]
    examples = re.findall(rf"`resnet-dist {verb}([^`]*)`", described.help)
    assert examples
    known = {option for parameter in described.params for option in parameter.opts}
    for option in re.findall(r"\s(-{1,2}[a-z][\w-]*)", " ".join(examples)):
        assert option in known, option


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_speaks_json(verb: str) -> None:
    assert "--json" in {option for each in verbs()[verb].params for option in each.opts}


def test_help_shows_all_options_with_what_they_mean(cli: Cli) -> None:
    shown = " ".join(cli("logs", "--help", env={"COLUMNS": "100"}).stdout.split())
    for part in ("Usage: resnet-dist logs [OPTIONS] {RUN}", "merged by time, each line with its",
                 "resnet-dist logs resnet50 --level warning --since 2h", "--grep REGEX",
                 "an age such as 10m, 2h or 1d", "[default: runs]", "--follow -f"):
        assert part in shown, (part, shown)
    assert "`" not in shown


def test_train_tells_in_json_what_became_of_it(
        digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def supervised(run: RunPaths) -> int:
        record(run, "submitted", where="foreground", nodes=1, steps=400, batch_size=128)
        record(run, "failed", cause="rank 1: boom", step=7)
        return 1

    monkeypatch.setattr("launcher.foreground.supervise_here", supervised)
    code = train_here(RECIPE, [f"data={digits}", f"runs={tmp_path}", "name=one"], as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (code, told["name"], told["state"], told["cause"]) == (1, "one", "failed",
                                                                  "rank 1: boom")


@pytest.mark.parametrize("everyone", [False, True])
def test_tensorboard_tells_address_and_tunnel_in_json(
        tmp_path: Path, everyone: bool, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    start = subprocess.Popen
    monkeypatch.setattr("launcher.watch.board.subprocess.Popen", lambda words: start(["true"]))
    monkeypatch.setenv("SSH_CONNECTION", "laptop 51000 login1 22")
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_tensorboard(Console(), [], str(tmp_path), port, everyone=everyone, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["everyone"] is everyone
    assert told["address"].endswith(f":{port}")
    assert told["tunnel"] == (None if everyone else f"ssh -N -L {port}:localhost:{port} me@login1")


def test_off_a_terminal_there_are_no_colours_and_json_is_json(cli: Cli, tmp_path: Path) -> None:
    assert "\x1b" not in cli("--help").stdout
    assert "\x1b" not in cli("submit", "none.yaml", cwd=tmp_path).stderr
    found = json.loads(cli("submit", RECIPE, "data=none", "--json", cwd=ROOT).stdout or "{}")
    assert found == {}, "a refusal is not JSON on standard output"


def complete(cli: Cli, words: str, cwd: Path) -> list[str]:
    """What bash is offered behind `words`."""
    shown = cli(cwd=cwd, env={"_RESNET_DIST_COMPLETE": "complete_bash",
                              "COMP_WORDS": f"resnet-dist {words}",
                              "COMP_CWORD": str(len(words.split(" ")))})
    return shown.stdout.split()


def test_the_shell_completes_verbs_recipes_settings_and_runs(cli: Cli, tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert complete(cli, "su", tmp_path) == ["submit"]
    assert complete(cli, "submit configs/dig", tmp_path) == ["configs/digits/"]
    assert complete(cli, "submit configs/digits/", tmp_path) == ["configs/digits/quickstart.yaml"]
    assert complete(cli, "submit x.yaml launch.nod", tmp_path) == ["launch.nodes="]
    assert "launch." in complete(cli, "submit x.yaml la", tmp_path)
    assert complete(cli, "submit x.yaml cluster=gr", tmp_path) == ["cluster=gres"]
    for verb in ("status", "logs", "stop", "resume", "eval"):
        assert sorted(complete(cli, f"{verb} ", tmp_path)) == ["alpha", "beta"], verb
        assert complete(cli, f"{verb} b", tmp_path) == ["beta"], verb


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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cli("submit", QUICK, *arguments, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
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
