"""Tar archives as lists of (name, offset, size), read without extracting anything.

Only regular files matter here: members are never written to disk under their own names, so links,
devices and paths that climb out cannot do harm; they are refused all the same and counted. Python's
`tarfile` keeps every header in memory and believes any size; this walker keeps one header and
checks it against the archive.
Source: POSIX.1-1988 ustar, POSIX.1-2001 pax headers, GNU long names.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol, cast

from data_prep.sources.found import Located, SourceError
from data_prep.sources.remote import Remote, RemoteFile, open_file

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax header; real ones have a few hundred
COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".tbz2": "bz2", ".xz": "lzma",
              ".txz": "lzma", ".zst": "zstd"}


class Bytes(Protocol):
    """Bytes by position. Asking for more than there is gives less."""

    name: str
    length: int | None  # of all of it; None while unknown

    def read_at(self, offset: int, count: int) -> bytes: ...
    def close(self) -> None: ...


class PlainFile:
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._handle = os.open(path, os.O_RDONLY)
        self.length: int | None = os.fstat(self._handle).st_size

    def read_at(self, offset: int, count: int) -> bytes:
        parts: list[bytes] = []
        while count > 0:
            part = os.pread(self._handle, min(count, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        os.close(self._handle)


class Stream:
    """A file that is compressed, or of a server without ranges, read forwards; going back starts it
    again, so callers go forwards."""

    def __init__(self, path: Located) -> None:
        self.name = str(path)
        self.length: int | None = None
        self._path = path
        self._stream: IO[bytes] = _decompressor(path)
        self._at = 0

    def read_at(self, offset: int, count: int) -> bytes:
        if offset < self._at:
            self._stream.close()
            self._stream = _decompressor(self._path)
            self._at = 0
        try:
            while self._at < offset:
                skipped = len(self._stream.read(min(offset - self._at, 1 << 20)))
                if not skipped:
                    self.length = self._at
                    return b""
                self._at += skipped
            data = self._stream.read(count)
            if count and not data:
                self.length = self._at
        except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
            raise SourceError(f"{self.name}: damaged after {self._at} bytes ({error})") from None
        self._at += len(data)
        return data

    def close(self) -> None:
        self._stream.close()


def _decompressor(path: Located) -> IO[bytes]:
    file = open_file(path)
    kind = COMPRESSED.get(path.suffix.lower())
    if kind == "gzip":
        return cast(IO[bytes], gzip.open(file))
    if kind == "bz2":
        return bz2.open(file)
    if kind == "lzma":
        return lzma.open(file)
    if kind is None:
        return file
    import pyarrow

    return cast(IO[bytes], pyarrow.input_stream(file, compression="zstd"))


def open_bytes(path: Located) -> Bytes:
    if path.suffix.lower() in COMPRESSED:
        return Stream(path)
    if isinstance(path, Remote):
        return RemoteFile(path) if path.gives_ranges() else Stream(path)
    return PlainFile(Path(str(path)))


def is_tar_name(name: str) -> bool:
    name = name.lower()
    return name.endswith((".tar", ".tgz", ".tbz2", ".txz")) or any(
        name.endswith(".tar" + ending) for ending in (".gz", ".bz2", ".xz", ".zst"))


class Member(NamedTuple):
    name: str  # relative, without '.' or '..'; "" where the archive's name is refused
    kind: str  # "file", "directory", "link" (hard or symbolic), "other"
    offset: int  # of the data, in the bytes given
    size: int


def members(data: Bytes, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Walk an archive that begins at `start` (and ends before `end`, for an archive in another).

    Raises: SourceError where a header is damaged or a member reaches past the end.
    """
    at = start
    long_name: str | None = None
    long_size: int | None = None
    zero_blocks = 0
    last_end = None
    while True:
        header = data.read_at(at, BLOCK)
        if not header or (end is not None and at >= end):
            if at == start:
                raise SourceError(f"{data.name}: holds no tar archive (empty)")
            if last_end is not None and data.length is not None and last_end > data.length:
                raise SourceError(f"{data.name}: is cut off inside its last member")
            return
        if len(header) < BLOCK:
            raise SourceError(f"{data.name}: is cut off inside the header at byte {at}")
        if not any(header):
            zero_blocks += 1
            at += BLOCK
            if zero_blocks == 2:
                return
            continue
        zero_blocks = 0
        if not _checksum_holds(header):
            raise SourceError(f"{data.name}: no tar header at byte {at}; not a tar archive, "
                              "or a damaged one")
        size = _number(header[124:136], data.name, at)
        kind = header[156:157]
        body = at + BLOCK
        if kind in b"LKxg" and kind != b"\0":
            if size > MAX_HEADER_BYTES:
                raise SourceError(f"{data.name}: the extended header at byte {at} claims {size} "
                                  "bytes; refused")
            value = data.read_at(body, size)
            if len(value) < size:
                raise SourceError(f"{data.name}: is cut off inside the header at byte {at}")
            if kind == b"L":
                long_name = _text(value)
            elif kind == b"x":
                fields = _pax(value, data.name, at)
                long_name = fields.get("path", long_name)
                try:
                    long_size = int(fields["size"]) if "size" in fields else long_size
                except ValueError:
                    raise SourceError(f"{data.name}: damaged pax header at byte {at}") from None
            at = body + -(-size // BLOCK) * BLOCK
            continue
        if long_size is not None:
            size = long_size
        if size < 0 or (end is not None and body + size > end):
            raise SourceError(f"{data.name}: the member at byte {at} claims {size} bytes, more "
                              "than the archive has")
        if data.length is not None and body + size > data.length:
            raise SourceError(f"{data.name}: is cut off: the member at byte {at} claims {size} "
                              f"bytes, {max(data.length - body, 0)} are left")
        name = long_name
        if name is None:
            name = _text(header[:100])
            prefix = _text(header[345:500]) if header[257:262] == b"ustar" else ""
            if prefix and header[257:265] != b"ustar  \0":
                name = f"{prefix}/{name}"
        is_file = kind in (b"0", b"\0", b"7") and not name.endswith("/")
        is_directory = kind == b"5" or (kind in (b"0", b"\0") and name.endswith("/"))
        if not is_file:
            size = size if kind not in b"123456" else 0
        yield Member(safe_name(name), "file" if is_file else "directory" if is_directory else
                     "link" if kind in b"12" else "other", body, size)
        long_name, long_size = None, None
        last_end = body + size
        at = body + -(-size // BLOCK) * BLOCK


def safe_name(name: str) -> str:
    """The name as a relative path without '.' parts; "" where it is absolute or climbs."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return ""
    return str(path) if path.parts else "."


def _checksum_holds(header: bytes) -> bool:
    try:
        stored = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    return stored == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _number(field: bytes, name: str, at: int) -> int:
    """Octal text, or GNU's base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise SourceError(f"{name}: damaged size in the header at byte {at}") from None


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(value: bytes, name: str, at: int) -> dict[str, str]:
    fields: dict[str, str] = {}
    while value.strip(b"\0"):
        count_text, space, _ = value.partition(b" ")
        if not space or not count_text.isdigit() or not 0 < int(count_text[:9]) <= len(value):
            raise SourceError(f"{name}: damaged pax header at byte {at}")
        record, value = value[len(count_text) + 1:int(count_text[:9])], value[int(count_text[:9]):]
        key, _, text = record.rstrip(b"\n").partition(b"=")
        fields[_text(key)] = _text(text)
    return fields
