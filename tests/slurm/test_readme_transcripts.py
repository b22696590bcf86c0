"""The README's examples, typed one after the other on the local SLURM.

A command stands behind `$ `, what it printed below it. A line of output holds when the command
prints it again, numbers, times, paths and precision apart; `...` stands for what is left out.
Commands that only look are repeated until what they show is what the README shows: a job takes its
time.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

# One story, told on the digits with a cluster of four nodes.
STORY = ("### Submit", "### Watch", "### Look at the curves", "### Resume", "### Evaluate")
LOOKS = ("status", "doctor")
SUBMITS = re.compile(r"--sweep|--convert")
NAMES = re.compile(r"name=(\w+)")


def transcripts(*sections: str) -> list[tuple[str, list[str]]]:
    """(command, lines it printed) in the order of the README."""
    text = (ROOT / "README.md").read_text()
    found: list[tuple[str, list[str]]] = []
    for section in sections:
        body = re.split(r"\n##+ ", text.split(f"\n{section}\n")[1])[0]
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", body, re.M):
            lines = [line[4:] for line in block.splitlines() if line.startswith("    ")]
            for line in lines:
                if found and found[-1][0].endswith("\\") and not found[-1][1]:
                    found[-1] = (found[-1][0][:-1].strip() + " " + line.strip(), [])
                elif line.startswith("$ "):
                    found.append((line[2:], []))
                elif found and lines[0].startswith("$ "):
                    found[-1][1].append(line)
    return found


def skeleton(line: str) -> str:
    """What stays the same from run to run."""
    line = re.sub(r"[┏┓┗┛┡┩┃│━─┴┬┼└┘╇┳┻├┤]", " ", line)
    line = re.sub(r"/[\w./-]+/", "PATH/", line)
    line = re.sub(r"\b(bf16|fp16|fp32)\b", "PRECISION", line)  # of `auto`: the machine's
    line = re.sub(r"\b\d+[dhms]\d*[hms]?\b|[\d][\d,.:%T-]*|-(?=\s)", "#", line)
    return " ".join(line.split())


@pytest.fixture
def home(slurm: Any, digits: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_a_skeleton_forgets_numbers_paths_and_precision_alone() -> None:
    assert skeleton("│ digits │ running │ 37 / 100 │ - │ 24s │ 1.852 │") == \
        skeleton("│ digits │ running │ 9 / 100 │ 51.2 │ 1m05s │ 0.1 │")
    assert skeleton("submitted  job 3, run directory /home/me/runs/a") == \
        skeleton("submitted  job 41, run directory /tmp/x/runs/a")
    assert skeleton("20 steps of 128 images in fp32") == skeleton("9 steps of 8 images in bf16")
    assert skeleton("a │ running") != skeleton("a │ failed")


def type_in(command: str, shown: list[str], folder: Path) -> None:
    """Type a command in `folder`; it must end well and print what is shown."""
    words = shlex.split(command)
    assert words[0] == "resnet-dist"
    wanted = [skeleton(line) for line in shown if line.strip() not in ("", "...")]
    if words[1] == "tensorboard":
        serve(words[1:], [line for line in shown if line.strip() != "..."], folder)
        return
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words[1:]], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
            env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, (command, done.stdout)
        printed = [skeleton(line) for line in done.stdout.splitlines()]
        missing = [line for line in wanted if line and not any(
            each == line or (line.endswith("...") and each.startswith(line[:-3].strip()))
            for each in printed)]
        if not missing:
            return
        late = time.monotonic() > deadline or words[1] not in LOOKS
        assert not late, (command, missing, done.stdout)
        time.sleep(0.5)


def serve(words: list[str], shown: list[str], folder: Path) -> None:
    """TensorBoard, as over SSH: it must say how to reach it, be there, and end at Ctrl-C."""
    process = subprocess.Popen(  # a shell's background job, as these tests may be, ignores Ctrl-C
        ["env", "--default-signal=INT", sys.executable, "-u", "-m", "launcher.cli", *words],
        cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "USER": "me",
             "SSH_CONNECTION": "laptop 51000 login1 22"})
    try:
        assert process.stdout is not None
        assert [process.stdout.readline().rstrip() for _ in shown] == shown
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(shown[-1].split()[-1], timeout=20)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0


def test_the_conversion_prints_what_the_readme_shows(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar10-jpeg.tar.gz").symlink_to(samples / "cifar10-jpeg.tar.gz")
    said = transcripts("### Convert")
    assert [command.split()[1] for command, _ in said] == ["convert", "verify"]
    for command, shown in said:
        type_in(command, shown, tmp_path)


@pytest.mark.timeout(600)
def test_the_story_prints_what_the_readme_shows(home: Path) -> None:
    said = transcripts(*STORY)
    verbs = {command.split()[1] for command, _ in said}
    assert verbs >= {"submit", "train", "status", "logs", "stop", "resume", "eval", "tensorboard",
                     "compare", "export", "doctor"}  # convert and verify: above; bench: too long
    # The run `digits` goes on while one reads about sweeps: its story first, then the rest.
    said.sort(key=lambda pair: not re.search(r"name=digits|digits launch|digits$", pair[0]))
    for command, shown in said:
        type_in(command, shown, home)
        if SUBMITS.search(command):  # what becomes of these, test_campaign_slurm.py follows
            subprocess.run(["scancel", f"--name={NAMES.search(command)[1]}"], check=True)
    assert not list((home / "runs").glob(".doctor*")), "the doctor leaves nothing behind"
