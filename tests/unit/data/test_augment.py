"""Augmentations against slow references that share no code with them, and their distributions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation.mix import draw, mixer
from resnet_dist.data.augmentation.plans import center_crop, size_at, train_plans
from resnet_dist.data.augmentation.policy import RAND_OPS, TRIVIAL_OPS
from resnet_dist.data.decode import decoder
from resnet_dist.data.decode.decoder import Op
from tests.unit.data.samples import picture
from tests.unit.data.test_order import slow_philox

CROP, FLIP, PCA, JITTER, ERASE, RAND, MIX, RAND_Z = range(1, 9)


def slow_uniforms(seed: int, epoch: int, sample: int, purpose: int, count: int) -> list[float]:
    words: list[int] = []
    for block in range(-(-count // 4)):
        words += slow_philox([sample, epoch, purpose, block], [seed & 0xFFFFFFFF, seed >> 32], 32)
    return [word / 2**32 for word in words[:count]]


def slow_plan(augment: AugmentConfig, seed: int, epoch: int, sample: int, height: int, width: int,
              size: int) -> tuple[float, float, float, float, bool]:
    """(top, left, height, width, flip) of one image, straight from the papers."""
    u = slow_uniforms(seed, epoch, sample, CROP, 40)
    flip = augment.flip and slow_uniforms(seed, epoch, sample, FLIP, 1)[0] < 0.5
    if augment.name == "scale_crop":
        side = augment.min_side + int(u[0] * (augment.max_side - augment.min_side + 1))
        scale = Fraction(side, min(height, width))  # ties are ties, and go to the even number
        tall, wide = round(height * scale), round(width * scale)
        top, left = int(u[1] * (tall - size + 1)), int(u[2] * (wide - size + 1))
        return (top * height / tall, left * width / wide, size * height / tall,
                size * width / wide, flip)
    if augment.name == "pad_crop":
        return (int(u[0] * (height + 2 * augment.pad - size + 1)) - augment.pad,
                int(u[1] * (width + 2 * augment.pad - size + 1)) - augment.pad, size, size, flip)
    if augment.name == "random_resized_crop":
        for i in range(10):
            area, aspect, y, x = u[4 * i:4 * i + 4]
            area = height * width * (augment.scale[0] + area * (augment.scale[1]
                                                                - augment.scale[0]))
            low, high = (math.log(r) for r in augment.ratio)
            aspect = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w, flip
        w, h = width, height
        if width / height < augment.ratio[0]:
            h = round(width / augment.ratio[0])
        elif width / height > augment.ratio[1]:
            w = round(height * augment.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w, flip
    tall, wide = size * height // min(height, width), size * width // min(height, width)
    return (round((tall - size) / 2) * height / tall, round((wide - size) / 2) * width / wide,
            size * height / tall, size * width / wide, flip)


def plans_for(augment: AugmentConfig, m: int, *, height: int = 375, width: int = 500, seed: int = 1,
              epoch: int = 0) -> np.ndarray:
    ids = np.arange(m)
    return train_plans(augment, seed, np.full(m, epoch), ids, np.full(m, height),
                       np.full(m, width), augment.size)


@pytest.mark.parametrize("name", ["scale_crop", "random_resized_crop", "pad_crop", "resize"])
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6),
       sample=st.integers(0, 2**31 - 1), height=st.integers(40, 700), width=st.integers(40, 700))
@settings(max_examples=60, deadline=None)
def test_plans_equal_the_slow_ones(name, seed, epoch, sample, height, width):
    size = 40
    augment = AugmentConfig(name=name, size=size, min_side=45, max_side=90, scale=(0.05, 1.0))
    (plan,) = train_plans(augment, seed, np.array([epoch]), np.array([sample]), np.array([height]),
                          np.array([width]), size)
    expected = slow_plan(augment, seed, epoch, sample, height, width, size)
    found = (plan["top"], plan["left"], plan["height"], plan["width"])
    assert found == pytest.approx(expected[:4], abs=1e-9)
    assert bool(plan["flip"]) == expected[4]
    if name != "pad_crop":
        assert plan["top"] >= 0
        assert plan["left"] >= 0
        assert plan["top"] + plan["height"] <= height + 1e-6
        assert plan["left"] + plan["width"] <= width + 1e-6


@pytest.mark.parametrize("options", [
    {"name": "scale_crop"}, {"name": "random_resized_crop"}, {"pca": 0.1},
    {"rand_ops": 2}, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}, {"erase": 0.5},
    {"trivial": True},
])
def test_a_plan_does_not_depend_on_its_batch(options):
    augment = AugmentConfig(**options)
    whole = plans_for(augment, 64)
    ids = np.array([63, 5, 17])
    part = train_plans(augment, 1, np.zeros(3, np.int64), ids, np.full(3, 375), np.full(3, 500),
                       augment.size)
    assert part.tobytes() == whole[ids].tobytes()
    assert plans_for(augment, 64, epoch=1).tobytes() != whole.tobytes()


def chi_square(values: np.ndarray, bins: int) -> float:
    """Of values that should be uniform in [0, 1]; bins + 6 sqrt(2 bins) is beyond the odds."""
    counts = np.histogram(values, bins=bins, range=(0, 1))[0]
    assert counts.sum() == len(values)
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_crops_and_flips_have_the_distribution_asked_for():
    m, bins = 40_000, 40
    limit = bins + 6 * math.sqrt(2 * bins)
    plans = plans_for(AugmentConfig(name="scale_crop"), m)
    side = 375 * 224 / plans["height"]  # the drawn shorter side
    assert chi_square((np.rint(side) - 256 + 0.5) / 225, 45) < 45 + 6 * math.sqrt(90)
    room = np.rint(side) - 224
    offset = np.rint(plans["top"] * np.rint(side) / 375)
    jitter = np.random.default_rng(0).random(m)
    assert chi_square((offset + jitter) / (room + 1), bins) < limit
    assert abs((plans["flip"] == 1).mean() - 0.5) < 4 * 0.5 / math.sqrt(m)
    plans = plans_for(AugmentConfig(name="random_resized_crop", scale=(0.08, 0.5)), m, height=2000,
                      width=2000)
    area = plans["height"] * plans["width"] / 2000**2
    assert chi_square(np.clip((area - 0.08) / 0.42, 0, 1), bins) < limit
    aspect = np.log(plans["width"] / plans["height"])
    assert chi_square(np.clip(aspect / (2 * math.log(4 / 3)) + 0.5, 0, 1), bins) < limit
    place = (plans["left"] + jitter) / (2000 - plans["width"] + 1)
    assert chi_square(place, bins) < limit


def test_pad_crops_reach_every_offset_equally():
    plans = plans_for(AugmentConfig(name="pad_crop", size=32), 40_000, height=32, width=32)
    counts = np.zeros((9, 9))
    np.add.at(counts, (plans["top"].astype(int) + 4, plans["left"].astype(int) + 4), 1)
    expected = 40_000 / 81
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 6 * math.sqrt(162)
    assert (plans["copy"] == 1).all()


def test_pca_colour_has_krizhevskys_covariance():
    shift = plans_for(AugmentConfig(pca=0.1), 50_000)["shift"] / 255
    values, vectors = np.linalg.eigh(np.cov(shift.T))
    assert np.sqrt(values[::-1]) == pytest.approx(0.1 * np.array([0.2175, 0.0188, 0.0045]),
                                                  rel=0.02)
    first = np.array([-0.5675, -0.5808, -0.5836])
    assert abs(vectors[:, 2] @ first) / np.linalg.norm(first) == pytest.approx(1, abs=1e-4)


def test_jitter_factors_are_uniform_and_their_order_too():
    plans = plans_for(AugmentConfig(brightness=0.4, contrast=0.2, saturation=0.3), 30_000)
    assert (plans["num_ops"] == 3).all()
    codes, factors = plans["ops"]["code"][:, :3], plans["ops"]["args"][:, :3, 0]
    for code, width in ((Op.BRIGHTNESS, 0.4), (Op.CONTRAST, 0.2), (Op.COLOR, 0.3)):
        assert chi_square((factors[codes == code] - 1) / (2 * width) + 0.5, 40) < 40 + 54
    orders, counts = np.unique(codes, axis=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 5000) ** 2 / 5000).sum() < 25


def test_randaugment_chooses_as_timm_does():
    plans = plans_for(AugmentConfig(rand_ops=2, rand_magnitude=7.0, rand_std=0.5), 40_000)
    used = np.arange(2) < plans["num_ops"][:, None]
    assert abs(used.mean() - 0.5) < 0.01
    codes, args = plans["ops"]["code"][:, :2][used], plans["ops"]["args"][:, :2, 0][used]
    counts = np.array([(codes == op).sum() for op in RAND_OPS])
    assert counts.sum() == len(codes)
    expected = len(codes) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 6 * math.sqrt(30)
    for op, middle in ((Op.ROTATE, 21.0), (Op.SHEAR_X, 0.21), (Op.TRANSLATE_Y, 0.315)):
        assert np.abs(args[codes == op]).mean() == pytest.approx(middle, rel=0.01)
        assert abs((args[codes == op] > 0).mean() - 0.5) < 0.03
    assert set(np.unique(args[codes == Op.POSTERIZE])) <= {0, 1, 2}  # 4 - floor(4 x level)
    brightness = args[codes == Op.BRIGHTNESS]
    assert set(np.round(brightness[np.abs(brightness - 1) < 0.25], 2)) == set()
    assert brightness.min() >= 0.1


def test_erased_boxes_have_zhongs_areas():
    plans = plans_for(AugmentConfig(erase=0.25), 40_000)
    erased = plans["num_ops"] == 1
    assert erased.mean() == pytest.approx(0.25, abs=0.01)
    top, left, tall, wide = plans["ops"]["args"][erased, 0].T
    area = tall * wide / 224**2
    assert area.min() > 0.018
    assert area.max() < 0.36
    assert ((top >= 0) & (left >= 0) & (top + tall <= 224) & (left + wide <= 224)).all()


def test_trivialaugment_chooses_as_torchvision_does():
    plans = plans_for(AugmentConfig(trivial=True), 60_000)
    codes, args = plans["ops"]["code"][:, 0], plans["ops"]["args"][:, 0]
    assert (plans["num_ops"] <= 1).all()
    counts = np.array([(plans["num_ops"] == 0).sum(), *((codes == op).sum() for op in TRIVIAL_OPS)])
    assert counts.sum() == 60_000
    assert ((counts - 60_000 / 14) ** 2 / (60_000 / 14)).sum() < 14 + 6 * math.sqrt(28)
    # TrivialAugmentWide._augmentation_space(31), and what _apply_op makes of its values.
    shears, turns = np.linspace(0, 0.99, 31), np.linspace(0, 135, 31)
    space = {
        Op.SHEAR_X: (shears, True), Op.SHEAR_Y: (shears, True), Op.ROTATE: (turns, True),
        Op.TRANSLATE_X: ([int(v) / 224 for v in np.linspace(0, 32, 31)], True),
        Op.TRANSLATE_Y: ([int(v) / 224 for v in np.linspace(0, 32, 31)], True),
        Op.POSTERIZE: (8 - np.round(np.arange(31) / (30 / 6)), False),
        Op.SOLARIZE: (np.linspace(255, 0, 31), False),
        Op.AUTO_CONTRAST: ([0], False), Op.EQUALIZE: ([0], False)}
    for op in (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS):
        space[op] = ([*(1 + shears), *(1 - shears)], False)
    for op, (values, signed) in space.items():
        allowed = {round(s * v, 4) + 0.0 for v in values for s in ((1, -1) if signed else (1,))}
        found = {round(float(v), 4) + 0.0 for v in args[codes == op, 0]}
        assert found == allowed, op
    assert (args[:, 1] == 0).all()  # bilinear
    assert (args[codes == Op.ROTATE, 2] == 1).all()  # black


def test_randaugment_interpolates_either_way_and_shows_the_mean_outside():
    plans = plans_for(AugmentConfig(rand_ops=2), 20_000)
    used = np.arange(2) < plans["num_ops"][:, None]
    args = plans["ops"]["args"][:, :2][used]
    assert set(np.unique(args[:, 1])) == {0, 1}
    assert args[:, 1].mean() == pytest.approx(0.5, abs=0.02)
    assert (args[:, 2] == 0).all()


def pillow(op: Op, a: float, image: Image.Image, resample: Image.Resampling,
           fill: tuple[int, int, int]) -> Image.Image:
    """What timm and torchvision call for the same operation."""
    affine = {Op.SHEAR_X: (1, a, 0, 0, 1, 0), Op.SHEAR_Y: (1, 0, 0, a, 1, 0),
              Op.TRANSLATE_X: (1, 0, a * image.width, 0, 1, 0),
              Op.TRANSLATE_Y: (1, 0, 0, 0, 1, a * image.height)}
    if op in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[op],
                               resample=resample, fillcolor=fill)
    return {
        Op.BRIGHTNESS: lambda: ImageEnhance.Brightness(image).enhance(a),
        Op.CONTRAST: lambda: ImageEnhance.Contrast(image).enhance(a),
        Op.COLOR: lambda: ImageEnhance.Color(image).enhance(a),
        Op.SHARPNESS: lambda: ImageEnhance.Sharpness(image).enhance(a),
        Op.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
        Op.EQUALIZE: lambda: ImageOps.equalize(image),
        Op.INVERT: lambda: ImageOps.invert(image),
        Op.POSTERIZE: lambda: ImageOps.posterize(image, int(a)),
        Op.SOLARIZE: lambda: ImageOps.solarize(image, a),
        Op.SOLARIZE_ADD: lambda: image.point([min(255, v + int(a)) if v < 128 else v
                                              for v in range(256)] * 3),
        Op.ROTATE: lambda: image.rotate(a, resample=resample, fillcolor=fill),
    }[op]()


@pytest.mark.parametrize(("op", "a"), [
    (Op.BRIGHTNESS, 0.3), (Op.BRIGHTNESS, 1.7), (Op.CONTRAST, 0.4), (Op.CONTRAST, 1.8),
    (Op.COLOR, 0.2), (Op.COLOR, 1.9), (Op.SHARPNESS, 0.1), (Op.SHARPNESS, 1.9),
    (Op.AUTO_CONTRAST, 0), (Op.EQUALIZE, 0), (Op.INVERT, 0), (Op.POSTERIZE, 2), (Op.SOLARIZE, 77),
    (Op.SOLARIZE_ADD, 90), (Op.SHEAR_X, 0.25), (Op.SHEAR_Y, -0.2), (Op.TRANSLATE_X, 0.3),
    (Op.TRANSLATE_Y, -0.31), (Op.ROTATE, 21.0), (Op.ROTATE, -13.5), (Op.ROTATE, 135.0),
    (Op.SHEAR_X, -0.99), (Op.TRANSLATE_X, 7 / 48), (Op.SOLARIZE, 76.5),
])
@pytest.mark.parametrize(("filtering", "outside"), [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_operations_equal_pillow(op, a, filtering, outside, seed):
    pixels = np.clip(picture(seed, 60, 48).astype(int) // 2 + 40, 0, 255).astype(np.uint8)
    plan = np.zeros(1, decoder.PLAN)
    plan["height"], plan["width"], plan["copy"], plan["num_ops"] = 48, 48, 1, 1
    plan["ops"]["code"][0, 0], plan["ops"]["args"][0, 0, :3] = op, (a, filtering, outside)
    pad = np.broadcast_to(np.array([9, 8, 7], np.uint8), (48, 48, 3))
    ours = decoder.decode_one(pixels.tobytes(), decoder.RAW, 60, 48, plan, (48, 48), pad)
    resample = Image.Resampling.BICUBIC if filtering else Image.Resampling.BILINEAR
    theirs = np.asarray(pillow(op, a, Image.fromarray(pixels[:48]), resample,
                               (0, 0, 0) if outside else (9, 8, 7)))
    difference = np.abs(ours.astype(int) - theirs)
    geometric = op in (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    # Pillow truncates what it interpolates; pixels on the border may fall on either side of it.
    assert (difference > 1).mean() <= (0.005 if geometric else 0)
    assert geometric or (difference == 0).mean() > 0.95


def test_operations_follow_the_crop_in_order():
    pixels = picture(2, 48, 48)
    plan = np.zeros(1, decoder.PLAN)
    plan["height"], plan["width"], plan["copy"], plan["num_ops"] = 48, 48, 1, 3
    for i, (op, a) in enumerate([(Op.INVERT, 0), (Op.SOLARIZE_ADD, 40), (Op.POSTERIZE, 3)]):
        plan["ops"]["code"][0, i], plan["ops"]["args"][0, i, 0] = op, a
    ours = decoder.decode_one(pixels.tobytes(), decoder.RAW, 48, 48, plan, (48, 48))
    inverted = 255 - pixels.astype(int)
    added = np.where(inverted < 128, np.minimum(inverted + 40, 255), inverted)
    assert np.array_equal(ours, added & 0xE0)


def test_erased_pixels_are_the_padding():
    pixels = picture(2, 48, 48)
    pad = picture(3, 48, 48)
    plan = np.zeros(1, decoder.PLAN)
    plan["height"], plan["width"], plan["copy"], plan["num_ops"] = 48, 48, 1, 1
    plan["ops"]["code"][0, 0], plan["ops"]["args"][0, 0] = Op.ERASE, (5, 7, 20, 30)
    ours = decoder.decode_one(pixels.tobytes(), decoder.RAW, 48, 48, plan, (48, 48), pad)
    expected = pixels.copy()
    expected[5:25, 7:37] = pad[5:25, 7:37]
    assert np.array_equal(ours, expected)


def test_sizes_change_with_the_epoch():
    augment = AugmentConfig(size=224, sizes=((0, 128), (5, 160), (30, 192)))
    assert [size_at(augment, epoch) for epoch in (0, 4, 5, 29, 30, 99)] == [128, 128, 160, 160,
                                                                            192, 192]
    assert size_at(AugmentConfig(size=224), 3) == 224


@given(height=st.integers(32, 900), width=st.integers(32, 900), size=st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_centre_crops_are_pillows(height, width, size):
    side = size + 7
    (plan,) = center_crop(np.array([height]), np.array([width]), side, size)
    tall, wide = ((int(side * height / width), side) if height > width
                  else (side, int(side * width / height)))
    assert plan["top"] * tall / height == pytest.approx(round((tall - size) / 2.0), abs=1e-6)
    assert plan["left"] * wide / width == pytest.approx(round((wide - size) / 2.0), abs=1e-6)
    assert plan["height"] == pytest.approx(size * height / tall)


@given(seed=st.integers(0, 2**32), step=st.integers(0, 600_000), world=st.sampled_from([1, 2, 4]),
       mixup=st.sampled_from([0.0, 0.2, 1.0]), cutmix=st.sampled_from([0.0, 1.0]))
@settings(max_examples=40, deadline=None)
def test_mixing_is_the_same_for_every_world(seed, step, world, mixup, cutmix):
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix)
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32)
    whole = mixer(augment, seed, step, 0, 8)
    if whole is None:
        assert mixup == cutmix == 0
        return
    expected, targets = whole(images, labels)
    local = 32 // world
    for rank in range(world):
        here = slice(rank * local, (rank + 1) * local)
        mix = mixer(augment, seed, step, rank * local, 8)
        assert mix is not None
        mixed, part = mix(images[here], labels[here])
        assert torch.equal(mixed, expected[here])
        assert torch.equal(part.partners, targets.partners[here])
        assert torch.equal(part.weights, targets.weights[here])


def test_mixtures_are_what_their_targets_say():
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16)
    mixed, targets = mixer(AugmentConfig(mixup=0.4), 3, 7, 0, 4)(images, labels)
    share = targets.weights[:, None, None, None]
    assert torch.allclose(mixed, images * share + images[targets.partners] * (1 - share))
    mixed, targets = mixer(AugmentConfig(cutmix=1.0), 3, 8, 0, 4)(images, labels)
    own = (mixed == images).all(1)
    assert torch.allclose(own.float().mean((1, 2)), targets.weights, atol=1e-6)
    assert torch.equal(torch.where(own[:, None], images, images[targets.partners]), mixed)
    assert (targets.partners // 4 == labels // 4).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    shares = np.array([one.share for step in range(250) for one in
                       draw(AugmentConfig(mixup=alpha), 0, step, 0, 16, 32, 32)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_groups_across_ranks_are_refused():
    mix = mixer(AugmentConfig(mixup=1.0), 0, 0, 4, 8)
    with pytest.raises(ValueError, match="bn_batch = 8"):
        mix(torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
