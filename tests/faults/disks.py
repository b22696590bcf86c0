"""Faults of files: no space, failing disks, damaged checkpoints, damaged and exchanged data."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from launcher.frozen.freeze import create_run, rewrite_config
from resnet_dist.config.load import config_from_dict, config_to_dict, load_frozen
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards import beton
from resnet_dist.data.shards.beton import index_digest
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.run import checkpoint
from resnet_dist.run.paths import RunPaths
from tests.faults.ground import STEPS, Difference, Ground, Seen, environment, expect
from tests.unit.data_prep.material import hashes as hashes_of
from tests.unit.data_prep.material import make_tree
from tests.unit.run.test_checkpoint import make_state, same_bits

# -- Writing checkpoints ---------------------------------------------------------------------------

def killed_between_renames(ground: Ground) -> Seen:
    """SIGKILL before and after each rename of a commit that replaces a checkpoint."""
    for moment in range(4):
        with tempfile.TemporaryDirectory(dir=ground.folder) as folder:
            run = RunPaths(Path(folder) / "run")
            checkpoint.write(run, 1, make_state(1), {})
            child = os.fork()
            if child == 0:
                _die_at(moment)
                checkpoint.write(run, 1, make_state(2), {})
                os._exit(1)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            expect(killed, "the writer was not killed")
            checkpoint.clean(run)
            found = checkpoint.newest_valid(run)
            expect(found is not None, f"nothing valid after a kill at moment {moment}")
            state = checkpoint.load(run.checkpoint(1))[0]
            new = moment > 2
            expect(same_bits(state, make_state(2 if new else 1)), f"mixed at moment {moment}")
    return Seen("before, between and after the two renames: the old one or the new one, whole")


def _die_at(moment: int) -> None:
    plain, calls = os.rename, iter(range(10))

    def rename(before: object, after: object) -> None:
        call = next(calls)
        if moment == 2 * call:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(before, after)  # type: ignore[arg-type]
        if moment == 2 * call + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename  # type: ignore[assignment]


def disk_full(ground: Ground) -> Seen:
    """The checkpoints lie on a file system of 12 MB that is full for a while."""
    whole = ground.undisturbed()
    folder = ground.runs / "disk-full"
    script = ('mount -t tmpfs -o size=12m tmpfs "$1/checkpoints" && shift && { "$@"; code=$?; } ; '
              'cp -a "$0/checkpoints" "$0/kept"; exit $code')
    create_run(ground.config("disk-full"))
    trial = ground.train("disk-full", before=(
        "unshare", "-m", "sh", "-c", script, str(folder), str(folder)))
    inside = Path()

    def there() -> bool:
        nonlocal inside
        events = trial.events("attempt")
        inside = Path(f"/proc/{events[-1]['pids'][0]}/root{trial.run.checkpoints}") if events \
            else Path()
        return bool(events) and any(inside.glob("step_*"))

    trial.wait(there, "the first checkpoint")
    ballast = inside / "ballast"
    with open(ballast, "wb") as file:
        try:
            while file.write(b"x" * 65_536):
                file.flush()
        except OSError as error:
            expect(error.errno == errno.ENOSPC, error)
    log = trial.run.rank_log(0)
    trial.wait(lambda: "ALARM: checkpoint not saved: OSError: [Errno 28]" in log.read_text(),
               "the alarm")
    ballast.unlink()
    trial.finished()
    (trial.run.root / "kept").rename(trial.run.root / "checkpoints.kept")
    shutil.rmtree(trial.run.checkpoints)
    (trial.run.root / "checkpoints.kept").rename(trial.run.checkpoints)
    trial.same_as(whole)
    for paths in trial.run.checkpoints_on_disk():
        checkpoint.verify(paths)
    return Seen("alarm, training went on, older checkpoints whole, same bits", trial.redone)


def disk_error(ground: Ground) -> Seen:
    whole, trial = ground.undisturbed(), ground.train("disk-error", fault="eio:0:20")
    trial.finished()
    trial.same_as(whole)
    log = trial.run.rank_log(0).read_text()
    expect("step 20: ALARM: checkpoint not saved: OSError: [Errno 5]" in log, "no alarm")
    expect(len(trial.events("attempt")) == 1, "it was restarted")
    return Seen("alarm, training went on, same bits", trial.redone)


# -- Damaged checkpoints ---------------------------------------------------------------------------

def truncated_checkpoint(ground: Ground) -> Seen:
    return _damaged(ground, "truncated", lambda file: os.truncate(file, file.stat().st_size // 2),
                    "bytes")


def flipped_weight(ground: Ground) -> Seen:
    return _damaged(ground, "flipped", _flip_middle, "does not match the recorded SHA-256")


def _damaged(ground: Ground, name: str, damage: Callable[[Path], None], why: str) -> Seen:
    whole, run = ground.undisturbed(1), ground.copy_of(_half(ground), name)
    newest, older = run.checkpoints_on_disk()[:2]
    damage(newest.model)
    began = time.time()
    trial = ground.train(name, 1)
    recover_s = trial.again(began, trial.attempt)
    trial.finished()
    trial.same_as(whole)
    log = trial.run.rank_log(0).read_text()
    expect("skipping a damaged checkpoint" in log and why in log, "it was not named")
    expect(f"resumed at step {older.step}" in log, "not from the one before")
    return Seen(f"named, resumed from step {older.step}, same bits", newest.step - older.step,
                recover_s)


def _half(ground: Ground) -> RunPaths:
    """A run of one rank that was asked to stop half-way."""
    run = RunPaths(ground.runs / "half")
    if not run.root.exists():
        trial = ground.train("half", 1)
        trial.wait_for_step(25)
        assert trial.process is not None
        os.kill(trial.process.pid, signal.SIGINT)
        trial.code()
        expect(25 <= trial.checkpoint < STEPS, f"stopped at {trial.checkpoint}")
    return run


def all_damaged(ground: Ground) -> Seen:
    run = ground.copy_of(_half(ground), "all-damaged")
    for paths in run.checkpoints_on_disk():
        _flip_middle(paths.model)
    before = {paths.step for paths in run.checkpoints_on_disk()}
    trial = ground.train("all-damaged", 1)
    code, log = trial.code(), trial.run.rank_log(0).read_text()
    expect(code == 2, f"exit code {code}")
    expect("no valid checkpoint among" in log, log[-500:])
    expect({paths.step for paths in run.checkpoints_on_disk()} == before, "something was deleted")
    return Seen("exit code 2, every one named, none deleted, not started at 0")


# -- Damaged data ----------------------------------------------------------------------------------

def flipped_pixel(ground: Ground) -> Seen:
    data = _copy_of_data(ground, "flipped-pixel")
    file = data / "train" / "shard-00000.beton"
    content = bytearray(file.read_bytes())
    rows = np.frombuffer(content, beton.SAMPLE, 200, beton.METADATA_START)
    content[int(rows[7]["f0"]["data_ptr"]) + 300] ^= 4
    file.write_bytes(content)
    return _stopped(ground, "flipped-pixel", data, ("shard-00000.beton, sample", "hash"))


def undecodable_jpeg(ground: Ground) -> Seen:
    """A JPEG cut short, with a digest that fits what is left: only decoding can tell."""
    data = _copy_of_data(ground, "undecodable")
    for number in range(4):
        _spoil_jpeg(data, f"train/shard-{number:05d}.beton")
    return _stopped(ground, "undecodable", data, (".beton, sample",))


def cut_table(ground: Ground) -> Seen:
    """The shard loses its allocation table; dataset.json is made to fit, so that only opening it
    can tell."""
    data = _copy_of_data(ground, "cut-table")
    file = data / "train" / "shard-00000.beton"
    os.truncate(file, int(np.frombuffer(file.read_bytes()[:beton.HEADER.itemsize],
                                        beton.HEADER)[0]["alloc_table_ptr"]))
    _fit_manifest(data, "train/shard-00000.beton")
    return _stopped(ground, "cut-table", data, ("shard-00000.beton",))


def removed_shard(ground: Ground) -> Seen:
    data = _copy_of_data(ground, "removed-shard")
    (data / "train" / "shard-00001.beton").unlink()
    recipe = ground.recipe("removed-shard", 1, data=str(data))
    answer = ground.command("train", recipe, code=2)
    expect("shard-00001.beton is missing" in answer, answer)
    expect(not (ground.runs / "removed-shard").exists(), "a run directory was made")
    return Seen("refused before a process was started, the shard named")


def swapped_shard(ground: Ground) -> Seen:
    """Between two incarnations: a shard with other labels; then the whole data set."""
    data = _copy_of_data(ground, "swapped")
    trial = ground.train("swapped", 1, data=str(data), steps=20)
    expect(trial.code() == 0, trial.said())
    shard = data / "train" / "shard-00000.beton"
    content = bytearray(shard.read_bytes())
    rows = np.frombuffer(content, beton.SAMPLE, 200, beton.METADATA_START).copy()
    rows["f1"] = (rows["f1"] + 1) % 10
    content[beton.METADATA_START:beton.METADATA_START + rows.nbytes] = rows.tobytes()
    shard.write_bytes(content)
    _set(trial.run, steps=STEPS)
    again = ground.train("swapped", 1, data=str(data))
    code = again.code()
    expect(code == 2 and "shard-00000.beton" in again.said(), f"exit code {code}; {again.said()}")
    _fit_manifest(data, "train/shard-00000.beton")
    answer = ground.command("resume", "swapped", "--runs", ground.runs, "--local", code=2)
    expect("data" in answer and "--allow data" in answer, answer)
    return Seen("the shard is named and refused; with a dataset.json to match, the fingerprint is")


def corrupt_source(ground: Ground) -> Seen:
    with tempfile.TemporaryDirectory(dir=ground.folder) as folder:
        tree, dst = make_tree(Path(folder) / "tree"), Path(folder) / "dst"
        (tree / "train" / "ant" / "1.jpg").write_bytes(b"\xff\xd8 no picture")
        began = time.monotonic()
        answer = ground.command("convert", tree, dst, code=1)
        expect("1 of 24 images could not be used" in answer, answer)
        ground.command("convert", tree, dst, "max_rejected=1")
        took_s = time.monotonic() - began
        listed = [json.loads(line) for line in (dst / "rejected.jsonl").read_text().splitlines()]
        expect(len(listed) == 1 and "1.jpg" in json.dumps(listed), listed)
    return Seen(f"refused by name; with max_rejected=1 listed, the rest converted ({took_s:.0f} s)")


def killed_converter(ground: Ground) -> Seen:
    with tempfile.TemporaryDirectory(dir=ground.folder) as folder:
        tree = make_tree(Path(folder) / "tree", per_class=150)
        words = ("workers=2", "shard_samples=10")
        ground.command("convert", tree, Path(folder) / "whole" / "dst", *words)
        dst = Path(folder) / "cut" / "dst"
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "convert", str(tree), str(dst), *words],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        deadline = time.monotonic() + 120
        while not list(Path(folder).glob("cut/**/records/*.json")):
            expect(time.monotonic() < deadline and process.poll() is None, "it was not caught")
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        try:
            load_manifest(dst)
            raise Difference("a data set that was cut short was opened")
        except ConfigError as refusal:
            expect("did not finish" in str(refusal) or "no such directory" in str(refusal), refusal)
        began = time.monotonic()
        ground.command("convert", tree, dst, *words)
        took_s = time.monotonic() - began
        expect(hashes_of(Path(folder) / "cut") == hashes_of(Path(folder) / "whole"),
               "bytes differ")
    return Seen("not opened before it was finished; the same command finished it, same bytes",
                recover_s=took_s)


def data_thread(ground: Ground) -> Seen:
    whole = ground.undisturbed()
    trial = ground.train("data-thread", fault="loader:1:40")
    trial.wait(lambda: trial.events("crashed") or trial.over, "the error")
    expect(trial.events("crashed"), "no error")
    told = trial.events("crashed")[0]
    noticed = trial.events("exit")[0]["time"]  # maybe that of the other rank, which lost its peer
    recover_s = trial.again(noticed)
    trial.finished()
    trial.same_as(whole)
    raised = re.match(r"rank 1: RuntimeError: a fault in a data thread at ([\d.]+)", told["cause"])
    expect(raised, told["cause"])
    assert raised is not None
    notice_s = noticed - float(raised[1])
    expect(notice_s < 10, f"noticed after {notice_s:.1f} s")
    return Seen(f"the rank ended with the thread's error, noticed after {notice_s:.2f} s, "
                "restarted, same bits", trial.redone, recover_s)


# -- Damage ----------------------------------------------------------------------------------------

def _copy_of_data(ground: Ground, name: str) -> Path:
    target = ground.folder / f"data-{name}"
    shutil.copytree(ground.digits, target)
    return target


def _flip_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _stopped(ground: Ground, name: str, data: Path, words: tuple[str, ...]) -> Seen:
    """A run on `data` must end with exit code 2 and `words`, and without a checkpoint."""
    trial = ground.train(name, 1, data=str(data), steps=400, checkpoint={"every_steps": 1000})
    code = trial.code()
    cause = str(trial.events()[-1].get("cause", "")) if trial.events() else trial.said()
    expect(code == 2, f"exit code {code}: {cause}")
    expect(all(word in cause for word in words), cause)
    expect(not trial.run.checkpoints_on_disk(), "a checkpoint was made")
    return Seen(f"stopped, exit code 2: {cause.removeprefix('rank 0: ').split(';')[0]}")


def _spoil_jpeg(data: Path, name: str) -> None:
    """Cut the first image of a shard short, and record the digest of what is left."""
    file = data / name
    content = bytearray(file.read_bytes())
    header = np.frombuffer(content, beton.HEADER, 1)[0]
    count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    rows = np.frombuffer(content, beton.SAMPLE, count, beton.METADATA_START).copy()
    table = np.frombuffer(content, beton.ALLOCATION, count, table_at)
    for row in rows:
        size = int(table[table["ptr"] == row["f0"]["data_ptr"]]["size"][0])
        at = int(row["f0"]["data_ptr"])
        image = Image.open(io.BytesIO(content[at:at + size]))
        expect(image.format == "JPEG", "the data set holds no JPEG")
        content[at + size // 2:at + size] = bytes(size - size // 2)
        row["f2"] = beton.digest(bytes(content[at:at + size]))
    content[beton.METADATA_START:beton.METADATA_START + rows.nbytes] = rows.tobytes()
    file.write_bytes(content)
    _fit_manifest(data, name)


def _fit_manifest(data: Path, name: str) -> None:
    """Let dataset.json describe a shard as it is now."""
    content = (data / name).read_bytes()
    header = np.frombuffer(content, beton.HEADER, 1)[0]
    count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    tree = json.loads((data / "dataset.json").read_text())
    for shard in tree["splits"]["train"]["shards"]:
        if shard["file"] == name:
            shard["bytes"] = len(content)
            shard["sha256"] = hashlib.sha256(content).hexdigest()
            shard["index_xxh3"] = index_digest(
                content[:beton.METADATA_START + count * beton.SAMPLE.itemsize], content[table_at:])
    (data / "dataset.json").write_text(json.dumps(tree))


def _set(run: RunPaths, **values: object) -> None:
    """Change a run's configuration as `resume` does."""
    rewrite_config(run, config_from_dict({**config_to_dict(load_frozen(run.config)), **values}))
