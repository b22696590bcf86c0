"""Curves: after any kill and resume every step is there once."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import Metrics, read_lines


def steps_on_board(run: RunPaths) -> list[int]:
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [event.step for event in board.Scalars("train/loss")]


def write(run: RunPaths, first: int, last: int, *, close: bool) -> None:
    metrics = Metrics(run, first)
    for step in range(first + 1, last + 1):
        metrics.write("train", step, {"loss": 1 / step, "lr": 0.1})
    metrics.flush()
    if close:
        metrics.close()


def test_steps_redone_after_a_kill_stand_once(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    write(run, 0, 10, close=False)  # killed at 10, its checkpoint was of step 6
    write(run, 6, 12, close=True)
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(1, 13))
    assert steps_on_board(run) == list(range(1, 13))


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    write(run, 0, 3, close=True)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "kind": "tr')
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3]
    write(run, 3, 4, close=True)
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    metrics = Metrics(run, 0)
    metrics.write("train", 5, {"loss": 1.0})
    metrics.write("val", 5, {"loss": 2.0, "top1": 50.0})
    metrics.close()
    assert [line["loss"] for line in read_lines(run.metrics, "val")] == [2.0]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.value for event in board.Scalars("val/top1")] == [50.0]


def test_variables_and_options_of_a_cluster_are_no_obstacle_to_the_table_of_runs() -> None:
    """They have no default to differ from."""
    from resnet_dist.config.load import config_from_dict
    from resnet_dist.watch.introduce import settings

    config = config_from_dict({"name": "x", "seed": 3, "launch": {
        "environment": {"NCCL_DEBUG": "INFO"}, "options": {"reservation": "friday"}}})
    shown = settings(config, {"sweep": {"values": {"seed": "3"}}})
    assert shown["seed"] == 3
    assert not [key for key in shown if key.startswith("launch.")]
