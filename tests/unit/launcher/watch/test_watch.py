"""logs, compare and tensorboard on runs as files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launcher.journal.events import record
from launcher.supervise.workers import last_error
from launcher.watch.board import tunnel
from launcher.watch.compare import compare_runs
from launcher.watch.logs import print_logs
from resnet_dist.config.schema import ConfigError
from resnet_dist.run.paths import RunPaths
from tests.unit.launcher.stand_in import make_run

# -- logs ------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> RunPaths:
    """Two ranks, two attempts (from 00:00:00 and 00:00:10); rank 1 fails in the first."""
    run, _ = make_run(tmp_path / "run")
    run.rank_log(0).write_text(
        "2026-01-01 00:00:01,000 rank 0 INFO: one\n2026-01-01 00:00:04,000 rank 0 INFO: four\n"
        "2026-01-01 00:00:11,000 rank 0 WARNING: resumed\n")
    run.rank_log(1).write_text(
        "2026-01-01 00:00:02,000 rank 1 INFO: two\n"
        "2026-01-01 00:00:03,000 rank 1 ERROR: failed\nTraceback:\n  boom\n"
        "2026-01-01 00:00:12,000 rank 1 INFO: last\nan unfinished li")
    for attempt, second in ((1, 0), (2, 10)):
        record(run, "attempt", attempt=attempt, step=0, reached=0, ranks=2, pids=[1, 2])
        lines = run.jobs.read_text().splitlines()
        event = {**json.loads(lines[-1]),
                 "time": datetime(2026, 1, 1, 0, 0, second).timestamp()}
        run.jobs.write_text("\n".join([*lines[:-1], json.dumps(event)]) + "\n")
    return run


def words(run: RunPaths, **options: object) -> list[str]:
    """The last word of every line that is printed."""
    text = io.StringIO()
    print_logs(Console(file=text, width=200), run, **options)  # type: ignore[arg-type]
    return [line.split()[-1] for line in text.getvalue().splitlines()]


def test_logs_are_merged_by_time_and_tracebacks_stay_together(logged: RunPaths) -> None:
    assert words(logged) == ["one", "two", "failed", "Traceback:", "boom", "four", "resumed",
                             "last"]


@pytest.mark.parametrize(("options", "shown"), [
    ({"ranks": [1]}, ["two", "failed", "Traceback:", "boom", "last"]),
    ({"level": "warning"}, ["failed", "Traceback:", "boom", "resumed"]),
    ({"level": "error"}, ["failed", "Traceback:", "boom"]),
    ({"grep": "bo+m"}, ["failed", "Traceback:", "boom"]),
    ({"attempt": 1}, ["one", "two", "failed", "Traceback:", "boom", "four"]),
    ({"attempt": 2, "ranks": [0]}, ["resumed"]),
    ({"since": "2026-01-01 00:00:04"}, ["four", "resumed", "last"]),
    ({"since": "2h"}, []),
])
def test_filters_keep_whole_entries(logged: RunPaths, options: dict, shown: list[str]) -> None:
    assert words(logged, **options) == shown


def test_stamps_in_utc_are_found_from_any_time_zone(logged: RunPaths,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run = logged
    run.rank_log(1).unlink()
    run.rank_log(0).write_text("2026-01-01 11:00:01,000Z rank 0 INFO: early\n"
                               "2026-01-01 12:00:01,000Z rank 0 INFO: late\n")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert words(run, since="2026-01-01 21:00") == ["late"]
        assert words(run, since="2026-01-01 11:30+00:00") == ["late"]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(("options", "message"), [
    ({"ranks": [7]}, "--rank = 7"), ({"grep": "("}, "--grep = \\(.*expression"),
    ({"level": "loud"}, "--level = loud: pick one of debug"), ({"since": "noon"}, "10m, 2h"),
    ({"attempt": 9}, "--attempt = 9: run has 1, 2")])
def test_a_filter_that_cannot_hold_is_refused(logged: RunPaths, options: dict, message: str
                                              ) -> None:
    with pytest.raises(ConfigError, match=message):
        words(logged, **options)


def test_json_has_one_object_an_entry(logged: RunPaths) -> None:
    text = io.StringIO()
    print_logs(Console(file=text), logged, level="error", as_json=True)
    (entry,) = [json.loads(line) for line in text.getvalue().splitlines()]
    moment = datetime(2026, 1, 1, 0, 0, 3).astimezone(UTC).isoformat(" ", "milliseconds")
    assert entry == {"time": moment, "rank": 1, "attempt": 1, "level": "ERROR",
                     "text": "2026-01-01 00:00:03,000 rank 1 ERROR: failed\nTraceback:\n  boom"}


def test_follow_prints_what_arrives_until_the_run_is_over(logged: RunPaths) -> None:
    code = ("import sys; from rich.console import Console; "
            "from resnet_dist.run.paths import RunPaths; "
            "from pathlib import Path; from launcher.watch.logs import print_logs;"
            "print_logs(Console(), RunPaths(Path(sys.argv[1])), level='warning', follow=True)")
    record(logged, "submitted", where="local", nodes=1, steps=1, batch_size=1)
    process = subprocess.Popen([sys.executable, "-c", code, str(logged.root)], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert [process.stdout.readline().split()[-1] for _ in range(4)][-1] == "resumed"
    with open(logged.rank_log(0), "a") as log:
        log.write("2026-01-01 00:00:20,000 rank 0 ERROR: late\n")
        log.write("2026-01-01 00:00:21,000 rank 0 INFO: not wanted\n")
    assert process.stdout.readline().split()[-1] == "late"
    with open(logged.rank_log(0), "a") as log:
        log.write("2026-01-01 00:00:22,000 rank 0 ERROR: end\n")
    record(logged, "finished", step=1)
    assert process.communicate(timeout=20)[0].split()[-1] == "end"


def test_the_cause_of_a_crash_is_told_without_stamp_rank_and_level() -> None:
    lines = ["2026-01-01 00:00:01,000 rank 1 INFO: one",
             "2026-01-01 00:00:02,000 rank 1 ERROR: ValueError: no such luck"]
    assert last_error(lines) == "ValueError: no such luck"


# -- compare ---------------------------------------------------------------------------------------

def with_curve(run: RunPaths, scale: float) -> RunPaths:
    with open(run.metrics, "w") as file:
        for step in range(10, 110, 10):
            file.write(json.dumps({"step": step, "kind": "train", "time": 0.0,
                                   "loss": scale / step, "images_per_s": 100 * scale}) + "\n")
            file.write(json.dumps({"step": step, "kind": "val", "time": 0.0, "loss": scale,
                                   "top1": 50.0 + (step if step < 80 else 0)}) + "\n")
        file.write(json.dumps({"step": 0, "kind": "event", "time": 0.0, "what": "start",
                               "text": "started", "value": 1}) + "\n")
    return run


def test_compare_tells_what_differs_and_draws_the_curves(tmp_path: Path) -> None:
    first = with_curve(make_run(tmp_path / "first")[0], 1.0)
    second = with_curve(make_run(tmp_path / "second")[0], 2.0)
    second.config.write_text(second.config.read_text().replace("seed: 0", "seed: 7"))
    text = io.StringIO()
    compare_runs(Console(file=text), [first, second], "loss", None, as_json=True)
    found = json.loads(text.getvalue())
    assert found["settings"] == {"seed": [0, 7]}
    assert found["train"]["second"] == [[step, 2.0 / step] for step in range(10, 110, 10)]
    best = [(each["best top-1"], each["at step"], each["images/s, median"])
            for each in found["standing"]]
    assert best == [(120.0, 70, 100.0), (120.0, 70, 200.0)]
    text = io.StringIO()
    compare_runs(Console(file=text, width=90), [first, second], "top1", tmp_path / "c.png",
                 as_json=False)
    shown = text.getvalue()
    assert "val top1" in shown
    assert "train top1" not in shown
    assert "seed" in shown
    assert max(map(len, shown.splitlines())) <= 90
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="--curve = lss: no such figure; did you mean 'loss'"):
        compare_runs(Console(file=text), [first, second], "lss", None, as_json=False)
    with pytest.raises(ConfigError, match="name different runs"):
        compare_runs(Console(file=text), [first, first], "loss", None, as_json=False)


# -- tensorboard -----------------------------------------------------------------------------------

def test_the_tunnel_leads_to_where_tensorboard_listens() -> None:
    assert tunnel({"USER": "ada"}, 6006) == ""
    ssh = {"USER": "ada", "SSH_CONNECTION": "203.0.113.9 51000 198.51.100.4 22"}
    assert tunnel(ssh, 6007) == "ssh -N -L 6007:localhost:6007 ada@198.51.100.4"
    job = {**ssh, "SLURM_JOB_ID": "5", "SLURM_SUBMIT_HOST": "login1", "SLURMD_NODENAME": "n7"}
    assert tunnel(job, 6006) == "ssh -N -L 6006:localhost:6006 -J ada@login1 ada@n7"


@pytest.mark.parametrize("everyone", [False, True])
def test_it_listens_on_localhost_alone_unless_told(tmp_path: Path, everyone: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [str(Path(sys.executable).with_name("resnet-dist")), "tensorboard", "--runs",
                   str(tmp_path), *(["--everyone"] if everyone else []), "--port"]
        refused = subprocess.run([*command, str(port)], capture_output=True, text=True)
        assert refused.returncode == 2
        assert f"--port = {port}" in refused.stderr
    environment = {**os.environ, "SSH_CONNECTION": "203.0.113.9 51000 198.51.100.4 22",
                   "USER": "ada", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*command, str(port)], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               process_group=0)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20)
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        listening = {connection.laddr.ip for connection in psutil.net_connections("inet")
                     if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port}
        assert listening == ({"0.0.0.0"} if everyone else {"127.0.0.1"})
        process.terminate()  # of the command alone: what it started ends with it
        shown = process.communicate(timeout=20)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    if everyone:
        assert "without a password" in shown
    else:
        assert f"ssh -N -L {port}:localhost:{port} ada@198.51.100.4" in shown
