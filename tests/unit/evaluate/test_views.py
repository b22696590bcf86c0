"""Every protocol against a slow, obvious implementation: Pillow, one view at a time, float64."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_dist.config.schema import EvalConfig
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.evaluate.passes import Member, mean_log_probabilities, predict
from resnet_dist.evaluate.views import open_views
from resnet_dist.evaluate.views import picture as decoded
from resnet_dist.ranks.distributed import World
from tests.unit.data.samples import Sample, jpeg_sample, raw_sample, write_dataset

CLASSES = 10
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def stored() -> list[Sample]:
    """JPEG and raw pictures, wide and tall, two of the same size: (bytes, mode, h, w, label)."""
    shapes = [(70, 93), (91, 66), (70, 93), (64, 64), (120, 75)]
    return ([jpeg_sample(seed, seed % CLASSES, *shape) for seed, shape in enumerate(shapes)]
            + [raw_sample(9 + seed, 9, *shape) for seed, shape in enumerate(shapes[:2])])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory,
            stored: list[Sample]) -> Path:
    return write_dataset(tmp_path_factory.mktemp("views") / "data",
                         {"train": [stored[:1]], "val": [stored[:4], stored[4:]]})


def network(seed: int) -> Member:
    """A small convolutional network in float64 that takes any size, and its normalization."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 24, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES)).double().eval()
    with torch.no_grad():
        model[-1].weight.mul_(40)
    return model, lambda images: (images.permute(0, 3, 1, 2).double() / 255 - 0.45) / 0.25


# -- The slow, obvious implementation --------------------------------------------------------------

def coverage(count: int, out: int) -> np.ndarray:
    """float64 [out, count]: the mean over the area covered; linear between centres if larger."""
    step, i, j = count / out, np.arange(out)[:, None], np.arange(count)[None]
    if step >= 1:
        return np.clip(np.minimum((i + 1) * step, j + 1) - np.maximum(i * step, j), 0, None) / step
    centre = np.clip((i + 0.5) * step - 0.5, 0, count - 1)
    return np.clip(1 - np.abs(centre - j), 0, None)


def picture(sample: Sample, side: int | None) -> Image.Image:
    data, mode, height, width, _ = sample
    image = (Image.frombytes("RGB", (width, height), data) if mode else
             Image.open(io.BytesIO(data)).convert("RGB"))
    if side is None:
        return image
    shorter = min(height, width)
    rows, columns = (coverage(count, side * count // shorter) for count in (height, width))
    pixels = np.einsum("yh,hwc->ywc", rows, np.asarray(image, np.float64))
    pixels = np.einsum("ywc,xw->yxc", pixels, columns)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def ten(image: Image.Image, size: int) -> Iterator[Image.Image]:
    right, bottom = image.width - size, image.height - size
    for left, top in ((0, 0), (right, 0), (0, bottom), (right, bottom),
                      (round(right / 2), round(bottom / 2))):
        crop = image.crop((left, top, left + size, top + size))
        yield crop
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def answer(members: list[Member], views: list[Image.Image]) -> Tensor:
    """Mean of the softmax over members and views, one forward each: float64 [classes]."""
    shares = []
    for model, _ in members:
        for view in views:
            x = torch.tensor(np.asarray(view).copy(), dtype=torch.float64)
            x = (x.permute(2, 0, 1)[None] / 255 - 0.45) / 0.25
            with torch.no_grad():
                shares.append(torch.softmax(model(x)[0], 0))
    return torch.stack(shares).mean(0)


def seen(members: list[Member], dataset: Path, **options: object) -> Tensor:
    """float64 [n, classes], what the product answers."""
    config = EvalConfig(**{"batch_size": 3, **options})  # type: ignore[arg-type]
    with torch.no_grad(), open_views(dataset, config, ALONE, threads=2, verify="page") as views:
        return torch.cat([mean_log_probabilities(members, group.images, len(group.labels),
                                                 ALONE.device).exp() for group in views])


def slow(members: list[Member], stored: list[Sample],
         views: Callable[[Sample], list[Image.Image]]) -> Tensor:
    return torch.stack([answer(members, views(sample)) for sample in stored])


def resized(dataset: Path, count: int, side: int) -> list[Image.Image]:
    """What the product decodes and resizes."""
    with ShardReader(dataset, "val") as reader:
        return [Image.fromarray(decoded(reader, sample, side, check=True))
                for sample in range(count)]


# -- Equal answers ---------------------------------------------------------------------------------

def logits(shares: Tensor) -> Tensor:
    """Logits up to a constant: what softmax leaves of them, centred."""
    logs = shares.log()
    return logs - logs.mean(1, keepdim=True)


def test_ten_crops_equal_the_slow_implementation(dataset: Path, stored: list[Sample]) -> None:
    members = [network(0)]
    fast = seen(members, dataset, protocol="10crop", resize=None, size=48)
    expected = slow(members, stored, lambda s: list(ten(picture(s, None), 48)))
    torch.testing.assert_close(logits(fast), logits(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(fast, expected, rtol=0, atol=1e-12)


def test_ten_crops_of_a_resized_picture_equal_it_up_to_a_rounded_grey_level(
        dataset: Path, stored: list[Sample]) -> None:
    members = [network(1)]
    fast = seen(members, dataset, protocol="10crop", resize=56, size=48)
    expected = slow(members, stored, lambda s: list(ten(picture(s, 56), 48)))
    torch.testing.assert_close(logits(fast), logits(expected), rtol=0, atol=0.01)
    centre = slow(members, stored, lambda s: list(ten(picture(s, 56), 48))[8:])
    assert (logits(centre) - logits(expected)).abs().max() > 0.05, "crops must differ"


@pytest.mark.parametrize("side", [40, 56, 80])
def test_resized_pictures_are_those_of_the_slow_implementation_but_for_roundings(
        dataset: Path, stored: list[Sample], side: int) -> None:
    """JPEGs are resized before their colours are converted, which rounds and clips otherwise."""
    for ours, sample in zip(resized(dataset, len(stored), side), stored, strict=True):
        apart = np.abs(np.asarray(ours, np.int64) - np.asarray(picture(sample, side), np.int64))
        assert apart.mean() < 0.5
        assert apart.max() <= 1 or not sample[1]


def test_of_the_same_resized_pictures_the_logits_are_equal(
        dataset: Path, stored: list[Sample]) -> None:
    members, scales = [network(1), network(2)], (40, 48, 80)
    by_scale = [resized(dataset, len(stored), side) for side in scales]
    for fast, expected in (
            (seen(members, dataset, protocol="multiscale", scales=scales, size=48),
             [answer(members, list(views)) for views in zip(*by_scale, strict=True)]),
            (seen(members, dataset, protocol="10crop", resize=56, size=48),
             [answer(members, list(ten(image, 48))) for image in
              resized(dataset, len(stored), 56)])):
        torch.testing.assert_close(logits(fast), logits(torch.stack(expected)), rtol=0, atol=1e-9)


def test_several_scales_equal_the_slow_implementation(dataset: Path, stored: list[Sample]) -> None:
    members, scales = [network(2)], (40, 48, 80)
    fast = seen(members, dataset, protocol="multiscale", scales=scales, size=48)
    expected = slow(members, stored, lambda s: [picture(s, side) for side in scales])
    torch.testing.assert_close(logits(fast), logits(expected), rtol=0, atol=0.01)
    without_largest = slow(members, stored, lambda s: [picture(s, side) for side in scales[:-1]])
    assert (logits(without_largest) - logits(expected)).abs().max() > 0.05, "scales must differ"


def test_one_crop_and_its_mirror_image_equal_the_slow_implementation(
        dataset: Path, stored: list[Sample]) -> None:
    members = [network(3)]
    for protocol, count in (("1crop", 1), ("flip", 2)):
        fast = seen(members, dataset, protocol=protocol, resize=None, size=48)
        expected = slow(members, stored,
                        lambda s, n=count: list(ten(picture(s, None), 48))[8:8 + n])
        torch.testing.assert_close(logits(fast), logits(expected), rtol=0, atol=1e-9)


def test_an_ensemble_is_the_mean_of_its_members_softmax(
        dataset: Path, stored: list[Sample]) -> None:
    members = [network(4), network(5), network(6)]
    options = {"protocol": "flip", "resize": None, "size": 40}
    together = seen(members, dataset, **options)
    torch.testing.assert_close(
        together, torch.stack([seen([m], dataset, **options) for m in members]).mean(0))
    torch.testing.assert_close(
        together, slow(members, stored, lambda s: list(ten(picture(s, None), 40))[8:]))


@pytest.mark.parametrize("protocol", ["1crop", "flip", "10crop", "multiscale"])
def test_the_batch_size_changes_nothing(dataset: Path, protocol: str) -> None:
    options = {"protocol": protocol, "resize": 56, "size": 48, "scales": (48, 64)}
    whole = seen([network(7)], dataset, batch_size=100, **options)
    for size in (1, 2):
        torch.testing.assert_close(seen([network(7)], dataset, batch_size=size, **options), whole,
                                   rtol=1e-9, atol=1e-12)


def test_outcomes_are_those_of_the_probabilities(dataset: Path, stored: list[Sample]) -> None:
    members = [network(8)]
    config = EvalConfig(resize=None, size=48, batch_size=4)
    with open_views(dataset, config, ALONE, threads=1, verify="page") as views:
        found = predict(members, views, ALONE)
    shares = seen(members, dataset, resize=None, size=48).numpy()
    labels = np.array([sample[4] for sample in stored])
    every = np.arange(len(labels))
    assert (found.sample_ids == every).all()
    assert (found.labels == labels).all()
    assert (found.predicted == shares.argmax(1)).all()
    assert (found.places == (shares > shares[every, labels][:, None]).sum(1)).all()
    np.testing.assert_allclose(found.confidences, shares.max(1), rtol=1e-12)
    np.testing.assert_allclose(found.losses, -np.log(shares[every, labels]), rtol=1e-9)


def test_ties_rank_by_class_and_what_is_no_number_is_wrong(dataset: Path) -> None:
    def even(x: Tensor) -> Tensor:
        return torch.zeros(len(x), CLASSES)

    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x), CLASSES), torch.nan)

    def outcomes(model: Callable[[Tensor], Tensor]) -> object:
        with open_views(dataset, EvalConfig(resize=None, size=48), ALONE, threads=1,
                        verify="page") as views:
            return predict([(model, network(0)[1])], views, ALONE)

    tied = outcomes(even)
    assert (tied.predicted == 0).all()  # type: ignore[attr-defined]
    assert (tied.places == tied.labels).all()  # type: ignore[attr-defined]
    lost = outcomes(broken)
    assert (lost.places == CLASSES).all()  # type: ignore[attr-defined]
    assert np.isnan(lost.losses).all()  # type: ignore[attr-defined]


def test_a_very_sure_network_has_a_finite_loss(dataset: Path) -> None:
    def sure(x: Tensor) -> Tensor:
        return torch.tensor([[2000.0] + [0.0] * (CLASSES - 1)]).repeat(len(x), 1)

    with open_views(dataset, EvalConfig(protocol="10crop", resize=None, size=48), ALONE, threads=1,
                    verify="page") as views:
        found = predict([(sure, network(0)[1])], views, ALONE)
    wrong = found.labels != 0
    np.testing.assert_allclose(found.losses[wrong], 2000)


# -- Refusals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["1crop", "10crop", "multiscale"])
def test_a_damaged_picture_is_named(
        tmp_path: Path, stored: list[Sample], protocol: str) -> None:
    root = write_dataset(tmp_path / "data", {"train": [stored[:1]], "val": [stored]})
    shard = root / "val" / "shard-00000.beton"
    content = bytearray(shard.read_bytes())
    at = content.find(stored[3][0][-200:])
    assert at > 0
    content[at] ^= 1
    shard.write_bytes(content)
    config = EvalConfig(protocol=protocol, resize=64, size=48, scales=(64,))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample 3"):
        with open_views(root, config, ALONE, threads=1, verify="page") as views:
            predict([network(0)], views, ALONE)


def test_crops_larger_than_the_picture_are_refused_with_the_remedy(dataset: Path) -> None:
    config = EvalConfig(protocol="10crop", resize=None, size=72)
    with pytest.raises(DataError, match=r"eval\.size = 72.*set eval\.resize"):
        with open_views(dataset, config, ALONE, threads=1, verify="page") as views:
            predict([network(0)], views, ALONE)
