"""Checkpoints: what is committed is complete, what is damaged is named, failures harm nothing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_dist.engine.optim import Observed
from resnet_dist.run import checkpoint, file_errors
from resnet_dist.run.checkpoint import CheckpointError, CheckpointWriter, EngineState
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import Rollback
from resnet_dist.train import BAD_INPUT, NODE, best_checkpoint, failure_code

ROOT = Path(__file__).resolve().parents[3]


def make_state(seed: int, numel: int = 1000) -> EngineState:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(numel, generator=generator)
    weight[0] = float("nan")  # bits, not values, must survive
    return EngineState(
        model={"conv.weight": weight, "bn.num_batches_tracked": torch.tensor(seed)},
        optimizer={"momentum_buffer/conv.weight": torch.randn(numel, generator=generator)},
        ranks={"window": torch.randn(4, 4, generator=generator)})


def same_bits(a: EngineState, b: EngineState) -> bool:
    return all(left.keys() == right.keys() and all(
        torch.equal(left[key].view(-1).view(torch.uint8), right[key].view(-1).view(torch.uint8))
        for key in left) for left, right in ((a.model, b.model), (a.optimizer, b.optimizer),
                                             (a.ranks, b.ranks)))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def test_a_checkpoint_returns_every_bit_and_its_meta(run: RunPaths) -> None:
    meta = {"seed": 7, "config": {"steps": 10}, "versions": ["3.11", "2.13"]}
    checkpoint.write(run, 12000, make_state(1), meta)
    found = checkpoint.newest_valid(run)
    assert found is not None
    paths, record = found
    assert (paths.root.name, record["step"]) == ("step_00012000", 12000)
    state, its_meta = checkpoint.load(paths)
    assert same_bits(state, make_state(1))
    assert its_meta == meta
    weights, _ = checkpoint.load_model(paths)
    assert weights.keys() == state.model.keys()


def test_no_checkpoint_is_none_and_not_an_error(run: RunPaths) -> None:
    assert checkpoint.newest_valid(run) is None


def test_the_newest_stay_and_the_rest_go(run: RunPaths) -> None:
    writer = CheckpointWriter(run, keep_last=2)
    for step in (1, 2, 10, 9):
        writer.save(step, make_state(step), {})
    assert [saved.step for saved in writer.wait()] == [1, 2, 10, 9]
    assert sorted(os.listdir(run.checkpoints)) == ["step_00000009", "step_00000010"]


def test_the_last_save_is_known_though_it_was_reported_before(run: RunPaths) -> None:
    """A save that ends within its own step is told in the loop, and no more at the end."""
    writer = CheckpointWriter(run, keep_last=2)
    writer.save(3, make_state(3), {})
    while not writer.finished():
        time.sleep(0.01)
    assert writer.wait() == []
    assert writer.last is not None
    assert (writer.last.step, writer.last.error) == (3, None)
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("a file in its place")
    writer.save(4, make_state(4), {})
    writer.wait()
    assert writer.last.step == 4
    assert writer.last.error


def test_a_save_that_waits_for_the_disk_is_given_up_when_the_next_is_due(
        run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the loop would stand still for as long, and be taken for hung."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if "step_00000001" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    writer, began = CheckpointWriter(run, keep_last=2), time.monotonic()
    writer.save(1, make_state(1), {})
    time.sleep(0.5)
    writer.save(2, make_state(2), {})
    lost, kept = writer.wait()
    assert time.monotonic() - began < 10
    assert (lost.step, kept.step, kept.error) == (1, 2, None)
    assert lost.error is not None
    assert "Errno 5" in lost.error


def test_every_nth_and_the_best_stay_too(run: RunPaths) -> None:
    writer = CheckpointWriter(run, keep_last=1, keep_every_steps=4)
    for step in range(1, 10):
        writer.save(step, make_state(step), {})
        writer.wait()
        writer.best_step = 2 if step == 2 else writer.best_step
    assert [paths.step for paths in run.checkpoints_on_disk()] == [9, 8, 4, 2]


def test_the_first_checkpoint_after_the_best_evaluation_stays(run: RunPaths) -> None:
    """Best at step 15, then, after a while without a gain, at 55."""
    writer, seen = CheckpointWriter(run, keep_last=1), Observed()
    errors, kept = {5: 60.0, 15: 40.0, 25: 41.0, 35: 45.0, 55: 30.0, 65: 31.0}, {}
    for step in range(5, 75, 5):
        if step in errors:
            seen = seen.validated(step, errors[step])
        if step % 10 == 0:
            writer.best_step = best_checkpoint(run, seen, step)
            writer.save(step, make_state(step), {})
            writer.wait()
            kept[step] = [paths.step for paths in run.checkpoints_on_disk()]
    assert kept == {10: [10], 20: [20], 30: [30, 20], 40: [40, 20], 50: [50, 20], 60: [60],
                    70: [70, 60]}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture],
          deadline=None)
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_found_named_and_passed_over(
        data: st.DataObject, run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run.root, ignore_errors=True)
    for step in (1, 2):
        checkpoint.write(run, step, make_state(step, 50), {"note": "x"})
    victim = data.draw(st.sampled_from(sorted(run.checkpoint(2).root.iterdir())))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[:data.draw(st.integers(0, len(content) - 1))]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    caplog.clear()
    victim.write_bytes(content)
    found = checkpoint.newest_valid(run)
    assert found is not None
    assert found[0].step == 1
    assert str(victim) in caplog.text
    with pytest.raises(CheckpointError, match=str(victim)):
        checkpoint.load(run.checkpoint(2))


@pytest.mark.parametrize("name", ["model.safetensors", "ranks.safetensors", "state.json"])
def test_a_missing_file_is_named(run: RunPaths, name: str) -> None:
    checkpoint.write(run, 1, make_state(1), {})
    (run.checkpoint(1).root / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(run.checkpoint(1))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(run: RunPaths) -> None:
    for step in (1, 2):
        checkpoint.write(run, step, make_state(step), {})
        run.checkpoint(step).model.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)not started over.*step_00000002.*restore one"):
        checkpoint.newest_valid(run)


def test_a_checkpoint_moved_to_another_steps_name_is_refused(run: RunPaths) -> None:
    checkpoint.write(run, 1, make_state(1), {})
    os.rename(run.checkpoint(1).root, run.checkpoint(5).root)
    with pytest.raises(CheckpointError, match="is of step 1"):
        checkpoint.verify(run.checkpoint(5))


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """Writes past the limit fail in the kernel, after part of the data is on disk."""
    limit = 200_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_write_alarms_and_harms_nothing(
        run: RunPaths, file_size_limit: int, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(run, keep_last=1)
    writer.save(1, make_state(1), {})
    writer.save(2, make_state(2, numel=file_size_limit), {})
    first, second = writer.wait()
    assert first.error is None
    assert second.error is not None
    assert "NOT saved" in caplog.text
    assert os.listdir(run.checkpoints) == ["step_00000001"]
    writer.save(3, make_state(3), {})  # and the next one works
    assert writer.wait()[0].error is None
    assert same_bits(checkpoint.load(run.checkpoint(3))[0], make_state(3))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("failing", range(6))  # four files, their directory, its parent
def test_an_fsync_that_fails_is_tried_again_and_else_reports_no_checkpoint(
        run: RunPaths, failing: int, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(run, 1, make_state(1), {})
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing + 1 or (len(calls) > failing and not once):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(file_errors, "WAIT_S", 0.2)
    writer = CheckpointWriter(run, keep_last=2)
    writer.save(2, make_state(2), {})
    saved, = writer.wait()
    if once:
        assert saved.error is None
        assert same_bits(checkpoint.load(run.checkpoint(2))[0], make_state(2))
    else:
        assert "Input/output error" in (saved.error or "")
    assert same_bits(checkpoint.load(run.checkpoint(1))[0], make_state(1))
    assert not list(run.checkpoints.glob(".tmp*"))


def test_a_checkpoint_that_reads_as_an_error_once_is_not_skipped(
        run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.write(run, step, make_state(step), {})
    plain, failed = Path.read_bytes, set()

    def read_bytes(path: Path) -> bytes:
        if path.name not in failed:
            failed.add(path.name)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    found = checkpoint.newest_valid(run)
    assert found is not None
    assert found[0].step == 2


def test_checkpoints_that_cannot_be_read_are_no_bad_input(
        run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(run, 1, make_state(1), {})

    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(file_errors, "WAIT_S", 0.2)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest_valid(run)
    assert failure_code(caught.value, BAD_INPUT) == NODE


def test_a_full_disk_alarms_and_harms_nothing(tmp_path: Path) -> None:
    """ENOSPC of a real file system: 2 MiB of tmpfs in a mount namespace of its own."""
    code = (
        "import sys, os; from pathlib import Path; from resnet_dist.run import checkpoint\n"
        "from resnet_dist.run.paths import RunPaths\n"
        "from tests.unit.run.test_checkpoint import make_state, same_bits\n"
        "run = RunPaths(Path(sys.argv[1]))\n"
        "writer = checkpoint.CheckpointWriter(run, keep_last=1)\n"
        "writer.save(1, make_state(1), {}); writer.save(2, make_state(2, 400_000), {})\n"
        "one, two = writer.wait()\n"
        "assert one.error is None and 'No space left' in two.error, (one, two)\n"
        "assert os.listdir(run.checkpoints) == ['step_00000001']\n"
        "assert same_bits(checkpoint.load(run.checkpoint(1))[0], make_state(1))\n")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$1" && "$2" -c "$3" "$1"',
         "sh", str(tmp_path), sys.executable, code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_a_fence_that_refuses_leaves_the_run_as_it_was(run: RunPaths) -> None:
    checkpoint.write(run, 1, make_state(1), {})

    @contextmanager
    def fence() -> Iterator[None]:
        raise CheckpointError("job 42 owns this run by now")
        yield

    writer = CheckpointWriter(run, keep_last=1, fence=fence)
    writer.save(2, make_state(2), {})
    assert "job 42" in (writer.wait()[0].error or "")
    assert os.listdir(run.checkpoints) == ["step_00000001"]


def test_saving_a_step_again_replaces_it(run: RunPaths) -> None:
    checkpoint.write(run, 1, make_state(1), {})
    checkpoint.write(run, 1, make_state(2), {})
    assert same_bits(checkpoint.load(run.checkpoint(1))[0], make_state(2))
    assert os.listdir(run.checkpoints) == ["step_00000001"]


def test_a_replacement_cut_short_is_undone_at_the_next_start(run: RunPaths) -> None:
    checkpoint.write(run, 1, make_state(1), {})
    os.rename(run.checkpoint(1).root, run.checkpoints / ".old-step_00000001")
    (run.checkpoints / ".tmp-step_00000001-77").mkdir()
    checkpoint.clean(run)
    assert same_bits(checkpoint.load(run.checkpoint(1))[0], make_state(1))
    assert os.listdir(run.checkpoints) == ["step_00000001"]


def test_going_back_drops_what_came_later_and_keeps_what_is_made_again(run: RunPaths) -> None:
    for step in (1, 2, 3):
        checkpoint.write(run, step, make_state(step), {})
    back = [Rollback(diverged_at=4, to=2)]
    found = checkpoint.newest_valid(run, back)
    assert found is not None
    assert found[0].step == 2
    checkpoint.discard_given_up(run, back)
    assert sorted(os.listdir(run.checkpoints)) == ["step_00000001", "step_00000002"]
    checkpoint.write(run, 3, make_state(3), {"rollbacks": 1})
    checkpoint.discard_given_up(run, back)
    again = checkpoint.newest_valid(run, back)
    assert again is not None
    assert again[0].step == 3


def test_going_back_to_a_damaged_checkpoint_goes_further_back(run: RunPaths) -> None:
    for step in (1, 2, 3):
        checkpoint.write(run, step, make_state(step), {})
    run.checkpoint(2).model.write_bytes(b"torn")
    found = checkpoint.newest_valid(run, [Rollback(diverged_at=4, to=2)])
    assert found is not None
    assert found[0].step == 1


def test_the_caller_learns_at_once_that_meta_is_not_plain_data(run: RunPaths) -> None:
    with pytest.raises(TypeError):
        CheckpointWriter(run, keep_last=1).save(1, make_state(1), {"when": object()})
