"""THE loop. One process is one rank: `python -m resnet_dist.train RUN_DIR`.

Starting and resuming are one path: join the group, restore the newest valid checkpoint or start
fresh, then  batch -> engine step -> log, evaluate, save when due.  A signal sets a flag; ranks
agree on it at a step boundary and save together.

Exit codes: 0 finished; 75 saved because asked to stop; 2 bad input; 3 diverged; 74 the node is at
fault; anything else is a crash, which the supervisor answers with a restart from the newest
checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from resnet_dist.build import fresh_model, model_of, normalization_of, train_loader
from resnet_dist.config.load import config_to_dict, load_frozen
from resnet_dist.config.rules import world_problems
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.augmentation.mix import mixer
from resnet_dist.data.augmentation.random import sample_keys
from resnet_dist.data.loader import Batch, DataError
from resnet_dist.data.shards.manifest import Manifest, check_dataset, manifest_fingerprint
from resnet_dist.engine.clock import Clock
from resnet_dist.engine.core import Engine
from resnet_dist.engine.ddp import make_engine
from resnet_dist.engine.optim import Observed, lr_at
from resnet_dist.engine.precision import settled
from resnet_dist.evaluate.judge import scores
from resnet_dist.evaluate.passes import Interrupted, evaluate
from resnet_dist.evaluate.views import eval_loader
from resnet_dist.ranks.devices import broken_gpu
from resnet_dist.ranks.distributed import World, broadcast_int, init_world, shutdown
from resnet_dist.ranks.preemption import SignalFlag
from resnet_dist.run.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    EngineState,
    Saved,
    clean,
    discard_given_up,
    load,
    newest_valid,
)
from resnet_dist.run.file_errors import errno_of, node_at_fault, waited_out
from resnet_dist.run.lease import OWNER, commit_right, holder
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import Rollback, eased, read_rollbacks
from resnet_dist.watch.gauges import Gauges
from resnet_dist.watch.introduce import introduce
from resnet_dist.watch.metrics import Metrics
from resnet_dist.watch.panels import FirstImages, Panels
from resnet_dist.watch.trace import Trace

log = logging.getLogger(__name__)

FINISHED, CRASHED, BAD_INPUT, DIVERGED, NODE, SAVED = 0, 1, 2, 3, 74, 75


class Diverged(Exception):
    """Loss, weights or momentum are no longer numbers; nothing of it is saved."""


def train(run: RunPaths, config: Config, world: World, signals: SignalFlag) -> int:
    """Train until `config.steps`, or until all ranks agree to stop. Collective.

    Returns: FINISHED or SAVED; in both cases a checkpoint of the last step is on disk.
    Raises: Diverged, DataError, CheckpointError, ConfigError.
    """
    manifest = waited_out(partial(check_dataset, config))
    rollbacks = waited_out(partial(read_rollbacks, run))
    step, state, before = newest(run, world, rollbacks)
    config = settled(config, world, before)
    if warning := other_sums(config, world, before) if world.rank == 0 else "":
        log.warning(warning)
    build = model_of if state else fresh_model
    engine = make_engine(build(config, manifest), config, world,
                         normalization_of(config, manifest))
    seen, due = Observed(), False
    if state and before:
        engine.load(state)
        seen = Observed.from_meta(before["observed"])
        due = before.get("evaluation_due", False)
    del state
    resumed, pending = step, due
    metrics = Metrics(run, step) if world.rank == 0 else None
    writer = checkpoint_writer(run, config) if world.rank == 0 else None
    panels = Panels(metrics, config, manifest) if metrics else None
    trace = Trace(config.profile, run, metrics, step, world.device) if metrics else None
    note = f"resumed at step {step}" if step else "started"
    if rollbacks and step <= rollbacks[-1].diverged_at:
        note += f", back from a divergence at step {rollbacks[-1].diverged_at}"
    log.info("%s: %d ranks, %d steps of %d images in %s", note, world.size, config.steps,
             config.batch_size, config.precision)
    if metrics:
        introduce(metrics, run, config, step, f"{note} on {world.size} ranks")

    first_image = world.rank * (config.batch_size // world.size)  # of this rank, in a global batch
    stop, clock, heart, gauges = 0, Clock(step), Heart(run, world), Gauges(world.device)
    with train_loader(config, world, step, partial(heart.beat, step)) as loader:
        batches = iter(loader)
        while not stop and (due or step < config.steps):
            if not due:  # an evaluation that a signal cut short comes before the next step
                with clock.waiting():
                    batch = next(batches)
                assert batch.step == step
                lr = lr_at(config.schedule, config.optimizer.lr, step, config.steps, seen)
                lr *= eased(rollbacks, step)
                keys = torch.from_numpy(sample_keys(config.seed, batch.epochs, batch.sample_ids))
                mix = mixer(config.augment, config.seed, step, first_image, config.bn_batch or 1)
                if trace:
                    trace.before(step, clock)
                engine.train_step(batch.images, batch.labels, keys, lr, mix)
                step += 1
                heart.beat(step)
                stop = signals.should_stop(world)
            last = step == config.steps

            if not due and (last or step % config.log.every_steps == 0):
                values = engine.read_window() | engine.norms()
                if not math.isfinite(values["loss"]):
                    raise Diverged(f"step {step}: the loss is not finite")
                seen = seen.trained(step, 100 - values["top1"], config.schedule)
                if metrics:
                    speed = clock.speed(step, config.batch_size, engine.communication())
                    metrics.write("train", step, {**values, "lr": lr, **speed, **gauges.read()})
                clock.restart(step)
            if panels and not due and panels.due(step):
                with clock.paused():
                    panels.training(step, batch, mix, engine)
            if last and not due and config.bn_refresh_steps:
                engine.refresh_bn(further(batches, config.bn_refresh_steps,
                                          partial(heart.beat, step)))
            due = due or last or step % config.eval.every_steps == 0
            if due and not stop:
                try:
                    with clock.paused():
                        result = validate(engine, config, world, partial(heart.beat, step), signals,
                                          panels, step)
                    due, seen = False, seen.validated(step, 100 - result["top1"])
                    if metrics:
                        metrics.write("val", step, result)
                    log.info("step %d: validation top-1 %.2f%%", step, result["top1"])
                except Interrupted as request:
                    stop = request.number
            if last or stop or step % config.checkpoint.every_steps == 0:
                if not engine.finite():
                    raise Diverged(f"step {step}: loss or weights are not finite")
                state = engine.state()
                if metrics and writer:
                    metrics.flush()
                    if config.checkpoint.keep_best:
                        writer.best_step = best_checkpoint(run, seen, step)
                    writer.save(step, state, {**describe(config, manifest, world, seen),
                                              "rollbacks": len(rollbacks), "evaluation_due": due})
            if writer:
                report(writer.finished(), metrics)
    if trace:
        trace.close(step)
    signals.settle()
    if writer and metrics:
        # The last state must be on disk before anyone is told so.
        report(writer.wait(), metrics)
        saved = writer.last
        if (pending or step > resumed) and (saved is None or saved.step != step or saved.error):
            raise OSError(f"step {step}: the last checkpoint could not be written: "
                          f"{saved.error if saved and saved.error else 'nothing was saved'}")
        metrics.close()
    if stop and (due or step < config.steps):
        log.info("saved at step %d because of signal %d", step, stop)
        return SAVED
    return FINISHED


def newest(run: RunPaths, world: World, rollbacks: Sequence[Rollback]
           ) -> tuple[int, EngineState | None, dict[str, Any] | None]:
    """Step, state and meta of the newest valid checkpoint; (0, None, None) where there is none.

    Rank 0 chooses; every rank reads and hashes what it loads. Collective. Raises: CheckpointError.
    """
    step = 0
    if world.rank == 0:
        waited_out(partial(clean, run))
        found = waited_out(partial(newest_valid, run, rollbacks))
        step = found[0].step if found else 0
        discard_given_up(run, rollbacks)
    step = broadcast_int(step, world)
    if not step:
        return 0, None, None
    return step, *waited_out(partial(load, run.checkpoint(step)))


def further(batches: Iterator[Batch], count: int,
            alive: Callable[[], None]) -> Iterator[torch.Tensor]:
    """The images of the next `count` batches; `alive` is called for each."""
    for batch in islice(batches, count):
        alive()
        yield batch.images


def checkpoint_writer(run: RunPaths, config: Config) -> CheckpointWriter:
    """A writer that refuses to commit once another job has taken the run over."""
    mine = os.environ.get(OWNER, holder(run))  # without a supervisor: nobody's, or whoever holds it
    return CheckpointWriter(run, config.checkpoint.keep_last, partial(commit_right, run, mine),
                            config.checkpoint.keep_every_steps)


def best_checkpoint(run: RunPaths, seen: Observed, step: int) -> int | None:
    """The first checkpoint at or after the best evaluation; `step` is about to be saved."""
    if not seen.errors:
        return None
    best = min(seen.errors, key=lambda pair: pair[1])[0]
    saved = [paths.step for paths in run.checkpoints_on_disk()]
    return min(each for each in [*saved, step] if each >= best)


def validate(engine: Engine, config: Config, world: World, alive: Callable[[], None],
             signals: SignalFlag, panels: Panels | None, step: int) -> dict[str, float]:
    """Accuracy now; of the averaged weights too, as ema_..., where the run keeps them. Collective.

    Leaves no trace in the run's bits. `alive` is called for every batch.
    Raises: Interrupted, on all ranks, soon after one of them received a stop signal; DataError.
    """
    def asked() -> int:
        return signals.received

    def normalize(images: torch.Tensor) -> torch.Tensor:
        alive()
        return engine.normalize(images)

    first = FirstImages(normalize)
    with engine.eval_model() as model:
        outcomes = evaluate(model, first, eval_loader(config, world), world, asked)
        if panels and panels.due_with_validation(step):
            panels.validated(step, outcomes, model, first.kept)
    result = scores(outcomes)
    if config.ema.decay is not None:
        with engine.eval_model(ema=True) as model:
            averaged = scores(evaluate(model, normalize, eval_loader(config, world), world, asked))
        result |= {f"ema_{key}": value for key, value in averaged.items() if key != "samples"}
    return result


def describe(config: Config, manifest: Manifest, world: World, seen: Observed) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    return {"world": world.size, "sums": world.sums, "config": config_to_dict(config),
            "dataset_sha256": manifest_fingerprint(manifest),
            "observed": seen.to_meta(), "classes": list(manifest.classes),
            "torch": torch.__version__, "python": platform.python_version(),
            "time": time.time()}


def other_sums(config: Config, world: World, before: dict[str, Any] | None) -> str:
    """That gradients may be added in another order than when `before` was saved, if they may."""
    then = (before or {}).get("sums", world.sums)
    if config.mode == "exact" or then == world.sums:
        return ""
    return (f"gradients were summed by {then or 'one rank'} and now are by "
            f"{world.sums or 'one rank'}: in mode=fast the bits may differ from here on")


def report(saves: list[Saved], metrics: Metrics | None) -> None:
    """Tell of checkpoints that are on disk. Failures alarm."""
    for saved in saves:
        if saved.error:
            what, text, height = "alarm", f"ALARM: checkpoint not saved: {saved.error}", None
            log.error("step %d: %s", saved.step, text)
        else:
            what, height = "checkpoint", saved.seconds
            text = f"checkpoint, {saved.size_bytes / 1e6:.1f} MB in {saved.seconds:.2f} s"
            log.info("step %d: %s", saved.step, text)
        if metrics:
            metrics.mark(what, saved.step, text, height)


class Heart:
    """A sign of life of one rank: the watchdog reads the file's time, `status` the step in it."""

    def __init__(self, run: RunPaths, world: World) -> None:
        self._path = run.heartbeat(world.rank)
        self._path.parent.mkdir(exist_ok=True)
        self._attempt = os.environ.get("RESNET_DIST_ATTEMPT", "0")
        # Its own name: for a moment an incarnation and the one that takes over both beat.
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._last = float("-inf")
        self._failed = False

    def beat(self, step: int) -> None:
        """Write "attempt step", at most ten times a second: the folder may be a network's. Where it
        takes no bytes, the file's time alone tells; where not even that, the watchdog sees none
        either and waits."""
        now = time.monotonic()
        if now - self._last < 0.1:
            return
        self._last = now
        try:
            self._temporary.write_text(f"{self._attempt} {step}\n")
            os.replace(self._temporary, self._path)
        except OSError as error:
            if not self._failed:
                log.error("ALARM: no sign of life written: %s", error)
            self._failed = True
            with suppress(OSError):
                os.utime(self._path)


def failure_code(error: Exception, otherwise: int) -> int:
    """NODE, CRASHED or `otherwise`: an errno is never bad input."""
    if node_at_fault(error) or broken_gpu(error):
        return NODE
    return CRASHED if errno_of(error) else otherwise


def main(arguments: list[str]) -> NoReturn:
    """Run one rank on the run directory in `arguments`, and end the process."""
    rank = int(os.environ.get("RANK", 0))
    logging.Formatter.converter = time.gmtime  # nodes may disagree about local time
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format=f"%(asctime)sZ rank {rank} %(levelname)s: %(message)s")
    # torch 2.13 renames arguments that 2.11 does not know yet; nothing a user could act on.
    warnings.simplefilter("ignore", FutureWarning)
    run = RunPaths(Path(arguments[0]).absolute())
    try:
        with SignalFlag() as signals:
            config = waited_out(partial(load_frozen, run.config))
            problems = world_problems(config, int(os.environ.get("WORLD_SIZE", 1)))
            if problems:
                raise ConfigError("\n".join(problems))
            world = init_world(config)
            code = train(run, config, world, signals)
            shutdown()
    except (ConfigError, DataError, CheckpointError) as error:
        log.error("%s", error)
        code = failure_code(error, BAD_INPUT)
    except Diverged as error:
        log.error("%s", error)
        code = DIVERGED
    except Exception as error:
        log.exception("failed")
        log.error("%s: %s", type(error).__name__, " ".join(str(error).split()))
        code = failure_code(error, CRASHED)
    # Leave at once: peers over gloo notice the closed connections, and those over NCCL are ended by
    # the supervisor; no destructor can wait for them, and Python's own farewell takes seconds in
    # which the rank would seem to hang.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
