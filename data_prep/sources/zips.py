"""Zip archives as lists of (name, offset, size), read without extracting anything.

An offset is that of a member's own header and a size that of its stored bytes, so a worker needs no
directory. A bomb does no harm: a member is inflated up to the limit for an image and no further,
and an archive whose members lie over each other is refused.
Source: PKWARE, .ZIP File Format Specification 6.3.10, sec. 4.3.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator

from data_prep.sources import tars
from data_prep.sources.found import Located, SourceError, Unreadable, refuse_size
from data_prep.sources.tars import Bytes, Member, safe_name

LOCAL = struct.Struct("<4sHHHHHIIIHH")  # sec. 4.3.7, up to the name
STORED, DEFLATED = 0, 8
ENCRYPTED, CRC_BEHIND = 1, 8  # bits of the flags


def is_zip_name(name: str) -> bool:
    return name.lower().endswith(".zip")


def is_archive_name(name: str) -> bool:
    return is_zip_name(name) or tars.is_tar_name(name)


def walk(path: Located) -> Iterator[tuple[Bytes, Member]]:
    """The members of an archive, tar or zip, and its bytes to read them from; closed at the end.

    Raises: SourceError.
    """
    data = tars.open_bytes(path)
    try:
        for member in members(data) if is_zip_name(path.name) else tars.members(data):
            yield data, member
    finally:
        data.close()


def members(data: Bytes) -> Iterator[Member]:
    """In the order in which they lie. Raises: SourceError where the directory is damaged, a member
    is encrypted, or two lie over each other."""
    if data.length is None:
        raise SourceError(f"{data.name}: its server gives no ranges, which a zip needs; copy it to "
                          "this machine first")
    try:
        with zipfile.ZipFile(_File(data)) as archive:
            listed = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise SourceError(f"{data.name}: is no zip archive, or a damaged one ({error})") from None
    end = 0
    for info in listed:
        if info.flag_bits & ENCRYPTED:
            raise SourceError(f"{data.name}: {info.filename!r} is encrypted; unpack it first")
        if info.header_offset < end:
            raise SourceError(f"{data.name}: {info.filename!r} lies over the member before it, as "
                              "in a zip bomb; refused")
        end = info.header_offset + LOCAL.size + info.compress_size
        if end > data.length:
            raise SourceError(f"{data.name}: is cut off: {info.filename!r} claims "
                              f"{info.compress_size} bytes at byte {info.header_offset}")
        mode = info.external_attr >> 16
        kind = ("directory" if info.is_dir() else "link" if stat.S_ISLNK(mode) else
                "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "other")
        yield Member(safe_name(info.filename), kind, info.header_offset, info.compress_size)


def read(data: Bytes, offset: int, size: int, max_bytes: int) -> bytes:
    """One member whole. Raises: Unreadable, also where it inflates to more than `max_bytes`."""
    refuse_size(size, max_bytes)
    header = data.read_at(offset, LOCAL.size)
    if len(header) < LOCAL.size or header[:4] != b"PK\x03\x04":
        raise SourceError(f"{data.name}: no member at byte {offset}; it changed since it was "
                          "scanned, or is damaged")
    _, _, flags, method, _, _, crc, _, _, name, extra = LOCAL.unpack(header)
    at = offset + LOCAL.size + name + extra
    stored = data.read_at(at, size)
    if len(stored) < size:
        raise SourceError(f"{data.name}: is shorter than when it was scanned")
    if method == STORED:
        content = stored
    elif method == DEFLATED:
        content = _inflated(stored, max_bytes)
    else:
        raise Unreadable(f"is compressed by zip's method {method}, which is not read here; pack it "
                         "with deflate, or not at all")
    if flags & CRC_BEHIND:
        behind = data.read_at(at + size, 8)
        crc = int.from_bytes(behind[4:8] if behind[:4] == b"PK\x07\x08" else behind[:4], "little")
    if zlib.crc32(content) != crc:
        raise Unreadable("is damaged in its zip archive (its checksum does not hold)")
    return content


def _inflated(stored: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-15)
    try:
        content = inflater.decompress(stored, max_bytes + 1)
    except zlib.error as error:
        raise Unreadable(f"is damaged in its zip archive ({error})") from None
    refuse_size(len(content), max_bytes)
    return content


class _File(io.RawIOBase):
    """`Bytes` as the file that zipfile reads the directory from."""

    def __init__(self, data: Bytes) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        assert self._data.length is not None
        self._at = max(0, offset + (0, self._at, self._data.length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        assert self._data.length is not None
        data = self._data.read_at(self._at, max(0, self._data.length - self._at)
                                  if count < 0 else count)
        self._at += len(data)
        return data
