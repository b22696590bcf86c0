"""Sources behind a URL, through fsspec: s3://, gs://, hf://, https:// and what else it drives.

Archives and tables are read at offsets, or forwards where a server gives no ranges; trees of images
are listed and read one by one. Nothing is copied as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast
from urllib.parse import quote, unquote

import xxhash

from data_prep.sources.found import (
    LABEL_SUFFIXES,
    Found,
    Located,
    Source,
    SourceError,
    Unreadable,
    is_image_name,
    refuse_size,
    suffix_of,
)

DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
           "http": "aiohttp", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}
AHEAD_BYTES = 1 << 22  # that a request reads at least: headers lie between images
CHANGES = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "updated",
           "created", "md5")


class Missing(SourceError):
    """There is nothing behind the URL."""


class Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int  # of what is behind a URL: a number that changes with it


def is_url(source: str) -> bool:
    return "://" in source


class Remote:
    """A file or folder behind a URL, as far as a `Path` is asked for the same."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._plain = PurePosixPath(self.url.partition("://")[2].partition("?")[0])

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self._plain.name

    @property
    def suffix(self) -> str:
        return self._plain.suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rpartition("/")[0])

    def resolve(self) -> Remote:
        return self

    def stat(self) -> Stat:
        """Raises: SourceError."""
        info = self._asked("info")
        version = "".join(str(info.get(key)) for key in CHANGES)
        return Stat(int(info.get("size") or -1), xxhash.xxh3_64_intdigest(version.encode()) >> 1)

    def gives_ranges(self) -> bool:
        """Whether the middle can be read without what lies before it, as all stores let one and
        not all web servers, whatever their headers say. Raises: SourceError."""
        if not self._is_web:
            return True
        with self._asked("open", mode="rb", block_size=1, cache_type="none") as file:
            try:
                file.seek(1)
                return len(file.read(1)) == 1
            except (OSError, ValueError):
                return False

    def open(self) -> IO[bytes]:
        """Raises: SourceError."""
        if not self.gives_ranges():
            return cast(IO[bytes], self._asked("open", mode="rb", block_size=0))
        return cast(IO[bytes], self._asked("open", mode="rb", block_size=AHEAD_BYTES,
                                           cache_type="readahead"))

    def files(self) -> list[tuple[str, int]]:
        """(name below this folder, bytes or -1), sorted. Raises: SourceError."""
        root = self._system()[1].rstrip("/") + "/"
        found = self._asked("find", detail=True)
        return sorted((self._named(path.removeprefix(root)), -1 if info.get("size") is None
                       else int(info["size"])) for path, info in found.items()
                      if path.startswith(root) and "?" not in path[len(root):])

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file of this name below this folder, or so many bytes of it. Raises: SourceError."""
        below = Remote(f"{self.url}/{quote(name) if self._is_web else name}")
        return cast(bytes, below._asked("cat_file", end=limit))[:limit]

    @property
    def _is_web(self) -> bool:
        return self.url.startswith("http")

    def _named(self, path: str) -> str:
        return unquote(path) if self._is_web else path

    def _system(self) -> tuple[Any, str]:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return cast(tuple[Any, str], fsspec.core.url_to_fs(self.url))
        except ImportError as error:
            missing = DRIVERS.get(protocol)
            remedy = f"`pip install {missing}`" if missing else str(error)
            raise SourceError(f"SOURCE = {self.url}: {protocol}:// needs a library that is not "
                              f"here; {remedy}, or copy the source to this machine") from None
        except ValueError as error:
            raise SourceError(f"SOURCE = {self.url}: {error}") from None

    def _asked(self, what: str, **how: Any) -> Any:
        system, path = self._system()
        try:
            return getattr(system, what)(path, **how)
        except FileNotFoundError:
            raise Missing(f"{self.url}: nothing is there") from None
        except Exception as error:  # drivers raise whatever their libraries do
            words = " ".join(str(error).split())[:200] or type(error).__name__
            raise SourceError(f"{self.url}: cannot be read ({words})") from None


def located(text: str) -> Path | Remote:
    return Remote(text) if is_url(text) else Path(text)


def open_file(path: Located) -> IO[bytes]:
    """Raises: SourceError, OSError."""
    return path.open() if isinstance(path, Remote) else open(str(path), "rb")


class RemoteFile:
    """`tars.Bytes` over ranges of a file."""

    def __init__(self, remote: Remote) -> None:
        self.name = str(remote)
        self.length: int | None = remote.stat().st_size
        self._file = remote.open()

    def read_at(self, offset: int, count: int) -> bytes:
        try:
            self._file.seek(offset)
            return self._file.read(count)
        except Exception as error:  # drivers raise whatever their libraries do
            raise SourceError(f"{self.name}: cannot be read at byte {offset} ({error})") from None

    def close(self) -> None:
        self._file.close()


class RemoteTree(Source):
    """Folders behind a URL. A store of objects has no empty folders."""

    kind = "folders"

    def __init__(self, root: Remote, files: list[tuple[str, int]]) -> None:
        super().__init__([root], reader="urls")
        self.root, self._files = root, files

    def scan(self) -> Iterator[Found]:
        for name, size in self._files:
            if is_image_name(name):
                yield Found(name.rpartition("/")[0], name, 0, 0, size)
            else:
                self.ignored[suffix_of(name)] += 1
                if PurePosixPath(name).suffix.lower() in LABEL_SUFFIXES:
                    self.side[name] = partial(self._head, name)

    def _head(self, name: str, limit: int) -> bytes:
        return self.root.read(name, limit)

    def fingerprint(self) -> dict[str, Any]:
        return {"root": str(self.root)}


class UrlReader:
    def __init__(self, reader: dict[str, Any], max_bytes: int) -> None:
        self._roots = [Remote(url) for url in reader["containers"]]
        self._max_bytes = max_bytes

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        refuse_size(size, self._max_bytes)
        try:
            data = self._roots[container].read(name)
        except Missing:
            raise Unreadable("cannot be read: is not there any more") from None
        refuse_size(len(data), self._max_bytes)
        return data
