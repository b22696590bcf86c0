"""The native decoder against Pillow's pixels and a resize in float64."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_dist.data.decode import decoder
from resnet_dist.data.loader import DataError, EvalLoader
from tests.unit.data.samples import (
    decoded,
    jpeg,
    jpeg_sample,
    photographs,
    picture,
    write_dataset,
)


def axis_weights(start: float, extent: float, out: int, count: int) -> np.ndarray:
    """float64 [out, count]: area coverage when shrinking, linear between centres when enlarging."""
    weights = np.zeros((out, count))
    step = extent / out
    for i in range(out):
        low, high = start + i * step, start + (i + 1) * step
        if step >= 1:
            for pixel in range(int(np.floor(low)), int(np.ceil(high - 1e-9))):
                share = (min(high, pixel + 1) - max(low, pixel)) / step
                weights[i, min(max(pixel, 0), count - 1)] += share
        else:
            centre = (low + high) / 2 - 0.5
            left = int(np.floor(centre))
            for pixel, share in ((left, 1 - (centre - left)), (left + 1, centre - left)):
                weights[i, min(max(pixel, 0), count - 1)] += share
    return weights


def slow_resize(pixels: np.ndarray, box: tuple, out: int, flip: bool = False) -> np.ndarray:
    """float64 [out, out, 3] of `box` (top, left, height, width) of fully decoded `pixels`."""
    top, left, height, width = box
    rows = axis_weights(top, height, out, pixels.shape[0])
    cols = axis_weights(left, width, out, pixels.shape[1])
    result = np.einsum("ih,hwc,jw->ijc", rows, pixels.astype(np.float64), cols, optimize=True)
    return result[:, ::-1] if flip else result


def unclamped(stream: bytes) -> np.ndarray:
    """Pillow's Y, Cb, Cr as RGB: float64 [H, W, 3], beyond 0..255 where JPEG overshoots an edge.

    Planes that are resized one by one, as ours are, are clamped once, after the resize.
    """
    image = Image.open(io.BytesIO(stream))
    image.draft("YCbCr", image.size)
    y, cb, cr = np.moveaxis(np.asarray(image).astype(np.float64) - (0, 128, 128), 2, 0)
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)


def plan_of(box: tuple, *, flip: bool = False, copy: bool = False,
            shift: tuple = (0, 0, 0)) -> np.ndarray:
    plan = np.zeros(1, decoder.PLAN)
    plan["top"], plan["left"], plan["height"], plan["width"] = box
    plan["flip"], plan["copy"], plan["shift"] = flip, copy, shift
    return plan


@st.composite
def crops(draw: st.DrawFn) -> tuple:
    height, width = draw(st.integers(9, 150)), draw(st.integers(9, 150))
    box_h = draw(st.floats(2, height))
    box_w = draw(st.floats(2, width))
    top, left = draw(st.floats(0, 1)) * (height - box_h), draw(st.floats(0, 1)) * (width - box_w)
    return height, width, (top, left, box_h, box_w), draw(st.sampled_from([8, 17, 32, 45, 64]))


ENCODINGS = {
    "4:2:0, a marker per row": {"subsampling": 2},
    "4:2:0, no markers": {"subsampling": 2, "restart": False},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "markers anywhere": {"subsampling": 2, "restart": False, "restart_marker_blocks": 3},
    "optimal tables": {"subsampling": 2, "optimize": True, "quality": 97},
    "progressive": {"subsampling": 2, "progressive": True},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(crop=crops(), flip=st.booleans(), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_any_crop_equals_a_float64_resize_of_the_whole_picture(encoding, crop, flip, seed):
    height, width, box, size = crop
    stream = jpeg(picture(seed, height, width), **ENCODINGS[encoding])
    ours = decoder.decode_one(stream, decoder.JPEG, height, width, plan_of(box, flip=flip),
                             (size, size))
    whole = decoded(stream) if "progressive" in encoding else unclamped(stream)
    difference = np.abs(ours - np.clip(slow_resize(whole, box, size, flip), 0, 255))
    reduced = min(box[2], box[3]) >= 2 * size  # decoded at half size: another, shorter filter
    assert difference.mean() < (8 if reduced else 0.6)
    assert reduced or difference.max() < 4  # fixed point, and libjpeg's rounding of chroma


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_smaller_decode_keeps_the_colours_of_every_block(encoding, size):
    """Where output pixels are whole parts of blocks, the shorter filter costs nothing."""
    for seed in range(10):
        stream = jpeg(picture(seed, 64, 120), **ENCODINGS[encoding])
        box = (0, 32, 64, 64)
        ours = decoder.decode_one(stream, decoder.JPEG, 64, 120, plan_of(box), (size, size))
        whole = decoded(stream) if "progressive" in encoding else unclamped(stream)
        difference = np.abs(ours - np.clip(slow_resize(whole, box, size), 0, 255))
        assert difference.mean() < 1.5


@given(crop=crops(), flip=st.booleans(), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_raw_crops_equal_a_float64_resize(crop, flip, seed):
    height, width, box, size = crop
    pixels = picture(seed, height, width)
    ours = decoder.decode_one(pixels.tobytes(), decoder.RAW, height, width, plan_of(box, flip=flip),
                             (size, size))
    assert np.abs(ours - slow_resize(pixels, box, size, flip)).max() <= 0.6


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(crop=crops(), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_every_kernel_gives_the_same_bits(encoding, crop, seed):
    height, width, box, size = crop
    stream = jpeg(picture(seed, height, width), **ENCODINGS[encoding])
    args = (stream, decoder.JPEG, height, width, plan_of(box, shift=(3.3, -9.7, 0)), (size, size))
    fast = decoder.decode_one(*args)
    decoder.only_portable(True)
    try:
        slow = decoder.decode_one(*args)
    finally:
        decoder.only_portable(False)
    assert np.array_equal(fast, slow)


def test_tables_of_many_pictures_do_not_meet():
    """Pictures with tables of their own between pictures with the usual ones, on one thread."""
    streams = [jpeg(picture(i, 64, 80), optimize=i % 3 > 0, quality=30 + i) for i in range(60)]
    for i in [*range(60), *np.random.default_rng(0).integers(0, 60, 300)]:
        ours = decoder.decode_one(streams[i], decoder.JPEG, 64, 80, plan_of((1, 1, 60, 60)),
                                  (48, 48))
        expected = slow_resize(decoded(streams[i]), (1, 1, 60, 60), 48)
        assert np.abs(ours - expected).mean() < 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_copied_boxes_are_pillows_pixels(encoding, flip):
    stream = jpeg(picture(1, 70, 90), **ENCODINGS[encoding])
    ours = decoder.decode_one(stream, decoder.JPEG, 70, 90,
                             plan_of((11, 23, 40, 40), flip=flip, copy=True), (40, 40))
    assert np.array_equal(ours, decoded(stream)[11:51, 23:63][:, ::-1 if flip else 1])


def test_grey_pictures_become_three_equal_channels():
    stream = io.BytesIO()
    Image.fromarray(picture(3, 80, 60)[..., 0]).save(stream, "JPEG")
    ours = decoder.decode_one(stream.getvalue(), decoder.JPEG, 80, 60, plan_of((5, 5, 50, 50)),
                             (32, 32))
    assert (ours[..., 0] == ours[..., 1]).all()
    assert (ours[..., 0] == ours[..., 2]).all()
    assert np.abs(ours - slow_resize(decoded(stream.getvalue()), (5, 5, 50, 50), 32)).max() <= 1


def test_the_colour_shift_moves_every_pixel_by_its_level():
    pixels = np.full((40, 40, 3), 100, np.uint8)
    for copy, size in ((True, 40), (False, 32)):
        ours = decoder.decode_one(pixels.tobytes(), decoder.RAW, 40, 40,
                                 plan_of((0, 0, 40, 40), copy=copy, shift=(5, -7, 160)),
                                 (size, size))
        assert ours.reshape(-1, 3).tolist() == [[105, 93, 255]] * size**2


@pytest.mark.parametrize(("plan", "reason"), [
    (plan_of((0, 0, 70, 90.5)), "leaves the picture"), (plan_of((-1, 0, 9, 9)), "leaves"),
    (plan_of((0, 0, 0, 9)), "empty"), (plan_of((0, float("nan"), 9, 9)), "finite"),
    (plan_of((0, 0, 9, 9), shift=(0, 300, 0)), "colour shift"),
])
def test_impossible_plans_are_refused(plan, reason):
    with pytest.raises(ValueError, match=reason):
        decoder.decode_one(jpeg(picture(0, 70, 90)), decoder.JPEG, 70, 90, plan, (8, 8))


def test_metadata_that_contradict_the_jpeg_are_refused():
    with pytest.raises(ValueError, match=r"70 x 90 .* metadata say 90 x 70"):
        decoder.decode_one(jpeg(picture(0, 70, 90)), decoder.JPEG, 90, 70, plan_of((0, 0, 9, 9)),
                          (8, 8))


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("copy", [True, False])
def test_a_cut_jpeg_is_refused_wherever_the_crop_needs_what_is_missing(restart, copy):
    stream = jpeg(picture(0, 70, 90), restart=restart)
    for keep in range(0, len(stream) - 40, 37):
        with pytest.raises(ValueError, match="does not decode"):
            decoder.decode_one(stream[:keep], decoder.JPEG, 70, 90,
                              plan_of((0, 0, 70, 70), copy=copy), (70, 70) if copy else (32, 32))


def with_damaged_row(stream: bytes, row: int) -> bytes:
    """The JPEG with zeros for the coded MCU row `row`, which stands between two restart markers."""
    markers = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", stream)]
    first, last = markers[row - 1] + 2, markers[row]
    return stream[:first] + bytes(last - first) + stream[last:]


@pytest.mark.parametrize(("copy", "size", "skipped"), [
    (False, 48, (1, 2, 3, 4, 10, 11, 12, 13)), (False, 24, (1, 2, 3, 4, 10, 11, 12, 13)),
    (True, 64, (10, 11, 12, 13)),  # libjpeg reads what lies above, and stops below
])
def test_rows_outside_the_crop_are_not_decoded(copy, size, skipped):
    stream = jpeg(picture(0, 240, 64))  # 15 MCU rows of 16 pixels
    args = (decoder.JPEG, 240, 64, plan_of((88, 0, 64, 64), copy=copy), (size, size))
    whole = decoder.decode_one(stream, *args)
    for row in skipped:
        assert np.array_equal(decoder.decode_one(with_damaged_row(stream, row), *args), whole)
    for row in range(6, 9):  # rows that the box [88, 152) covers
        with pytest.raises(ValueError, match="does not decode"):
            decoder.decode_one(with_damaged_row(stream, row), *args)


def test_a_damaged_row_stops_the_run_where_a_crop_needs_it_naming_the_sample(tmp_path):
    """With hashes off, so that it is the decoder that notices."""
    good = [jpeg_sample(i, 0, 240, 64) for i in range(6)]

    def batch_with(row: int) -> np.ndarray:
        bad = (with_damaged_row(good[4][0], row), *good[4][1:])
        root = write_dataset(tmp_path / str(row), {"val": [good[:3], [good[3], bad, good[5]]]})
        with EvalLoader(root, "val", resize=48, size=48, batch_size=6, threads=2,
                        verify="open") as loader:
            return next(iter(loader)).images[4].numpy()

    plan = plan_of((88, 0, 64, 64))  # the square in the middle
    expected = decoder.decode_one(good[4][0], decoder.JPEG, 240, 64, plan, (48, 48))
    assert np.array_equal(batch_with(13), expected)
    with pytest.raises(DataError, match=r"shard-00001\.beton, sample 1 \(sample 4 of.*decode"):
        batch_with(7)


FUZZ = """
import sys, numpy as np
from resnet_dist.data.decode import decoder
from tests.unit.data.samples import jpeg, picture
rng = np.random.default_rng(int(sys.argv[1]))
streams = [jpeg(picture(s, 70, 90), subsampling=s % 3, restart=s % 2 == 0, progressive=s == 4)
           for s in range(6)]
refused = 0
for case in range(int(sys.argv[2])):
    stream = bytearray(streams[case % len(streams)])
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, len(stream)))
        action = rng.integers(0, 3)
        if action == 0: stream[at] = rng.integers(0, 256)
        elif action == 1: del stream[at:at + int(rng.integers(1, 40))]
        else: stream[at:at] = rng.integers(0, 256, rng.integers(1, 20), np.uint8).tobytes()
    plan = np.zeros(1, decoder.PLAN)
    plan["top"], plan["left"] = rng.integers(0, 20), rng.integers(0, 20)
    plan["height"], plan["width"] = rng.integers(5, 50), rng.integers(5, 50)
    try:
        decoder.decode_one(bytes(stream), 0, 70, 90, plan, (32, 32))
    except ValueError:
        refused += 1
print(refused)
"""


def test_damaged_jpegs_never_end_the_process():
    done = subprocess.run([sys.executable, "-c", FUZZ, "1", "3000"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 500 < int(done.stdout) < 3000


def test_photographs_are_as_sharp_as_a_float64_resize():
    rng = np.random.default_rng(0)
    errors = []
    for stream in photographs(25):
        pixels = decoded(stream)
        height, width = pixels.shape[:2]
        box_h, box_w = int(rng.integers(60, height)), int(rng.integers(60, width))
        box = (int(rng.integers(0, height - box_h)), int(rng.integers(0, width - box_w)), box_h,
               box_w)
        ours = decoder.decode_one(stream, decoder.JPEG, height, width, plan_of(box), (224, 224))
        errors.append(np.abs(ours - slow_resize(pixels, box, 224)).mean())
    assert np.mean(errors) < 0.45
