"""THE loop. One process is one rank: `python -m resnet_dist.train RUN_DIR`.

Starting and resuming are one path: join the group, restore the newest valid checkpoint or start
fresh, then  batch -> engine step -> log, evaluate, save when due.  A signal sets a flag; ranks
agree on it at a step boundary and save together.

Exit codes: 0 finished; 75 saved because asked to stop; 2 bad input; 3 diverged; anything else is a
crash, which the supervisor answers with a restart from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from resnet_dist.build import (
    eval_loader,
    fresh_model,
    model_of,
    normalization_of,
    train_loader,
)
from resnet_dist.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Saved,
    clean,
    load,
    newest_valid,
)
from resnet_dist.clock import Clock
from resnet_dist.config import Config, ConfigError, config_to_dict, load_frozen
from resnet_dist.data.loader import Batch, DataError
from resnet_dist.data.manifest import Manifest, check_dataset, manifest_fingerprint
from resnet_dist.data.mix import mixer
from resnet_dist.data.random import sample_keys
from resnet_dist.distributed import World, broadcast_int, init_world, shutdown
from resnet_dist.engine import make_engine
from resnet_dist.engine_core import Engine
from resnet_dist.evaluate import evaluate
from resnet_dist.gauges import Gauges
from resnet_dist.introduce import introduce
from resnet_dist.judge import scores
from resnet_dist.metrics import Metrics
from resnet_dist.optim import Observed, lr_at
from resnet_dist.panels import FirstImages, Panels
from resnet_dist.paths import RunPaths
from resnet_dist.preemption import SignalFlag
from resnet_dist.rules import world_problems
from resnet_dist.trace import Trace

log = logging.getLogger(__name__)

FINISHED, CRASHED, BAD_INPUT, DIVERGED, SAVED = 0, 1, 2, 3, 75


class Diverged(Exception):
    """Loss, weights or momentum are no longer numbers; nothing of it was saved."""


def train(run: RunPaths, config: Config, world: World, signals: SignalFlag) -> int:
    """Train until `config.steps`, or until all ranks agree to stop. Collective.

    Returns: FINISHED or SAVED; in both cases a checkpoint of the last step is on disk.
    Raises: Diverged, DataError, CheckpointError, ConfigError.
    """
    manifest = check_dataset(config)
    build = model_of if run.checkpoints_on_disk() else fresh_model
    engine = make_engine(build(config, manifest), config, world,
                         normalization_of(config, manifest))
    step, seen = restore(run, engine, world)
    resumed = step
    metrics = Metrics(run, step) if world.rank == 0 else None
    writer = checkpoint_writer(run, config) if world.rank == 0 else None
    panels = Panels(metrics, config, manifest) if metrics else None
    trace = Trace(config.profile, run, metrics, step, world.device) if metrics else None
    log.info("%s: %d ranks, %d steps of %d images",
             f"resumed at step {step}" if step else "started", world.size, config.steps,
             config.batch_size)
    if metrics:
        introduce(metrics, run, config, step, world.size)

    first_image = world.rank * (config.batch_size // world.size)  # of this rank, in a global batch
    stop, clock, heart, gauges = 0, Clock(step), Heart(run, world), Gauges(world.device)
    with train_loader(config, world, step, partial(heart.beat, step)) as loader:
        batches = iter(loader)
        while step < config.steps and not stop:
            with clock.waiting():
                batch = next(batches)
            assert batch.step == step
            lr = lr_at(config.schedule, config.optimizer.lr, step, config.steps, seen)
            keys = torch.from_numpy(sample_keys(config.seed, batch.epochs, batch.sample_ids))
            mix = mixer(config.augment, config.seed, step, first_image, config.bn_batch or 1)
            if trace:
                trace.before(step, clock)
            engine.train_step(batch.images, batch.labels, keys, lr, mix)
            step += 1
            heart.beat(step)
            stop = signals.should_stop(world)
            last = step == config.steps

            if last or step % config.log.every_steps == 0:
                values = engine.read_window() | engine.norms()
                seen = seen.trained(step, 100 - values["top1"], config.schedule)
                if metrics:
                    speed = clock.speed(step, config.batch_size, engine.communication())
                    metrics.write("train", step, {**values, "lr": lr, **speed, **gauges.read()})
                clock.restart(step)
            if panels and panels.due(step):
                with clock.paused():
                    panels.training(step, batch, mix, engine)
            if last and config.bn_refresh_steps:
                engine.refresh_bn(further(batches, config.bn_refresh_steps,
                                          partial(heart.beat, step)))
            if last or step % config.eval.every_steps == 0:
                with clock.paused():
                    result = validate(engine, config, world, partial(heart.beat, step), panels,
                                      step)
                seen = seen.validated(step, 100 - result["top1"])
                if metrics:
                    metrics.write("val", step, result)
                log.info("step %d: validation top-1 %.2f%%", step, result["top1"])
            if last or stop or step % config.checkpoint.every_steps == 0:
                if not engine.finite():
                    raise Diverged(f"step {step}: loss or weights are not finite; "
                                   "nothing since the last checkpoint was saved")
                state = engine.state()
                if metrics and writer:
                    metrics.flush()
                    if config.checkpoint.keep_best:
                        writer.best_step = best_checkpoint(run, seen, step)
                    writer.save(step, state, describe(config, manifest, world, seen))
            if writer:
                report(writer.finished(), metrics)
    if trace:
        trace.close(step)
    signals.settle()
    if writer and metrics:
        # The last state must be on disk before anyone is told so.
        if step > resumed and report(writer.wait(), metrics) != step:
            raise OSError(f"step {step}: the last checkpoint could not be written")
        metrics.close()
    if stop and step < config.steps:
        log.info("saved at step %d because of signal %d", step, stop)
        return SAVED
    return FINISHED


def restore(run: RunPaths, engine: Engine, world: World) -> tuple[int, Observed]:
    """Load the newest valid checkpoint, where there is one: its step, and what was seen until then.

    Rank 0 chooses; every rank reads and hashes what it loads. Collective. Raises: CheckpointError.
    """
    step = 0
    if world.rank == 0:
        clean(run)
        found = newest_valid(run)
        step = found[0].step if found else 0
    step = broadcast_int(step, world)
    if not step:
        return 0, Observed()
    state, meta = load(run.checkpoint(step))
    engine.load(state)
    return step, Observed.from_meta(meta["observed"])


def further(batches: Iterator[Batch], count: int,
            alive: Callable[[], None]) -> Iterator[torch.Tensor]:
    """The images of the next `count` batches; `alive` is called for each."""
    for batch in islice(batches, count):
        alive()
        yield batch.images


def checkpoint_writer(run: RunPaths, config: Config) -> CheckpointWriter:
    """A writer that refuses to commit once another job has taken the run over."""
    def owner() -> str:
        return run.lease.read_text() if run.lease.exists() else ""

    def fence() -> None:
        if owner() != mine:
            raise OSError(f"{run.root} is run by {owner().strip()} now")

    mine = owner()
    return CheckpointWriter(run, config.checkpoint.keep_last, fence,
                            config.checkpoint.keep_every_steps)


def best_checkpoint(run: RunPaths, seen: Observed, step: int) -> int | None:
    """The first checkpoint at or after the best evaluation; `step` is about to be saved."""
    if not seen.errors:
        return None
    best = min(seen.errors, key=lambda pair: pair[1])[0]
    saved = [paths.step for paths in run.checkpoints_on_disk()]
    return min(each for each in [*saved, step] if each >= best)


def validate(engine: Engine, config: Config, world: World, alive: Callable[[], None],
             panels: Panels | None, step: int) -> dict[str, float]:
    """Accuracy now; of the averaged weights too, as ema_..., where the run keeps them. Collective.

    Leaves no trace in the run's bits. `alive` is called for every batch.
    """
    def normalize(images: torch.Tensor) -> torch.Tensor:
        alive()
        return engine.normalize(images)

    first = FirstImages(normalize)
    with engine.eval_model() as model:
        outcomes = evaluate(model, first, eval_loader(config, world), world)
        if panels and panels.due_with_validation(step):
            panels.validated(step, outcomes, model, first.kept)
    result = scores(outcomes)
    if config.ema.decay is not None:
        with engine.eval_model(ema=True) as model:
            averaged = scores(evaluate(model, normalize, eval_loader(config, world), world))
        result |= {f"ema_{key}": value for key, value in averaged.items() if key != "samples"}
    return result


def describe(config: Config, manifest: Manifest, world: World, seen: Observed) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    return {"world": world.size, "config": config_to_dict(config),
            "dataset_sha256": manifest_fingerprint(manifest),
            "observed": seen.to_meta(), "classes": list(manifest.classes),
            "torch": torch.__version__, "python": platform.python_version(),
            "time": time.time()}


def report(saves: list[Saved], metrics: Metrics | None) -> int | None:
    """Tell of checkpoints that are on disk; the step of the newest one. Failures alarm."""
    newest = None
    for saved in saves:
        if saved.error:
            what, text, height = "alarm", f"ALARM: checkpoint not saved: {saved.error}", None
            log.error("step %d: %s", saved.step, text)
        else:
            newest, what, height = saved.step, "checkpoint", saved.seconds
            text = f"checkpoint, {saved.size_bytes / 1e6:.1f} MB in {saved.seconds:.2f} s"
            log.info("step %d: %s", saved.step, text)
        if metrics:
            metrics.mark(what, saved.step, text, height)
    return newest


class Heart:
    """A sign of life of one rank: the watchdog reads the file's time, `status` the step in it."""

    def __init__(self, run: RunPaths, world: World) -> None:
        self._path = run.heartbeat(world.rank)
        self._path.parent.mkdir(exist_ok=True)
        self._attempt = os.environ.get("RESNET_DIST_ATTEMPT", "0")
        self._last = float("-inf")

    def beat(self, step: int) -> None:
        """Write "attempt step", at most ten times a second: the folder may be a network's."""
        now = time.monotonic()
        if now - self._last < 0.1:
            return
        self._last = now
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(f"{self._attempt} {step}\n")
        os.replace(temporary, self._path)


def main(arguments: list[str]) -> int:
    """Run one rank on the run directory in `arguments`; the exit code."""
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format=f"%(asctime)s rank {rank}: %(message)s")
    # torch 2.13 renames arguments that 2.11 does not know yet; nothing a user could act on.
    warnings.simplefilter("ignore", FutureWarning)
    run = RunPaths(Path(arguments[0]).absolute())
    try:
        with SignalFlag() as signals:
            config = load_frozen(run.config)
            problems = world_problems(config, int(os.environ.get("WORLD_SIZE", 1)))
            if problems:
                raise ConfigError("\n".join(problems))
            world = init_world(config)
            code = train(run, config, world, signals)
            shutdown()
            return code
    except (ConfigError, DataError, CheckpointError) as error:
        log.error("%s", error)
        code = BAD_INPUT
    except Diverged as error:
        log.error("%s", error)
        code = DIVERGED
    except Exception as error:
        log.exception("failed")
        log.error("%s: %s", type(error).__name__, " ".join(str(error).split()))
        code = CRASHED
    # Leave at once: peers notice the closed connections, and no destructor can wait for them.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
