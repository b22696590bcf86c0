"""Pictures and histograms of a run in TensorBoard, now and then: what curves do not show.

In: a batch as the network sees it, the outcomes of a validation, the network itself. Out: images,
figures and histograms. Rank 0 alone; reads and changes nothing of the run's bits. A picture that
fails is no reason to end a run of days: an alarm says so, and the rest of the attempt goes without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnet_dist.config.schema import Config
from resnet_dist.data.loader import Batch
from resnet_dist.data.shards.manifest import PILLOW_LETTERS, Manifest, legible
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.shards.sheet import CELL, contact_sheet
from resnet_dist.engine.core import Engine, Mix
from resnet_dist.evaluate.judge import Outcomes, calibration, figures
from resnet_dist.evaluate.views import picture
from resnet_dist.models.analysis.responses import layer_responses, plot_responses
from resnet_dist.models.norm import GhostBatchNorm2d
from resnet_dist.watch.metrics import Metrics

log = logging.getLogger(__name__)

IMAGES = 32  # of a training batch, at most one bn_batch; and through which responses are measured
MISTAKES = 20
NAME_LETTERS = 64  # of a class; the sheet has room for fewer


class Panels:
    """Everything that is drawn of one run.

    Args:
        classes: names by label.
        every: steps between pictures; 0: none.
    """

    def __init__(self, metrics: Metrics, config: Config, manifest: Manifest) -> None:
        self._metrics, self._config, self._classes = metrics, config, manifest.classes
        self._captions = legible(manifest.classes, PILLOW_LETTERS, NAME_LETTERS)
        self._every = config.log.panels_every_steps
        self._failed = False

    def due(self, step: int) -> bool:
        """Whether the training pictures of `step` are to be drawn; the first step's always are."""
        return bool(self._every) and (step == 1 or step % self._every == 0) and not self._failed

    def due_with_validation(self, step: int) -> bool:
        """Whether the pictures of the validation at `step` are: of the first in every
        `panels_every_steps`, and of the last."""
        if not self._every or self._failed:
            return False
        before = (step - 1) // self._config.eval.every_steps * self._config.eval.every_steps
        return step == self._config.steps or step // self._every > before // self._every

    def training(self, step: int, batch: Batch, mix: Mix | None, engine: Engine) -> None:
        """Images as the network saw them in this step, and its BatchNorms and weights after it."""
        with self._safely(step):
            images, captions = seen_images(batch, mix, engine, self._captions)
            self._metrics.picture("train/images", step, contact_sheet(images, captions))
            statistics = batch_norm_statistics(engine.module)
            for name, layers in statistics.items():
                self._metrics.histogram(f"batch_norm/{name}", step, np.concatenate(layers))
            if statistics["scale"]:
                self._metrics.figure("layers/batch_norm", step, plot_batch_norms(statistics))
            weights = torch.cat([p.detach().reshape(-1)[:10_000].float().cpu()
                                 for p in engine.module.parameters() if p.dim() > 1])
            self._metrics.histogram("weights/sample", step, weights.numpy())

    def validated(self, step: int, outcomes: Outcomes, model: nn.Module,
                  images: Tensor | None) -> None:
        """Confusion, calibration, classes, the surest mistakes, and the layers' responses.

        Args:
            model: in eval mode.
            images: some that it was shown, prepared [n, 3, h, w]; None: no responses.
        """
        with self._safely(step):
            if np.isfinite(outcomes.losses).all():
                for name, figure in figures(outcomes, self._classes).items():
                    self._metrics.figure(f"val/{name}", step, figure)
                self._metrics.scalar("val/ece", step, 100 * calibration(outcomes).ece)
                wrong = surest_mistakes(outcomes, MISTAKES)
                if len(wrong):
                    self._metrics.picture("val/mistakes", step, self._sheet(outcomes, wrong))
            if images is not None:
                curve = layer_responses(model, [images[:IMAGES]])
                self._metrics.figure("layers/responses", step,
                                     plot_responses({f"step {step:,}": curve}))

    def _sheet(self, outcomes: Outcomes, wrong: np.ndarray) -> Any:
        config = self._config
        assert config.data.path is not None, "check_dataset refuses this"
        with ShardReader(config.data.path, config.eval.split) as reader:
            pictures = [picture(reader, int(outcomes.sample_ids[i]), CELL, check=True)
                        for i in wrong]
        captions = [(f"is {self._captions[outcomes.labels[i]]}",
                     f"{100 * outcomes.confidences[i]:.0f}% "
                     f"{self._captions[outcomes.predicted[i]]}") for i in wrong]
        return contact_sheet(pictures, captions, columns=5)

    @contextmanager
    def _safely(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.exception("step %d: ALARM: no more pictures in this attempt", step)
            self._metrics.mark("alarm", step, f"no more pictures in this attempt: {reason}")


class FirstImages:
    """`prepare`, with the first prepared images of a validation kept aside for its pictures."""

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        self._prepare = prepare
        self.kept: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        prepared = self._prepare(images)
        if self.kept is None:
            self.kept = prepared[:IMAGES].clone()
        return prepared


def seen_images(batch: Batch, mix: Mix | None, engine: Engine, classes: tuple[str, ...]
                ) -> tuple[list[np.ndarray], list[list[str]]]:
    """The first images of the batch as the network got them, uint8 [S, S, 3], and their labels.

    They take the step's own way through normalisation and mixing, and the normalisation is then
    undone; one whole `bn_batch`, because images are mixed within it.
    """
    count = min(len(batch.labels), engine.config.bn_batch or IMAGES)
    device = engine.world.device
    x = engine.normalize(batch.images[:count].to(device))
    labels = batch.labels[:count].to(device)
    captions = [[classes[label]] for label in batch.labels[:count].tolist()]
    if mix is not None:
        x, targets = mix(x, labels)
        if targets.partners is not None and targets.weights is not None:
            for caption, partner, weight in zip(captions, targets.partners.tolist(),
                                                targets.weights.tolist(), strict=True):
                caption[0] = f"{100 * weight:.0f}% {caption[0]}"
                caption.append(f"{100 * (1 - weight):.0f}% {classes[partner]}")
    pixels = engine.pixels(x[:IMAGES]).cpu().numpy()
    return list(pixels), captions[:IMAGES]


def surest_mistakes(outcomes: Outcomes, count: int) -> np.ndarray:
    """Positions in `outcomes` of the wrong answers, the surest first."""
    wrong = np.flatnonzero(outcomes.predicted != outcomes.labels)
    return wrong[np.argsort(-outcomes.confidences[wrong], kind="stable")][:count]


def batch_norm_statistics(model: nn.Module) -> dict[str, list[np.ndarray]]:
    """Per BatchNorm in network order: running mean and deviation, scale and shift, [channels]."""
    layers = [m for m in model.modules() if isinstance(m, GhostBatchNorm2d)]

    def values(read: Callable[[GhostBatchNorm2d], Tensor]) -> list[np.ndarray]:
        return [read(layer).detach().float().cpu().numpy() for layer in layers]

    return {"running_mean": values(lambda layer: layer.running_mean),
            "running_std": values(lambda layer: layer.running_var.sqrt()),
            "scale": values(lambda layer: layer.weight),
            "shift": values(lambda layer: layer.bias)}


def plot_batch_norms(statistics: dict[str, list[np.ndarray]]) -> Any:
    """A matplotlib Figure: for every statistic its median over channels, and the middle 80%."""
    from matplotlib.figure import Figure  # its import takes longer than most panels

    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    for axes, (name, layers) in zip(figure.subplots(2, 2).flat, statistics.items(), strict=True):
        low, middle, high = (np.array([np.percentile(layer, part) for layer in layers])
                             for part in (10, 50, 90))
        places = np.arange(1, len(layers) + 1)
        axes.fill_between(places, low, high, alpha=0.3, label="10% to 90% of channels")
        axes.plot(places, middle, lw=1, label="median")
        axes.set(title=name.replace("_", " "), xlabel="BatchNorm, in network order")
    figure.axes[0].legend(fontsize=8)
    return figure
