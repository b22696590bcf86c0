"""What people get wrong, and what they are told: docs/mistakes.md, line by line.

`UPDATE_DOCS=1 pytest tests/unit/launcher/cli/test_mistakes.py` writes the page anew, to be read
before it is committed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import verbs as cli
from launcher.journal.events import Process, record
from tests.unit.launcher import slurm_stand_in
from tests.unit.launcher.stand_in import make_run

ROOT = Path(__file__).resolve().parents[4]
PAGE = ROOT / "docs" / "mistakes.md"
RECIPE = "configs/digits/quickstart.yaml"

# What was typed after `resnet-dist`; R stands for the recipe of the quickstart. Everything happens
# on a login node whose cluster has the partitions cpu, gpu (a100, v100), debug and old, in a folder
# with the digits in data/digits and the runs `done` (at its last step, 60) and `busy`.
MISTAKES = {
    "Recipes and settings": [
        "submit",
        "submit resnet50.yaml",
        "submit configs",
        "submit broken.yaml",
        "submit R lr=0.2",
        "submit R optimizer.lrr=0.2",
        "submit R steps=soon",
        "submit R --steps 100",
        "submit R fast",
        "submit R model=resnet51",
        "submit R optimizer.momentum=90",
        "submit R schedule.milestones=[300,200]",
        "submit R mode=exact engine=deepspeed",
        "submit R 'name=my run'",
        "submit R name=done",
    ],
    "Data sets": [
        "submit R data=data/imagenet",
        "submit R data=photos",
        "submit R data=data/cut",
        "submit R eval.split=test",
        "convert photo data/photos",
        "convert photos data/photos",
        "convert digits data/new qualty=80",
    ],
    "Batches and ranks": [
        "submit R batch_size=130",
        "submit R launch.ranks_per_node=3",
        "submit R mode=exact batch_size=384 launch.ranks_per_node=3",
        "submit R micro_batch=48",
        "train R launch.nodes=2",
    ],
    "The cluster": [
        "submit R cluster=dgx",
        "submit R launch.partition=gpus",
        "submit R launch.partition=old",
        "submit R launch.partition=debug",
        "submit R device=cuda",
        "submit R launch.partition=gpu device=cuda launch.gpu_type=h100",
        "submit R launch.partition=gpu device=cuda launch.cpus_per_rank=64",
        "submit R launch.constraint=infiniband",
        "submit R launch.account=music",
        "submit R launch.options.time=60",
        "submit R launch.grace_s=600 launch.time_minutes=5",
        "submit R --local launch.nodes=2",
        "doctor launch.nodes=2",
        "doctor --slurm steps=5",
    ],
    "Sweeps and chains": [
        "submit R --sweep seed",
        "submit R --sweep launch.nodes=1,2",
        "submit R --sweep seed=0,1 --local",
        "submit R --eval 12crop",
        "submit R --after yesterday",
        "submit R convert.workers=2",
    ],
    "Runs": [
        "status don",
        "logs done --rank 9",
        "stop done",
        "resume busy",
        "resume done",
        "resume done seed=1",
        "resume done steps=50",
        "resume done steps=70 --code newest",
        "eval done --protocol 5crop",
        "tensorboard --runs elsewhere",
    ],
}
HEAD = """\
# Mistakes and what they are answered with

{count} things that people type, and the message each gets. All of them end with exit code 2 before
anything is queued, converted or changed. `tests/unit/launcher/cli/test_mistakes.py` types them all,
compares, and writes this page. `R` stands for `configs/digits/quickstart.yaml`. The login node of
the examples has the partitions cpu, gpu (A100 and V100 nodes), debug and old, the data set
`data/digits`, and two runs: `done`, which has finished its 60 steps, and `busy`."""
COUNT = sum(map(len, MISTAKES.values()))


@pytest.fixture(scope="module")
def desk(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that MISTAKES speaks of."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    shutil.copytree(digits, folder / "data" / "cut")
    shard = next((folder / "data" / "cut" / "train").iterdir())
    shard.write_bytes(shard.read_bytes()[:1000])
    (folder / "photos").mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "broken.yaml").write_text("steps: [1, 2\n")
    done, config = make_run(folder / "runs" / "done")
    record(done, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(done, "finished", step=60, cause="")
    done.checkpoint(60).root.mkdir()
    done.checkpoint(60).state.write_text("{}")
    busy, config = make_run(folder / "runs" / "busy")
    record(busy, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(busy, "started", job="4711", where="local", nodes=["login"], **Process.this().facts)
    slurm_stand_in.install(folder / "bin")
    return folder


@pytest.fixture
def say(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> Callable[[str], tuple[int, str]]:
    """Type a command; exit code and what it wrote to standard error."""
    def type_in(line: str) -> tuple[int, str]:
        words = [RECIPE if word == "R" else word for word in shlex.split(line)]
        monkeypatch.chdir(desk)
        monkeypatch.setenv("PATH", f"{desk}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(desk / "home"))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("getpass.getuser", lambda: "me")
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 1), told.err

    return type_in


def tidy(text: str, desk: Path) -> str:
    """One line a message, without this machine's paths, frames and colours."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", text).replace(f"{desk}/home", "~/.config")
    text = text.replace(str(desk), "/home/me").replace(str(ROOT), "/home/me/resnet-dist")
    text = text.rpartition(" Error ")[2]  # of a box: what stands in it
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "<br>".join(line.removeprefix("error ") for line in lines if line)


def test_every_mistake_gets_the_message_that_the_page_shows(
        say: Callable[[str], tuple[int, str]], desk: Path) -> None:
    before = sorted(path.name for path in (desk / "runs").iterdir())
    wrong: list[object] = []
    page = [HEAD.format(count=COUNT)]
    for title, lines in MISTAKES.items():
        page += ["", f"## {title}", "", "| after `resnet-dist` | answer |", "|---|---|"]
        for line in lines:
            code, told = say(line)
            answer = tidy(told, desk).replace("|", "\\|")
            if code != 2 or "Traceback" in told or not answer:
                wrong.append((line, code, told))
            page.append(f"| `{line}` | {answer} |")
    assert wrong == []
    assert sorted(path.name for path in (desk / "runs").iterdir()) == before, "nothing was made"
    assert "sbatch" not in (desk / "bin" / "calls").read_text(), "nothing was queued"
    text = "\n".join(page) + "\n"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "UPDATE_DOCS=1 writes the page anew: read it"


@pytest.mark.parametrize("line", [
    "submit R optimizer.lrr=0.2", "submit R data=data/imagenet", "submit R launch.partition=gpus",
    "resume done seed=1", "submit R batch_size=130"])
def test_a_message_has_key_value_and_remedy(say: Callable[[str], tuple[int, str]], line: str
                                            ) -> None:
    key, _, value = line.split()[2].partition("=")
    told = say(line)[1]
    assert re.search(rf"(^|\s){re.escape(key.split('.')[-1])}|{key}", told)
    assert value in told
    assert re.search(r"did you mean|makes it|cannot change|try ", told)
