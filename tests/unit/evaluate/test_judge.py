"""Figures of an evaluation: against obvious loops, published values and scikit-learn."""

import json
import math
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.evaluate.judge import (
    Outcomes,
    calibration,
    class_accuracy,
    confusion,
    figures,
    summary,
    wilson,
    write_report,
)


def outcomes(count: int, classes: int, seed: int = 0) -> Outcomes:
    """Made-up but consistent: place 0 exactly where the prediction is the label."""
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, (2, count))
    right = rng.random(count) < 0.5
    predicted = np.where(right, labels, predicted)
    places = np.where(predicted == labels, 0, rng.integers(1, classes, count))
    confidences = rng.uniform(1 / classes, 1, count)
    return Outcomes(np.arange(count), labels, predicted, places, confidences,
                    -np.log(rng.uniform(1e-3, 1, count)))


def test_wilson_gives_the_published_intervals() -> None:
    # Newcombe 1998, table I, method 3 (Wilson without continuity correction).
    for hits, samples, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                     (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6), st.data())
def test_wilson_holds_the_share_and_mirrors(samples: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, samples))
    low, high = wilson(hits, samples)
    assert 0 <= low <= hits / samples + 1e-12
    assert hits / samples - 1e-12 <= high <= 1
    mirrored = wilson(samples - hits, samples)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_wilson_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= truth <= high for truth in (0.02, 0.5, 0.9125)
               for low, high in (wilson(int(h), 500) for h in rng.binomial(500, truth, 2000))]
    assert 0.93 < np.mean(covered) < 0.97


def test_confusion_and_class_accuracy_equal_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, recall_score

    found = outcomes(500, 7)
    expected = confusion_matrix(found.labels, found.predicted, labels=range(7))
    assert confusion(found, 7).tolist() == [[i, j, expected[i, j]]
                                            for i, j in np.argwhere(expected > 0)]
    np.testing.assert_allclose(class_accuracy(found, 7), 100 * recall_score(
        found.labels, found.predicted, average=None, labels=range(7)))


def test_a_class_without_samples_has_no_accuracy_rather_than_zero() -> None:
    zeros, sure = np.zeros(4, np.int64), np.full(4, 0.5)
    found = Outcomes(np.arange(4), zeros, np.array([0, 0, 0, 1]), zeros, sure, sure)
    assert class_accuracy(found, 2)[0] == 75
    assert math.isnan(class_accuracy(found, 2)[1])


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_calibration_error_equals_the_definition(count: int, bins: int, seed: int) -> None:
    found = outcomes(count, 5, seed)
    slow = 0.0
    for b in range(bins):
        inside = [i for i in range(count)
                  if b / bins < found.confidences[i] <= (b + 1) / bins]
        if inside:
            right = np.mean([found.predicted[i] == found.labels[i] for i in inside])
            sure = np.mean([found.confidences[i] for i in inside])
            slow += len(inside) / count * abs(right - sure)
    measured = calibration(found, bins)
    assert measured.ece == pytest.approx(slow, abs=1e-12)
    assert measured.counts.sum() == count


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    sure = np.array([0.25, 0.25, 0.26, 0.5, 0.75, 1.0])
    zeros = np.zeros(6, np.int64)
    found = Outcomes(np.arange(6), zeros, zeros, zeros, sure, -np.log(sure))
    assert calibration(found, 4).counts.tolist() == [2, 2, 1, 1]


def test_a_network_that_knows_how_sure_it_may_be_has_no_calibration_error() -> None:
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 200_000)
    predicted = np.where(rng.random(200_000) < sure, 0, 1)
    places = np.minimum(predicted, 1)
    honest = Outcomes(np.arange(200_000), np.zeros(200_000, np.int64), predicted, places, sure,
                      -np.log(sure))
    assert calibration(honest).ece < 0.005
    boastful = Outcomes(honest.sample_ids, honest.labels, predicted, places,
                        np.ones_like(sure), honest.losses)
    assert calibration(boastful).ece == pytest.approx(0.25, abs=0.005)


def test_summary_counts_places_and_refuses_an_empty_split() -> None:
    found = outcomes(1000, 50)
    numbers = summary(found)
    assert numbers["top1"] == pytest.approx(100 * np.mean(found.places == 0))
    assert numbers["top5"] == pytest.approx(100 * np.mean(found.places <= 4))
    assert numbers["loss"] == pytest.approx(found.losses.mean())
    assert numbers["top1_interval"][0] < numbers["top1"] < numbers["top1_interval"][1]
    with pytest.raises(ValueError, match="no samples"):
        summary(outcomes(0, 5))


@pytest.mark.parametrize("classes", [10, 60])
def test_the_report_holds_the_whole_confusion_and_opens_as_pictures(
        tmp_path: Path, classes: int) -> None:
    from PIL import Image

    found = outcomes(400, classes)
    names = tuple(f"class {i}" for i in range(classes))
    result = write_report(tmp_path, found, names, {"run": "r", "step": 7}, figures(found, names))
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["run"] == "r"
    assert record["top1"] == result["top1"]
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (found.labels, found.predicted), 1)
    assert record["confusion"]["rows"] == [[i, j, matrix[i, j]]
                                           for i, j in np.argwhere(matrix > 0)]
    assert [entry["name"] for entry in record["classes"]] == list(names)
    assert sum(b["samples"] for b in record["calibration"]["bins"]) == 400
    for name in ("confusion", "reliability", "classes"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10, "blank"


def test_21841_classes_are_reported_in_megabytes_and_the_confusion_is_left_out(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole matrix has 477 million cells: 3.8 GB, and 27 GB on its way to a picture."""
    found, names = outcomes(100_000, 21_841), tuple(f"n{i:08d}" for i in range(21_841))
    tracemalloc.start()
    with caplog.at_level("INFO"):
        drawn = figures(found, names)
        write_report(tmp_path, found, names, {}, drawn)
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()
    assert sorted(drawn) == ["classes", "reliability"]
    assert "21,841 classes do not fit" in caplog.text
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6
    record = json.loads((tmp_path / "result.json").read_text())
    assert sum(samples for _, _, samples in record["confusion"]["rows"]) == 100_000
    assert len(record["classes"]) == 21_841


@pytest.mark.parametrize("classes", [8, 60])  # named one by one; only the worst are named
def test_any_name_of_a_class_is_drawn_without_a_warning(tmp_path: Path, classes: int) -> None:
    odd = ("猫", "caf\udce9", "costs $5 and $6_", "two\nlines", "=SUM(A1)", "d'e\"f", "🐈" * 99,
           "x" * 300)
    names = odd + tuple(f"犬 {i}" for i in range(len(odd), classes))
    found = outcomes(400, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, found, names, {}, figures(found, names))
    record = json.loads((tmp_path / "result.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == list(names)


def test_names_that_the_font_has_stay_and_the_others_are_numbers() -> None:
    figure = figures(outcomes(400, 4), ("Käfer", "кот", "猫", "a $1_ $2"))["confusion"]
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == ["Käfer", "кот", "class 2", r"a \$1_ \$2"]
