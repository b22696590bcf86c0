"""TensorBoard's files after a resume: what was drawn beyond the checkpoint is gone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from resnet_dist.run.event_files import drop_after
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import Metrics


def steps_in(folder: Path) -> list[tuple[str, int]]:
    """(tag, step) of every value in the files themselves, whatever a reader would hide."""
    return [(value.tag, event.step) for path in sorted(folder.glob("events.*"))
            for event in EventFileLoader(str(path)).Load() for value in event.summary.value]


def attempt(run: RunPaths, first: int, last: int) -> None:
    """Curves, a picture and a histogram at every step; killed, so never closed."""
    metrics = Metrics(run, first)
    for step in range(first + 1, last + 1):
        metrics.write("train", step, {"loss": 1.0})
        metrics.picture("train/images", step, Image.new("RGB", (8, 8)))
        metrics.histogram("batch_norm/scale", step, np.arange(4.0))
        metrics.text("profile", "text", step)
    metrics.flush()


def test_nothing_past_the_checkpoint_is_left_in_the_files(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    attempt(run, 0, 300)  # steps of one and of two bytes
    attempt(run, 130, 133)
    found = steps_in(run.tensorboard)
    for tag in ("train/loss", "train/images", "batch_norm/scale", "profile/text_summary"):
        assert [step for name, step in found if name == tag] == list(range(1, 134)), tag
    assert steps_in(run.tensorboard / "eval") == []


def test_a_torn_end_is_cut_off_and_the_rest_is_kept_to_the_byte(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    attempt(run, 0, 5)
    (file,) = run.tensorboard.glob("events.*")
    whole = file.read_bytes()
    drop_after(run.tensorboard, 5)
    assert file.read_bytes() == whole
    file.write_bytes(whole + b"\x40\0\0\0\0\0\0\0torn")
    drop_after(run.tensorboard, 5)
    assert file.read_bytes() == whole


def test_a_damaged_event_neither_ends_the_run_nor_takes_others_with_it(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    attempt(run, 0, 5)
    (file,) = run.tensorboard.glob("events.*")
    whole = file.read_bytes()
    damaged = b"\x08" + bytes(7 + 4) + b"\xff" * 8 + bytes(4)
    file.write_bytes(damaged + whole)
    drop_after(run.tensorboard, 5)
    assert file.read_bytes() == damaged + whole
    drop_after(run.tensorboard, 0)
    assert file.read_bytes().startswith(damaged)
    assert len(file.read_bytes()) < len(damaged + whole)


def test_twelve_attempts_in_one_second_and_one_of_a_fast_clock_stay_in_order(
        tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    for number in range(12):
        attempt(run, number, number + 1)
    newest = max(run.tensorboard.glob("events.*"))
    newest.rename(newest.with_name(f"events.out.tfevents.{2**33}.ahead"))
    attempt(run, 12, 13)
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 14))


@pytest.mark.parametrize("step", [0, 1, 127, 128, 600_000, 2**40])
def test_the_step_is_read_as_tensorboard_reads_it(tmp_path: Path, step: int) -> None:
    run = RunPaths(tmp_path)
    metrics = Metrics(run, 0)
    metrics.scalar("x", step, 1.0)
    metrics.flush()
    drop_after(run.tensorboard, step)
    assert ("x", step) in steps_in(run.tensorboard)
    drop_after(run.tensorboard, step - 1)
    assert step == 0 or ("x", step) not in steps_in(run.tensorboard)


def test_starts_and_checkpoints_are_marked_through_restarts(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    metrics = Metrics(run, 0)
    metrics.mark("start", 0, "started on 2 ranks")
    metrics.mark("checkpoint", 40, "checkpoint, 2 MB", 0.25)
    metrics.mark("checkpoint", 80, "checkpoint | 2 MB", 0.5)
    metrics.flush()
    metrics = Metrics(run, 40)  # the checkpoint of step 80 turned out damaged
    metrics.mark("start", 40, "resumed at step 40 on 2 ranks")
    metrics.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("events/start")] == [(0, 1.0), (40, 2.0)]
    assert [(e.step, e.value) for e in board.Scalars("events/checkpoint")] == [(40, 0.25)]
    table = board.Tensors("events/text_summary")[-1].tensor_proto.string_val[0].decode()
    told = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert told == ["40", "40", "0"]
    assert "resumed at step 40" in table
