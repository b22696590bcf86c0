"""Files as people have them: phones, X-rays, failed downloads, cut copies, satellites."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from data_prep.conversion.account import account
from data_prep.convert import ConvertError, convert
from data_prep.encode import formats, jpeg
from data_prep.encode.facts import total
from data_prep.encode.images import encode
from data_prep.sources.found import Unreadable
from resnet_dist.config.schema import ConfigError
from tests.conftest import ROOT
from tests.unit.data_prep.encode.test_images import RAW, encoding, opened
from tests.unit.data_prep.material import file_bytes, make_tree, options, picture, read_back

# -- JPEGs without an end --------------------------------------------------------------------------

KINDS = {"baseline": {}, "progressive": {"progressive": True}, "444": {"subsampling": 0},
         "restarts": {"restart_marker_blocks": 3}, "optimised": {"optimize": True}}


@pytest.mark.parametrize("kind", [*KINDS, "grey", "cmyk"])
@pytest.mark.parametrize("store", ["keep", "raw", "shrink"])
def test_a_jpeg_without_its_end_marker_is_kept_and_one_that_lacks_a_bit_more_is_not(kind, store):
    image = picture(3, 61, 47)
    image = image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    data = file_bytes(image, quality=90, **KINDS.get(kind, {}))
    how = {"keep": encoding(), "raw": RAW, "shrink": encoding(longer_side=30)}[store]
    whole = encode(data, how, "n")
    assert not whole.facts.unended
    for lost in (1, 2):
        kept = encode(data[:-lost], how, "n")
        assert kept.facts.unended
        assert kept.data == whole.data
    for lost in [*range(3, 120), *range(120, len(data) - 200, 37)]:
        with pytest.raises(Unreadable, match="is cut short"):
            encode(data[:-lost], how, "n")


def test_an_end_lost_in_zeros_is_a_cut():
    data = file_bytes(picture(3, 61, 47), quality=90)
    for lost in range(2, 300):
        with pytest.raises(Unreadable, match="is cut short"):
            encode(data[:-lost] + bytes(4096), encoding(), "n")


def test_a_progressive_file_without_its_last_scans_is_a_cut():
    data = file_bytes(picture(3, 121, 77), quality=90, progressive=True)
    scans = [at for at in range(len(data)) if data[at:at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for start in scans[1:]:
        table = data.rindex(b"\xff\xc4", 0, start)  # a scan's own table stands before it
        for end in (start, table):
            assert jpeg.with_end(data[:end]) is None  # whatever libjpeg makes of such a file
            with pytest.raises(Unreadable, match="cut short"):
                encode(data[:end], encoding(), "n")


def test_the_first_picture_of_an_mpo_and_what_a_phone_adds_after_it_change_nothing():
    image = picture(3, 61, 47)
    plain = file_bytes(image, quality=90)
    several = file_bytes(image, "MPO", save_all=True, append_images=[picture(4)], quality=90)
    stored = encode(several, encoding(), "n")
    assert stored.facts.several
    np.testing.assert_array_equal(stored.pixels(), opened(plain))
    for trailer in (b"SEFT" + b"x" * 999, b"\xff\xd9" * 3, bytes(50)):
        assert encode(plain + trailer, encoding(), "n") == encode(plain, encoding(), "n")


# -- Other formats ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_avif_and_jpeg_2000_are_read_under_any_name(kind):
    image = picture(7, 64, 48)
    decoded = opened(file_bytes(image, kind))
    assert np.abs(decoded.astype(int) - np.asarray(image)).mean() < 8
    np.testing.assert_array_equal(encode(file_bytes(image, kind), RAW, "photo.JPEG").pixels(),
                                  decoded)
    with pytest.raises(Unreadable, match=r"cannot be decoded|cut short|no image|not an image"):
        encode(file_bytes(image, kind)[:-300], RAW, "n")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.readable.cache_clear()
    yield
    formats.readable.cache_clear()


def test_heic_is_refused_with_its_remedy_before_anything_is_converted(tmp_path, no_heif):
    source = make_tree(tmp_path / "source")
    for number in range(3):
        (source / "train" / "ant" / f"IMG_{number}.HEIC").write_bytes(HEIC)
    with pytest.raises(ConfigError, match=r"3 of its images are HEIC.*`pip install pillow-heif`.*"
                                          r"max_rejected=3"):
        convert(str(source), tmp_path / "dst", options())
    assert not list((tmp_path / "dst").rglob("*.beton"))
    manifest = convert(str(source), tmp_path / "dst", options("max_rejected=3"))
    assert manifest.splits["train"].samples == 12
    assert "is HEIC, which needs a library: `pip install pillow-heif`" in account(manifest)[-1]
    (source / "train" / "ant" / "liar.JPG").write_bytes(HEIC)  # is seen only when it is read
    with pytest.raises(ConvertError, match="pip install pillow-heif"):
        convert(str(source), tmp_path / "dst2", options("max_rejected=3"))


def test_heic_is_read_where_its_library_is_installed():
    pillow_heif = pytest.importorskip("pillow_heif")
    formats.readable.cache_clear()
    image = picture(7, 64, 48)
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    pixels = encode(buffer.getvalue(), RAW, "n").pixels()
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 8
    with pytest.raises(Unreadable, match=r"damaged HEIC|cannot be decoded|cut short"):
        encode(HEIC, RAW, "n")


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "is empty"),
    (b"<!DOCTYPE html><title>404</title>", "is a web page, not an image: its download failed"),
    (b"\n <HTML><body>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", r"git-lfs pointer.*git lfs"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML, not an image"),
    (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg">', "is an SVG drawing"),
    (b"%PDF-1.7", "is a PDF"), (b"PK\x03\x04xxxx", "zip archive"), (bytes(999), "zeros alone"),
    (b"\x1f\x8b\x08\0", "gzip"), (b"\0\0\0\x18ftypisom", "a video"), (b"\xff\x0a\x01", "JPEG XL"),
    (b"not found\r\n", "is text"), (b"8BPS\0\1", "Photoshop"), (b"\x9a\x01\x7f", "known format"),
    (file_bytes(picture(1), "PNG")[:-500], "is cut short"),
    (file_bytes(picture(1))[:-500], "is cut short"),
])
def test_a_file_that_is_no_image_is_called_what_it_is(data, reason):
    with pytest.raises(Unreadable, match=reason):
        encode(data, encoding(), "photo.jpg")


# -- Sixteen bits and four bands -------------------------------------------------------------------

def deep(low: int, high: int) -> bytes:
    values = np.linspace(low, high, 48 * 40).round().astype(np.uint16).reshape(40, 48)
    return file_bytes(Image.fromarray(values), "PNG")


def test_white_scales_sixteen_bits_and_what_lies_above_is_counted():
    for high in (4095, 1023, 65535):
        values = np.asarray(Image.open(io.BytesIO(deep(0, high)))).astype(float)
        stored = encode(deep(0, high), encoding(image="raw", white=4095), "n")
        exact = np.minimum(values / 4095, 1) * 255
        assert np.abs(stored.pixels()[..., 0] - exact).max() <= 0.51
        assert stored.facts.clipped == (high > 4095)
        assert stored.facts.deep == (0, high)


def test_x_rays_in_a_corner_of_their_range_are_told_with_the_remedy(tmp_path):
    for name, low in (("healthy", 100), ("ill", 300)):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "src" / name / f"{number}.png").write_bytes(deep(low, 3800 + number))
    dark = convert(str(tmp_path / "src"), tmp_path / "dark", options())
    (line,) = account(dark)
    assert "8 images of 8 with 16 bits" in line
    assert "from 100 to 3,803 of 65,535" in line
    assert "white=4095" in line
    assert dark.source["facts"] == {"deep": 8, "dim": 8, "dim_high": 3803, "dim_low": 100}
    bright = convert(str(tmp_path / "src"), tmp_path / "bright", options("white=4095"))
    assert account(bright) == []
    levels = [len(np.unique(pixels)) for _, pixels in read_back(tmp_path / "bright", "train")]
    assert min(levels) > 150  # and not 15
    over = convert(str(tmp_path / "src"), tmp_path / "over", options("white=3800"))
    assert account(over)[0].startswith("WARNING: 6 images have values above white = 3,800")


def deep_colours(high: int) -> bytes:
    """A 16-bit RGB PNG, which Pillow reads and does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body))

    values = np.linspace(0, high, 8 * 8 * 3).astype(">u2").reshape(8, 24)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_colours_of_sixteen_bits_are_told():
    facts = encode(deep_colours(4095), RAW, "n").facts
    assert facts.deep is not None
    assert facts.deep[1] < 4200
    assert encode(deep_colours(65535), RAW, "n").facts.deep == (0, 65535)


def test_white_scales_colours_from_all_their_bits():
    """The upper eight bits of 0 to 4,095 are 16 levels: read alone they would be bands."""
    made = encode(deep_colours(4095), encoding(image="raw", white=4095), "n")
    values = np.linspace(0, 4095, 8 * 8 * 3).astype(np.uint16).reshape(8, 8, 3)
    expected = (values.astype(float) * 255 / 4095 + 0.5).astype(np.uint8)
    assert (np.frombuffer(made.data, np.uint8).reshape(8, 8, 3) == expected).all()
    assert made.facts.deep == (0, 4095)
    assert not made.facts.clipped
    assert encode(deep_colours(4095), encoding(image="raw", white=1023), "n").facts.clipped


def tiff_of(image: Image.Image, tags: dict[int, object]) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
    return file_bytes(image, "TIFF", tiffinfo=info)


def test_four_bands_are_taken_for_transparency_only_where_the_file_says_so():
    rgba = picture(5).convert("RGBA")
    assert encode(tiff_of(rgba, {}), RAW, "n").pixels().shape == (40, 48, 3)
    unsaid = file_bytes(rgba, "TIFF").replace(b"\x52\x01\x03\x00\x01\x00\x00\x00\x02\x00",
                                              b"\x52\x01\x03\x00\x01\x00\x00\x00\x00\x00")
    with pytest.raises(Unreadable, match="has 4 bands and says of none that it is transparency"):
        encode(unsaid, RAW, "n")
    assert encode(file_bytes(rgba, "JPEG2000"), RAW, "n").pixels().shape == (40, 48, 3)
    with pytest.raises(Unreadable, match="has 4 bands"):
        encode(file_bytes(rgba, "JPEG2000").replace(b"cdef", b"free"), RAW, "n")
    cmyk = picture(5).convert("CMYK")
    assert encode(tiff_of(cmyk, {}), RAW, "n").pixels().shape == (40, 48, 3)
    with pytest.raises(Unreadable, match="has inks that are not cyan"):
        encode(tiff_of(cmyk, {332: 2}), RAW, "n")


# -- What is told at the end -----------------------------------------------------------------------

def odd_tree(root: Path) -> Path:
    source = make_tree(root / "source", splits=("train",))
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(3):
        (source / "train" / "ant" / f"phone{number}.jpg").write_bytes(
            file_bytes(picture(40 + number), exif=turned))
    (source / "train" / "bee" / "turned.png").write_bytes(
        file_bytes(picture(44), "PNG", exif=turned))
    (source / "train" / "bee" / "cut.jpg").write_bytes(file_bytes(picture(50))[:-2])
    (source / "train" / "bee" / "garbage_exif.jpg").write_bytes(
        file_bytes(picture(45), exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(range(200))))
    odd = tiff_of(picture(46), {65000: "x" * 8})  # a tag that claims more than the file has
    tag = b"\xe8\xfd\x02\0\x09\0\0\0"
    assert tag in odd
    odd = odd.replace(tag, tag[:4] + b"\xff\xff\xff\x7f")
    with pytest.warns(UserWarning, match="larger than file"):
        Image.open(io.BytesIO(odd)).load()
    (source / "train" / "bee" / "odd.tif").write_bytes(odd)
    for name in ("a.txt", "b.txt", "README"):
        (source / "train" / "cat" / name).write_bytes(b"x")
    return source


def test_what_was_turned_mended_and_skipped_is_counted_and_said(tmp_path):
    source = odd_tree(tmp_path)
    for workers in (1, 2):
        dst = tmp_path / f"dst{workers}"
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", "convert", str(source), str(dst),
             f"workers={workers}", "shard_samples=5"],
            cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin", "COLUMNS": "300"})
        assert done.returncode == 0, done.stderr
        assert "4 images were turned as EXIF says" in done.stdout
        assert "1 image was kept though the end marker is missing" in done.stdout
        assert "skipped 3 files that are no images by their names: .txt (2), no suffix (1)" in (
            done.stdout)
        assert "arning" not in done.stdout + done.stderr
        source_of = json.loads((dst / "dataset.json").read_text())["source"]
        assert source_of["facts"] == {"turned": 4, "unended": 1}
        assert source_of["ignored_suffixes"] == {".txt": 2, "no suffix": 1}


def test_rejected_images_are_summed_up_by_reason(tmp_path):
    source = make_tree(tmp_path / "source")
    for number, data in enumerate((b"", b"", b"<html>", file_bytes(picture(9))[:-90])):
        (source / "train" / "ant" / f"bad{number}.jpg").write_bytes(data)
    said = r"is empty \(2\), is a web page, not an image: its download failed \(1\), is cut short"
    with pytest.raises(ConvertError, match=said):
        convert(str(source), tmp_path / "dst", options())
    manifest = convert(str(source), tmp_path / "dst", options("max_rejected=4"))
    assert "is empty (2)" in account(manifest)[-1]


def test_facts_add_up_in_any_order():
    parts = [{"turned": 2, "dim_low": 7, "dim_high": 9}, {}, {"dim_low": 3, "dim_high": 8,
                                                             "unended": 1}, {"turned": 1}]
    expected = {"turned": 3, "unended": 1, "dim_low": 3, "dim_high": 9}
    assert total(parts) == total(parts[::-1]) == expected
