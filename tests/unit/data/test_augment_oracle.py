"""Each augmentation, from its key to its pixels, against a reference in Python integers, float64
and Pillow. The references write the sources' constants out again and call nothing of the product.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation.mix import mixer
from resnet_dist.data.augmentation.plans import train_plans
from resnet_dist.data.decode import decoder
from tests.unit.data.samples import picture
from tests.unit.data.test_augment import (
    CROP,
    ERASE,
    FLIP,
    JITTER,
    MIX,
    PCA,
    RAND,
    RAND_Z,
    slow_uniforms,
)

RAND_FILTER, TRIVIAL = 10, 11
SEED, SIZE, IMAGES = 0x1234_5678_9ABC, 40, 96
MEAN = (124, 116, 104)  # what comes in from outside
TIES = 0.005  # share of values that may round the other way; later operations can widen one

Picture = np.ndarray  # uint8 [SIZE, SIZE, 3]


def key_of(i: int) -> tuple[int, int]:
    """(epoch, sample id) of the i-th image of a test: large and small numbers."""
    return i * 37 % 91, i * 48_611 % 1_281_167


def source(i: int) -> Picture:
    return picture(i, SIZE, SIZE)


def product(**options: object) -> tuple[np.ndarray, list[Picture]]:
    """The plans and the pixels that they make of IMAGES whole pictures."""
    augment = AugmentConfig(name="pad_crop", pad=0, size=SIZE, **options)  # type: ignore[arg-type]
    epochs, ids = np.array([key_of(i) for i in range(IMAGES)]).T
    sides = np.full(IMAGES, SIZE)
    plans = train_plans(augment, SEED, epochs, ids, sides, sides, SIZE)
    pad = np.broadcast_to(np.array(MEAN, np.uint8), (SIZE, SIZE, 3))
    return plans, [decoder.decode_one(source(i).tobytes(), decoder.RAW, SIZE, SIZE, plans[i],
                                     (SIZE, SIZE), pad) for i in range(IMAGES)]


def uniform(i: int, purpose: int, count: int) -> list[float]:
    return slow_uniforms(SEED, *key_of(i), purpose, count)


def normal(i: int, purpose: int, count: int) -> list[float]:
    """Box and Muller's: the cosine of each pair, then its sine."""
    u = uniform(i, purpose, count + count % 2)
    pairs = [(math.sqrt(-2 * math.log1p(-a)), 2 * math.pi * b)
             for a, b in zip(u[::2], u[1::2], strict=True)]
    return [r * f(angle) for r, angle in pairs for f in (math.cos, math.sin)][:count]


def flipped(i: int) -> Picture:
    image = source(i)
    return image[:, ::-1] if uniform(i, FLIP, 1)[0] < 0.5 else image


def colour_shift(i: int, sigma: float) -> np.ndarray:
    """Krizhevsky et al. 2012, section 4.1: the sum of alpha_k lambda_k p_k, in grey levels."""
    deviations = (0.2175, 0.0188, 0.0045)
    components = ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948),
                  (0.4009, -0.8140, 0.4203))
    total = np.zeros(3)
    for alpha, deviation, component in zip(normal(i, PCA, 3), deviations, components, strict=True):
        total += sigma * alpha * deviation * np.array(component)
    return np.clip(255 * total, -255, 255)


def inside(image: Picture, xs: np.ndarray, ys: np.ndarray, bicubic: bool,
           fill: tuple[int, int, int]) -> Picture:
    """The picture seen at (xs, ys), pixel centres at halves: float64, rounded once."""
    def weights(t: np.ndarray) -> dict[int, np.ndarray]:
        if not bicubic:
            return {0: 1 - t, 1: t}

        def near(d: np.ndarray) -> np.ndarray:  # Keys' kernel with a = -1, up to 1 and up to 2
            return d**3 - 2 * d**2 + 1

        def far(d: np.ndarray) -> np.ndarray:
            return -d**3 + 5 * d**2 - 8 * d + 4
        return {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}

    left, top = np.floor(xs - 0.5).astype(int), np.floor(ys - 0.5).astype(int)
    result = np.zeros(image.shape)
    for dy, wy in weights(ys - 0.5 - top).items():
        for dx, wx in weights(xs - 0.5 - left).items():
            rows, cols = np.clip(top + dy, 0, SIZE - 1), np.clip(left + dx, 0, SIZE - 1)
            result += (wy * wx)[..., None] * image[rows, cols]
    outside = (xs < 0) | (xs >= SIZE) | (ys < 0) | (ys >= SIZE)
    result[outside] = fill
    return np.floor(np.clip(result, 0, 255) + 0.5).astype(np.uint8)


def operate(name: str, value: float, image: Picture, bicubic: bool = False,
            fill: tuple[int, int, int] = MEAN) -> Picture:
    """One operation by Pillow, or by the definition of the geometric ones."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    middle, angle = SIZE / 2, math.radians(value)
    turned = (middle + math.cos(angle) * (x - middle) - math.sin(angle) * (y - middle),
              middle + math.sin(angle) * (x - middle) + math.cos(angle) * (y - middle))
    places = {"ShearX": (x + value * y, y), "ShearY": (x, y + value * x),
              "TranslateX": (x + value * SIZE, y), "TranslateY": (x, y + value * SIZE),
              "Rotate": turned}
    if name in places:
        return inside(image, *places[name], bicubic, fill)
    if name == "SolarizeAdd":
        return np.where(image < 128, np.minimum(255, image + int(value)), image).astype(np.uint8)
    seen = Image.fromarray(image)
    return np.asarray({
        "Brightness": lambda: ImageEnhance.Brightness(seen).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(seen).enhance(value),
        "Color": lambda: ImageEnhance.Color(seen).enhance(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(seen).enhance(value),
        "AutoContrast": lambda: ImageOps.autocontrast(seen),
        "Equalize": lambda: ImageOps.equalize(seen),
        "Invert": lambda: ImageOps.invert(seen),
        "Posterize": lambda: ImageOps.posterize(seen, int(value)) if value else seen.point(
            [0] * 768),
        "Solarize": lambda: ImageOps.solarize(seen, value),
    }[name]())


def jittered(i: int, image: Picture, strengths: dict[str, float]) -> Picture:
    """fb.resnet.torch's ColorJitter: three factors, in the order of three more draws."""
    u = uniform(i, JITTER, 6)
    turns = sorted(range(3), key=lambda k: u[3 + k])
    for k in turns:
        name = ("Brightness", "Contrast", "Color")[k]
        low, high = 1 - strengths[name], 1 + strengths[name]
        image = operate(name, low + u[k] * (high - low), image)
    return image


def rand_augmented(i: int, image: Picture, layers: int, magnitude: float,
                   deviation: float) -> Picture:
    """timm's "rand-m{magnitude}-mstd{deviation}-inc1" and its increasing strengths."""
    names = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
             "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX",
             "TranslateY")
    u, z = uniform(i, RAND, 3 * layers), normal(i, RAND_Z, layers)
    filters = uniform(i, RAND_FILTER, layers)
    for layer in range(layers):
        choice, odds, side = u[3 * layer:3 * layer + 3]
        if odds >= 0.5:
            continue
        level = min(10.0, max(0.0, magnitude + deviation * z[layer])) / 10
        sign = -1 if side < 0.5 else 1
        name = names[int(choice * 15)]
        if name == "Rotate":
            value = 30 * level * sign
        elif name == "Posterize":
            value = 4 - int(4 * level)
        elif name == "Solarize":
            value = 256 - int(256 * level)
        elif name == "SolarizeAdd":
            value = int(110 * level)
        elif name.startswith("Shear"):
            value = 0.3 * level * sign
        elif name.startswith("Translate"):
            value = 0.45 * level * sign
        else:
            value = max(0.1, 1 + 0.9 * level * sign)
        image = operate(name, value, image, filters[layer] < 0.5)
    return image


def trivially_augmented(i: int, image: Picture) -> Picture:
    """torchvision's TrivialAugmentWide: its table of 31 strengths, its operations in its order."""
    table = {
        "Identity": ([0.0] * 31, False), "ShearX": (np.linspace(0, 0.99, 31), True),
        "ShearY": (np.linspace(0, 0.99, 31), True), "TranslateX": (np.linspace(0, 32, 31), True),
        "TranslateY": (np.linspace(0, 32, 31), True), "Rotate": (np.linspace(0, 135, 31), True),
        "Brightness": (np.linspace(0, 0.99, 31), True), "Color": (np.linspace(0, 0.99, 31), True),
        "Contrast": (np.linspace(0, 0.99, 31), True),
        "Sharpness": (np.linspace(0, 0.99, 31), True),
        "Posterize": ([8 - round(k / 5) for k in range(31)], False),
        "Solarize": (np.linspace(255, 0, 31), False), "AutoContrast": ([0.0] * 31, False),
        "Equalize": ([0.0] * 31, False)}
    choice, bin_, side = uniform(i, TRIVIAL, 3)
    name = list(table)[int(choice * 14)]
    values, signed = table[name]
    value = float(values[int(bin_ * 31)]) * (-1 if signed and side < 0.5 else 1)
    if name == "Identity":
        return image
    if name.startswith("Translate"):
        value = int(value) / SIZE
    elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
        value += 1
    return operate(name, value, image, fill=(0, 0, 0))


def erased(i: int, image: Picture, odds: float) -> Picture:
    """Zhong et al. 2017, algorithm 1, with timm's area [0.02, 1/3] and ratio [0.3, 1/0.3]."""
    u = uniform(i, ERASE, 41)
    if u[0] >= odds:
        return image
    for at in range(1, 41, 4):
        area, ratio, y, x = u[at:at + 4]
        area = SIZE**2 * (0.02 + area * (1 / 3 - 0.02))
        ratio = math.exp(math.log(0.3) + ratio * (math.log(1 / 0.3) - math.log(0.3)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= tall < SIZE and 1 <= wide < SIZE:
            image = image.copy()
            top, left = int(y * (SIZE - tall + 1)), int(x * (SIZE - wide + 1))
            image[top:top + tall, left:left + wide] = MEAN
            return image
    return image


def apart(ours: Picture, theirs: np.ndarray) -> np.ndarray:
    return np.abs(ours.astype(np.float64) - theirs)


def test_purposes_have_numbers_of_their_own():
    numbers = [CROP, FLIP, PCA, JITTER, ERASE, RAND, MIX, RAND_Z, RAND_FILTER, TRIVIAL]
    assert len(set(numbers)) == 10


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_pca_colour_equals_the_reference(sigma):
    plans, found = product(pca=sigma)
    for i, image in enumerate(found):
        shift = colour_shift(i, sigma)
        assert plans["shift"][i] == pytest.approx(shift, abs=1e-4)
        assert apart(image, np.clip(flipped(i) + shift, 0, 255)).max() < 0.501


def test_colour_jitter_equals_the_reference():
    strengths = {"Brightness": 0.4, "Contrast": 0.3, "Color": 0.5}
    _, found = product(brightness=0.4, contrast=0.3, saturation=0.5)
    for i, image in enumerate(found):
        difference = apart(image, jittered(i, flipped(i), strengths))
        assert (difference > 0).mean() <= TIES, i


def test_pca_colour_after_jitter_equals_the_reference():
    strengths = {"Brightness": 0.4, "Contrast": 0.0, "Color": 0.5}
    _, found = product(brightness=0.4, saturation=0.5, pca=0.1)
    for i, image in enumerate(found):
        before = jittered(i, flipped(i), strengths)
        assert apart(image, np.clip(before + colour_shift(i, 0.1), 0, 255)).max() <= 1.5


@pytest.mark.parametrize(("layers", "magnitude", "deviation"),
                         [(1, 9.0, 0.0), (2, 7.0, 0.5), (3, 5.0, 4.0)])
def test_randaugment_equals_the_reference(layers, magnitude, deviation):
    plans, found = product(rand_ops=layers, rand_magnitude=magnitude, rand_std=deviation)
    for i, image in enumerate(found):
        difference = apart(image, rand_augmented(i, flipped(i), layers, magnitude, deviation))
        assert (difference > 0).mean() <= TIES, i
        assert plans["num_ops"][i] > 1 or difference.max() <= 1, i


def test_trivialaugment_equals_the_reference():
    _, found = product(trivial=True)
    assert {int(14 * uniform(i, TRIVIAL, 1)[0]) for i in range(IMAGES)} == set(range(14))
    for i, image in enumerate(found):
        difference = apart(image, trivially_augmented(i, flipped(i)))
        assert difference.max() <= 1, i
        assert (difference > 0).mean() <= TIES, i


@pytest.mark.parametrize("odds", [0.25, 1.0])
def test_random_erasing_equals_the_reference(odds):
    _, found = product(erase=odds)
    for i, image in enumerate(found):
        assert np.array_equal(image, erased(i, flipped(i), odds)), i


def slow_beta(alpha: float, step: int, group: int) -> float:
    """Beta(alpha, alpha): Jöhnk 1964 up to 1, above it rejection under the density's peak."""
    u = slow_uniforms(SEED, step, group, MIX, 4 + 256)[4:]
    for a, b in zip(u[::2], u[1::2], strict=True):
        b = max(b, 2**-33)
        if alpha <= 1:
            first, second = max(a, 2**-33) ** (1 / alpha), b ** (1 / alpha)
            if 0 < first + second <= 1:
                return first / (first + second)
        elif b <= (4 * a * (1 - a)) ** (alpha - 1):
            return a
    return 0.5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (1.0, 0.0), (3.0, 0.0), (0.0, 1.0),
                                               (0.0, 0.3), (0.4, 1.0)])
def test_mixup_and_cutmix_equal_the_reference(mixup, cutmix):
    """Zhang et al. 2017, section 2; Yun et al. 2019, section 3.1 and algorithm A1."""
    group, groups, start, height, width = 4, 3, 8, 24, 36
    pixels = np.random.default_rng(0).normal(size=(group * groups, 3, height, width))
    images, labels = torch.from_numpy(pixels), torch.arange(group * groups) % 10
    cuts = 0
    for step in (0, 1, 2, 3, 9, 77, 1000, 599_999):
        mix = mixer(AugmentConfig(mixup=mixup, cutmix=cutmix), SEED, step, start, group)
        assert mix is not None
        mixed, targets = mix(images, labels)
        for g in range(groups):
            here = slice(g * group, (g + 1) * group)
            own, other = pixels[here], pixels[here][::-1]
            number = start // group + g
            coin, _, y, x = slow_uniforms(SEED, step, number, MIX, 4)
            cut = cutmix > 0 and (mixup == 0 or coin < 0.5)
            share = slow_beta(cutmix if cut else mixup, step, number)
            if cut:
                cuts += 1
                tall, wide = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
                rows = [r for r in range(height)
                        if int(y * height) - tall // 2 <= r < int(y * height) + tall // 2]
                cols = [c for c in range(width)
                        if int(x * width) - wide // 2 <= c < int(x * width) + wide // 2]
                expected = own.copy()
                for r in rows:
                    expected[:, :, r, cols] = other[:, :, r, cols]
                share = 1 - len(rows) * len(cols) / (height * width)
            else:
                expected = share * own + (1 - share) * other
            assert np.abs(mixed[here].numpy() - expected).max() < 1e-6
            assert targets.weights[here].tolist() == pytest.approx([share] * group, abs=1e-6)
            assert targets.partners[here].tolist() == labels[here].tolist()[::-1]
    assert (cuts > 0) == (cutmix > 0)
    assert mixup == 0 or cuts < 24
