"""What a file is that is no image, or that cannot be read as one, in words that say what to do."""

from __future__ import annotations

import re

from data_prep.encode import jpeg

HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEIF_REMEDY = "is HEIC, which needs a library: `pip install pillow-heif`, then convert again"
# (first bytes, what it is), the first that fits.
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec", "is a git-lfs pointer, not the image itself; run "
                                                 "`git lfs pull` where it was cloned"),
    (b"%PDF", "is a PDF, not an image"),
    (b"%!PS", "is a PostScript drawing, not an image of a known format"),
    (b"PK\x03\x04", "is a zip archive, not an image"),
    (b"\x1f\x8b", "is compressed with gzip, not an image"),
    (b"\xff\x0a", "is JPEG XL, which Pillow does not read; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "is JPEG XL, which Pillow does not read; convert it to PNG or JPEG"),
    (b"8BPS", "is a Photoshop file; convert it to PNG or JPEG"),
    (b"\x76\x2f\x31\x01", "is OpenEXR, floating-point pixels of an unknown range"),
    (b"\x93NUMPY", "is a NumPy array, not an image"),
    (b"\x89HDF", "is an HDF5 file, not an image"),
    (b"II*\0", "is a TIFF of a kind that Pillow does not read (several bands, or an unusual number "
               "of bits); save it as 8-bit RGB or grey"),
    (b"MM\0*", "is a TIFF of a kind that Pillow does not read (several bands, or an unusual number "
               "of bits); save it as 8-bit RGB or grey"),
)


def of_file(data: bytes) -> str:
    """Of a file in which no image was recognised."""
    if not data:
        return "is empty"
    for beginning, words in _BEGINNINGS:
        if data.startswith(beginning):
            return words
    if data[4:8] == b"ftyp":
        if data[8:12] in HEIF_BRANDS:
            return HEIF_REMEDY
        return "is a video or another file of the MP4 family, not an image"
    if data[128:132] == b"DICM":
        return "is DICOM; convert it to 16-bit PNG first"
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if re.match(rb"<!doctype html|<html|<head", head):
        return "is a web page, not an image: its download failed"
    if b"<svg" in head:
        return "is an SVG drawing; convert it to PNG first"
    if head.startswith((b"<?xml", b"<error")):
        return "is XML, not an image: its download may have failed"
    if not data.strip(b"\0"):
        return "holds zeros alone: its copy or download was cut short"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "is text, not an image"
    return "is not an image of a known format"


def of_error(error: str) -> str:
    """Of a file that begins as an image and then fails, from the decoder's message."""
    short = re.search(r"truncated|premature end|end of file|unexpected end", error, re.IGNORECASE)
    return f"is cut short ({error})" if short else f"cannot be decoded ({error})"


def of_jpeg(data: bytes, error: str) -> str:
    """Of a JPEG. One without an end marker was cut, whatever the decoder stumbled over."""
    return f"cannot be decoded ({error})" if jpeg.has_end(data) else f"is cut short ({error})"
