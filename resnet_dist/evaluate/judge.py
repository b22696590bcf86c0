"""From what a network made of every sample to figures: NumPy in, numbers, JSON and pictures out.

In: `Outcomes`, one entry a sample. Out: accuracies with confidence intervals, per-class accuracy,
confusion matrix, calibration. Nothing here depends on how many ranks or batches found the outcomes.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from resnet_dist.data.shards.manifest import legible

log = logging.getLogger(__name__)
CALIBRATION_BINS = 15  # Guo et al. 2017, sec. 5


@dataclass(frozen=True)
class Outcomes:
    """Every sample of a split once, in sample order; arrays [n]."""

    sample_ids: np.ndarray  # int64
    labels: np.ndarray  # int64
    predicted: np.ndarray  # int64, the most probable class
    places: np.ndarray  # int64, how many classes stand before the label; the class count: never
    confidences: np.ndarray  # float64, probability of the predicted class
    losses: np.ndarray  # float64, -log of the label's probability


def summary(outcomes: Outcomes) -> dict[str, Any]:
    """loss (nats), top1 and top5 (percent), samples; Wilson intervals at 95% (percent).

    Raises: ValueError where there are no samples.
    """
    samples = len(outcomes.labels)
    if not samples:
        raise ValueError("nothing to judge: the split has no samples")
    hits1, hits5 = int((outcomes.places < 1).sum()), int((outcomes.places < 5).sum())
    return {"loss": float(outcomes.losses.sum()) / samples, "top1": 100 * hits1 / samples,
            "top5": 100 * hits5 / samples, "samples": samples,
            "top1_interval": [100 * bound for bound in wilson(hits1, samples)],
            "top5_interval": [100 * bound for bound in wilson(hits5, samples)]}


def scores(outcomes: Outcomes) -> dict[str, float]:
    """What training records of a validation: loss (nats), top1 and top5 (percent), samples."""
    found = summary(outcomes)
    return {key: found[key] for key in ("loss", "top1", "top5", "samples")}


def wilson(hits: int, samples: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion that stays in [0, 1] and is honest near its ends.

    It covers the sampling of the test images alone; training with another seed varies on top.
    Source: Wilson 1927.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / samples, z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(outcomes: Outcomes, classes: int) -> np.ndarray:
    """int64 [pairs, 3]: label, predicted class and how many samples, of every pair that occurs, in
    order. The whole matrix of ImageNet-21K would take 3.8 GB, and nearly all of it is zero."""
    pairs, counts = np.unique(outcomes.labels * classes + outcomes.predicted, return_counts=True)
    return np.stack([pairs // classes, pairs % classes, counts], axis=1)


def class_samples(outcomes: Outcomes, classes: int) -> np.ndarray:
    """int64 [classes]."""
    return np.bincount(outcomes.labels, minlength=classes)


def class_accuracy(outcomes: Outcomes, classes: int) -> np.ndarray:
    """Percent [classes]; NaN for a class without samples."""
    samples = class_samples(outcomes, classes)
    right = np.bincount(outcomes.labels[outcomes.predicted == outcomes.labels], minlength=classes)
    return np.where(samples > 0, 100 * right / np.maximum(samples, 1), np.nan)


@dataclass(frozen=True)
class Calibration:
    """How often the network is right when it says that it is `confidence` sure."""

    edges: np.ndarray  # [bins + 1]
    counts: np.ndarray  # [bins], samples
    confidence: np.ndarray  # [bins], mean in the bin; NaN without samples
    accuracy: np.ndarray  # [bins], share that was right; NaN without samples
    ece: float  # mean over samples of |accuracy - confidence| of their bin, in [0, 1]
    largest_gap: float  # of any bin


def calibration(outcomes: Outcomes, bins: int = CALIBRATION_BINS) -> Calibration:
    """Expected calibration error over equal bins (a, b] of confidence.

    Source: Guo et al. 2017, sec. 2.
    """
    which = np.clip(np.ceil(outcomes.confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    right = outcomes.predicted == outcomes.labels
    counts = np.bincount(which, minlength=bins)
    some = counts > 0
    sure = np.bincount(which, outcomes.confidences, bins)
    correct = np.bincount(which, right.astype(np.float64), bins)
    gaps = np.abs(correct - sure)  # of counts, so empty bins weigh nothing
    shown = np.maximum(counts, 1)
    return Calibration(np.linspace(0, 1, bins + 1), counts, np.where(some, sure / shown, np.nan),
                       np.where(some, correct / shown, np.nan), float(gaps.sum() / counts.sum()),
                       float((gaps / shown).max()))


# -- Reports ---------------------------------------------------------------------------------------

def write_report(folder: Path, outcomes: Outcomes, classes: tuple[str, ...],
                 about: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """The `drawn` figures as PNG and result.json in `folder`; the summary.

    `about` says what was evaluated and stands first in the JSON file, which is written last.
    """
    calibrated, accuracy = calibration(outcomes), class_accuracy(outcomes, len(classes))
    samples = class_samples(outcomes, len(classes))
    result = {**about, **summary(outcomes), "ece": 100 * calibrated.ece}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    record = {
        **result,
        "classes": [{"name": name, "samples": int(samples[i]), "top1": _plain(accuracy[i])}
                    for i, name in enumerate(classes)],
        "confusion": {"columns": ["label", "predicted", "samples"],
                      "rows": confusion(outcomes, len(classes)).tolist()},
        "calibration": {
            "ece": 100 * calibrated.ece, "largest_gap": 100 * calibrated.largest_gap,
            "bins": [{"from": float(low), "to": float(high), "samples": int(count),
                      "confidence": _plain(sure), "accuracy": _plain(right)}
                     for low, high, count, sure, right in zip(
                         calibrated.edges[:-1], calibrated.edges[1:], calibrated.counts,
                         calibrated.confidence, calibrated.accuracy, strict=True)]}}
    indent = 1 if len(classes) <= _DRAWN_CLASSES else None  # indented, a pair takes four lines
    text = json.dumps(record, indent=indent) + "\n"
    (folder / "result.json").write_text(text, encoding="utf-8")
    return result


def log_report(board: Any, tag: str, step: int, result: dict[str, Any],
               drawn: dict[str, Any]) -> None:
    """Scalars and pictures under `tag/` to a TensorBoard SummaryWriter."""
    for key in ("loss", "top1", "top5", "ece"):
        board.add_scalar(f"{tag}/{key}", result[key], step)
    for name, figure in drawn.items():
        board.add_figure(f"{tag}/{name}", figure, step)


def figures(outcomes: Outcomes, classes: tuple[str, ...]) -> dict[str, Any]:
    """matplotlib Figures by name; no confusion matrix of more classes than fit a picture."""
    shown, count = _plotted(classes), len(classes)
    drawn = {"reliability": plot_reliability(calibration(outcomes)),
             "classes": plot_classes(class_accuracy(outcomes, count), shown)}
    if count > _DRAWN_CLASSES:
        log.info("no picture of the confusion: %s classes do not fit one; `resnet-dist eval` "
                 "writes the pairs to result.json", f"{count:,}")
        return drawn
    return {"confusion": plot_confusion(confusion(outcomes, count), shown)} | drawn


def _plotted(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names as matplotlib draws them letter by letter, without a warning for each it has not."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[family])))  # type: ignore[arg-type]
             for family in _FAMILIES]
    has = frozenset(fonts[0].get_charmap()).intersection(*(font.get_charmap() for font in fonts))
    # A dollar begins a formula, unless it is escaped.
    return tuple(name.replace("$", r"\$") for name in legible(classes, has, _NAME_LETTERS))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # its import takes longer than a small evaluation

    return Figure(figsize=(width, height), layout="constrained")


_NAMED_CLASSES = 40  # with more, names and numbers no longer fit a picture
_DRAWN_CLASSES = 2000  # with more, a cell of the confusion matrix is a fraction of a pixel
_NAME_LETTERS = 32  # of a class, so that the picture is not all names
_FAMILIES = ("DejaVu Sans", "DejaVu Sans Mono")  # matplotlib brings both


def plot_confusion(pairs: np.ndarray, classes: tuple[str, ...]) -> Any:
    """Rows are labels in percent of their samples; with few classes each cell says its count."""
    from matplotlib.colors import LogNorm

    count = len(classes)
    side = min(max(4.5, 0.42 * count + 1.5), 9.0)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    matrix = np.zeros((count, count), np.int64)
    matrix[pairs[:, 0], pairs[:, 1]] = pairs[:, 2]
    percent = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Most cells are empty or tiny; a linear scale would show the diagonal alone.
    image = axes.imshow(np.maximum(percent, 0.1), cmap="Blues", norm=LogNorm(0.1, 100),
                        interpolation="nearest" if count <= 400 else "antialiased")
    axes.set(xlabel="predicted", ylabel="label", title="Confusion")
    if count <= _NAMED_CLASSES:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
        if count <= 20:
            for row, column, samples in pairs:
                axes.text(column, row, f"{samples}", ha="center", va="center",
                          fontsize=7, color="white" if percent[row, column] > 10 else "black")
    figure.colorbar(image, ax=axes, label="percent of the label's samples (0.1: or fewer)")
    return figure


def plot_reliability(calibrated: Calibration) -> Any:
    """Accuracy against confidence, and below it how many samples each bin holds."""
    figure = _figure(4.8, 5.6)
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    centres = (calibrated.edges[:-1] + calibrated.edges[1:]) / 2
    width = 0.92 * (calibrated.edges[1] - calibrated.edges[0])
    above.plot([0, 1], [0, 1], color="gray", lw=1, ls="--", label="calibrated")
    above.bar(centres, np.nan_to_num(calibrated.accuracy), width, color="tab:blue", alpha=0.7,
              label="share that was right")
    above.plot(calibrated.confidence, calibrated.accuracy, "o", color="black", ms=3,
               label="at the bin's mean confidence")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy",
              title=f"Calibration: ECE {100 * calibrated.ece:.2f}%")
    above.legend(loc="upper left", fontsize=8)
    below.bar(centres, calibrated.counts, width, color="gray")
    below.set(xlabel="confidence", ylabel="samples", yscale="symlog", ylim=(0, None))
    return figure


def plot_classes(accuracy: np.ndarray, classes: tuple[str, ...]) -> Any:
    """Per-class top-1, worst first; beyond 40 classes as a curve with the ten worst named."""
    present = np.flatnonzero(~np.isnan(accuracy))
    order = present[np.argsort(accuracy[present], kind="stable")]
    if len(order) <= _NAMED_CLASSES:
        figure = _figure(6.0, max(2.5, 0.26 * len(order) + 1.2))
        axes = figure.subplots()
        bars = axes.barh(range(len(order)), accuracy[order], color="tab:blue")
        axes.set_yticks(range(len(order)), [classes[i] for i in order])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.invert_yaxis()
        axes.set(xlabel="top-1, percent", xlim=(0, 108))
    else:
        figure = _figure(7.0, 4.0)
        axes = figure.subplots()
        axes.plot(np.arange(1, len(order) + 1), accuracy[order], color="tab:blue")
        worst = "\n".join(f"{accuracy[i]:5.1f}  {classes[i]}" for i in order[:10])
        axes.text(0.98, 0.05, f"worst\n{worst}", transform=axes.transAxes, ha="right", va="bottom",
                  fontsize=7, family="monospace")
        axes.set(xlabel="classes, worst first", ylabel="top-1, percent", ylim=(0, 100))
    axes.set_title("Accuracy by class")
    return figure


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)
