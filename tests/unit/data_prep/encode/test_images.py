"""What becomes of every kind of image: kept, converted as documented, or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.encode import jpeg
from data_prep.encode.images import Encoding, encode
from data_prep.encode.jpeg import JpegError
from data_prep.sources.found import Unreadable
from resnet_dist.data.shards.beton import MODE_JPEG, MODE_RAW
from tests.unit.data_prep.material import file_bytes, picture


def encoding(**changes: object) -> Encoding:
    return Encoding(**{"image": "jpeg", "raw_fraction": 0.5, "longer_side": None,
                       "shorter_side": None, "quality": 90, "keep": True, "exif": "apply",
                       "max_pixels": 10_000_000} | changes)


RAW = encoding(image="raw")


def pixels_of(data: bytes, options: Encoding = RAW) -> np.ndarray:
    return encode(data, options, "name").pixels()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def restart_rows(data: bytes) -> int:
    """Restart markers in the image data of a baseline JPEG."""
    start = data.index(b"\xff\xda")
    return sum(data.count(bytes([0xFF, 0xD0 + n]), start) for n in range(8))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("extra", [{}, {"optimize": True}, {"progressive": True},
                                   {"restart_marker_blocks": 3}, {"restart_marker_rows": 2}])
@pytest.mark.parametrize("gray", [False, True])
def test_a_kept_jpeg_has_the_same_pixels_and_a_restart_a_row(subsampling, extra, gray):
    image = picture(3, 121, 77)
    image = image.convert("L") if gray else image
    data = file_bytes(image, quality=83, subsampling=subsampling, **extra)
    stored = encode(data, encoding(), "name")
    assert stored.mode == MODE_JPEG
    np.testing.assert_array_equal(opened(stored.data), opened(data))
    np.testing.assert_array_equal(stored.pixels(), opened(data))
    row = 16 if subsampling == 2 and not gray else 8
    assert restart_rows(stored.data) == -(-77 // row) - 1
    assert jpeg.inspect(stored.data).process == 0xC0
    assert jpeg.with_restarts(stored.data) == stored.data


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 100), st.integers(0, 2),
       st.booleans(), st.integers(0, 2**32 - 1))
def test_restarts_never_change_a_pixel(width, height, quality, subsampling, optimize, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = file_bytes(Image.fromarray(noise), quality=quality, subsampling=subsampling,
                      optimize=optimize)
    np.testing.assert_array_equal(opened(jpeg.with_restarts(data)), opened(data))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.01, 1), st.integers(0, 999))
def test_shrinking_equals_exact_averages_of_areas(width, height, factor, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    to_w, to_h = max(1, int(width * factor)), max(1, int(height * factor))

    def weights(size: int, to: int) -> np.ndarray:
        edges = np.arange(to + 1) * size / to
        cells = np.arange(size)
        return (np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
                ).clip(0) * to / size

    exact = np.einsum("yh,hwc,xw->yxc", weights(height, to_h), image.astype(float),
                      weights(width, to_w))
    assert np.abs(jpeg.shrink(image, to_w, to_h) - exact).max() <= 0.75


def test_the_longer_and_the_shorter_side_are_limited_without_enlarging():
    data = file_bytes(picture(1, 300, 200), quality=95)
    assert pixels_of(data, encoding(longer_side=150)).shape == (100, 150, 3)
    assert pixels_of(data, encoding(shorter_side=150)).shape == (150, 225, 3)
    assert encode(data, encoding(longer_side=300), "n").data == jpeg.with_restarts(data)
    exact = jpeg.shrink(opened(data), 150, 100).astype(int)
    assert np.abs(pixels_of(data, encoding(longer_side=150, image="raw")) - exact).max() <= 1
    small = pixels_of(data, encoding(longer_side=30, image="raw"))
    reference = np.asarray(Image.fromarray(opened(data)).resize((30, 20), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - reference).mean() < 3  # the DCT does a part of the way


def exact_areas(image: np.ndarray, to_w: int, to_h: int) -> np.ndarray:
    """float64 [to_h, to_w, c]: the mean over the area that each output covers."""
    def weights(size: int, to: int) -> np.ndarray:
        edges, cells = np.arange(to + 1) * size / to, np.arange(size)
        return (np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
                ).clip(0) * to / size

    return np.einsum("yh,hwc,xw->yxc", weights(image.shape[0], to_h), image.astype(float),
                     weights(image.shape[1], to_w), optimize=True)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("extra", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("size", [(121, 77), (100, 64), (61, 39), (7, 4), (1, 1)])
def test_a_shrunk_jpeg_is_as_good_as_one_by_way_of_rgb(subsampling, extra, size):
    data = file_bytes(picture(3, 121, 77), quality=90, subsampling=subsampling, **extra)
    stored = jpeg.reencode(data, *size, 90)
    assert stored is not None
    header = jpeg.inspect(stored)
    assert (header.width, header.height) == size
    assert header.sampling == ((2, 2), (1, 1), (1, 1))
    assert restart_rows(stored) == -(-size[1] // 16) - 1
    exact = exact_areas(opened(data), *size)
    detour = jpeg.encode(jpeg.decode(data, *size), 90)
    assert psnr(opened(stored), exact) > psnr(opened(detour), exact) - 0.5


def test_colours_that_are_not_ycbcr_are_shrunk_by_way_of_rgb():
    image = picture(3, 121, 77)
    for data in (file_bytes(image.convert("L")), file_bytes(image.convert("CMYK")),
                 file_bytes(image, keep_rgb=True)):
        assert jpeg.reencode(data, 60, 40, 90) is None
        assert encode(data, encoding(longer_side=60), "n").pixels().shape[1] == 60


@pytest.mark.parametrize("extra", [{}, {"progressive": True}])
def test_a_damaged_jpeg_is_refused_when_it_is_shrunk_too(extra):
    data = file_bytes(picture(3, 121, 77), quality=90, **extra)
    for cut in (len(data) // 2, len(data) - 40):
        with pytest.raises(JpegError):
            jpeg.reencode(data[:cut], 60, 40, 90)


@pytest.mark.parametrize("number", [4, 0x21, 0x81])
def test_a_quantization_table_that_is_not_there_is_refused(number):
    data = bytearray(file_bytes(picture(3), quality=90))
    frame = data.index(b"\xff\xc0")
    data[frame + 12] = number  # of the first component
    with pytest.raises(Unreadable, match="Quantization table"):
        encode(bytes(data), encoding(), "n")


def test_quality_and_keep_are_obeyed():
    data = file_bytes(picture(1, 200, 200), quality=95)
    low = encode(data, encoding(keep=False, quality=30), "n").data
    high = encode(data, encoding(keep=False, quality=95), "n").data
    assert len(low) < len(high) / 2
    assert restart_rows(low) == -(-200 // 16) - 1


def test_a_part_of_mixed_images_is_raw_by_name():
    data = file_bytes(picture(1))
    modes = [encode(data, encoding(image="mixed", raw_fraction=0.3), f"image-{n}").mode
             for n in range(400)]
    assert 80 < modes.count(MODE_RAW) < 160
    assert modes == [encode(data, encoding(image="mixed", raw_fraction=0.3), f"image-{n}").mode
                     for n in range(400)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_bytes(picture(2, 64, 48), quality=95, exif=exif, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(pixels_of(data), expected)
    stored = encode(data, encoding(), "n")
    assert b"Exif" not in stored.data  # or some other decoder would turn it again
    assert stored.pixels().shape == expected.shape
    np.testing.assert_array_equal(pixels_of(data, encoding(exif="ignore", image="raw")),
                                  opened(data))


def inverted_cmyk(image: Image.Image) -> bytes:
    return file_bytes(image.convert("CMYK"), quality=95)


def test_other_kinds_of_pixels_become_what_a_person_sees():
    rgb = picture(4)
    exact = np.asarray(rgb)
    np.testing.assert_array_equal(pixels_of(file_bytes(rgb, "PNG")), exact)
    np.testing.assert_array_equal(pixels_of(file_bytes(rgb, "BMP")), exact)
    np.testing.assert_array_equal(pixels_of(file_bytes(rgb, "WEBP", lossless=True)), exact)
    np.testing.assert_array_equal(pixels_of(file_bytes(rgb, "TIFF")), exact)
    gray = rgb.convert("L")
    np.testing.assert_array_equal(pixels_of(file_bytes(gray, "PNG"))[..., 1], np.asarray(gray))
    palette = rgb.convert("P")
    np.testing.assert_array_equal(pixels_of(file_bytes(palette, "PNG")),
                                  np.asarray(palette.convert("RGB")))
    cmyk = pixels_of(inverted_cmyk(rgb)).astype(int)
    assert np.abs(cmyk - exact).mean() < 6  # JPEG's loss; black or inverted would be 60 and more


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    data = file_bytes(Image.fromarray(values), "PNG")
    gray = pixels_of(data)[..., 0].astype(int)
    assert np.abs(gray - values / 257).max() <= 0.51


def test_transparency_is_laid_over_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0], rgba[:4, :, 3] = 200, 255  # red above, red but invisible below
    shown = pixels_of(file_bytes(Image.fromarray(rgba), "PNG"))
    assert (shown[:4] == (200, 0, 0)).all()
    assert (shown[4:] == 255).all()


def test_the_first_frame_of_an_animation_is_taken():
    frames = [picture(n).convert("P") for n in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels_of(buffer.getvalue()),
                                  np.asarray(frames[0].convert("RGB")))


def test_a_png_with_a_jpegs_name_is_taken_for_what_it_is():
    stored = encode(file_bytes(picture(6), "PNG"), encoding(), "n02105855_2933.JPEG")
    assert stored.mode == MODE_JPEG
    assert np.abs(stored.pixels().astype(int) - np.asarray(picture(6))).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
def test_images_of_one_pixel_survive(kind):
    for size in ((1, 1), (1, 37), (50, 1)):
        stored = encode(file_bytes(picture(1, *size), kind), encoding(), "n")
        assert stored.pixels().shape == (size[1], size[0], 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body))

    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(
        b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bomb_jpeg() -> bytes:
    data = bytearray(file_bytes(picture(1)))
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "is empty"),
    (b"hello", "not an image"),
    (b"\xff\xd8\xff", "is not a JPEG|ends before"),
    (png_header(1_000_000, 3_000), "1000000 x 3000 pixels, more than max_pixels"),
    (bomb_jpeg(), "65000 x 65000 pixels, more than max_pixels"),
    (png_header(70_000, 2), "a side may have 65500"),
    (png_header(300, 300), "is cut short"),
    (file_bytes(picture(1))[:-200], "is cut short"),
    (file_bytes(picture(1), progressive=True)[:-200], "is cut short"),
    (file_bytes(picture(1), "PNG")[:-200], "is cut short"),
    (file_bytes(Image.fromarray(np.full((4, 4), 1e9, np.float32)), "TIFF"), "floating-point"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
])
def test_what_cannot_be_used_is_refused_with_its_reason(data, reason):
    for options in (encoding(), RAW):
        with pytest.raises(Unreadable, match=reason):
            encode(data, options, "name")


def test_damage_that_libjpeg_would_paint_over_is_refused():
    data = bytearray(file_bytes(picture(5, 200, 160), quality=90))
    start = data.index(b"\xff\xda") + 14
    data[start + 900:start + 906] = b"\xff\xd9\xff\xd9\xff\xd9"  # the end, too early
    assert opened(bytes(data)).shape == (160, 200, 3)  # Pillow says nothing
    with pytest.raises(Unreadable, match="cannot be decoded"):
        encode(bytes(data), encoding(), "n")
    with pytest.raises(JpegError):
        jpeg.check(bytes(data))


def test_harmless_garbage_after_the_end_is_dropped():
    data = file_bytes(picture(5))
    stored = encode(data + b"trailing bytes", encoding(), "n")
    assert stored.data == encode(data, encoding(), "n").data


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "raw"])
def test_rows_measured_apart_add_up_to_the_whole_image(subsampling, mode):
    image = picture(3, 61, 175)
    data = file_bytes(image.convert("L") if mode == "L" else image, subsampling=subsampling)
    stored = encode(data, RAW if mode == "raw" else encoding(), "name")
    whole, pixels = np.zeros(6, np.int64), stored.pixels()
    jpeg.add_sums(pixels, whole)
    for every in (2, 3, 7, 100):
        apart = np.zeros(6, np.int64)
        counts = [stored.add_row_sums(every, first, apart) for first in range(every)]
        assert sum(counts) == 61 * 175
        assert (every < 100) == all(counts)
        # Chroma at half height is interpolated across rows, but not into those decoded apart.
        halved = mode == "RGB" and subsampling == 2
        np.testing.assert_allclose(apart, whole, rtol=1e-2 if halved else 0)


def test_rows_of_a_stream_without_restarts_are_refused():
    data = file_bytes(picture(3, 61, 175))
    with pytest.raises(JpegError, match="no restart marker"):
        jpeg.add_row_sums(data, 2, 1, np.zeros(6, np.int64))
    stored = jpeg.with_restarts(data)
    for cut in range(4, len(stored) - 2, 97):
        with pytest.raises(JpegError):
            jpeg.add_row_sums(stored[:cut], 2, 1, np.zeros(6, np.int64))
