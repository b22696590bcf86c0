"""Zip archives, and sources behind URLs: read like what lies on disk, bombs and lies refused."""

from __future__ import annotations

import http.server
import importlib
import importlib.util
import io
import re
import struct
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_prep.conversion.account import account
from data_prep.convert import ConvertError, convert
from resnet_dist.config.schema import ConfigError
from tests.unit.data_prep.material import (
    file_bytes,
    hashes,
    make_tar,
    make_tree,
    named,
    options,
    picture,
)

# -- Zip -------------------------------------------------------------------------------------------

def make_zip(path: Path, tree: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, str(file.relative_to(tree)))
    return path


def shards(dst: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(dst).items() if name.endswith(".beton")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "source", per_class=6)


@pytest.fixture(scope="module")
def expected(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    convert(str(tree), tmp_path_factory.mktemp("plain") / "dst", options())
    return shards(next(tmp_path_factory.getbasetemp().glob("plain*")) / "dst")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_zip_gives_the_shards_of_its_tree(tmp_path, tree, expected, method, workers):
    archive = make_zip(tmp_path / "data.zip", tree, method)
    convert(str(archive), tmp_path / "dst",
            options(f"workers={workers}"))
    assert shards(tmp_path / "dst") == expected


def test_zips_of_one_class_each_are_classes_and_other_files_are_counted(tmp_path):
    (tmp_path / "src").mkdir()
    for c, name in enumerate(("ant", "bee")):
        with zipfile.ZipFile(tmp_path / "src" / f"{name}.zip", "w") as archive:
            for number in range(3):
                archive.writestr(f"{number}.jpg", file_bytes(picture(10 * c + number)))
            archive.writestr("notes.txt", "x")
            archive.writestr("../climbs.jpg", file_bytes(picture(9)))
    manifest = convert(str(tmp_path / "src"), tmp_path / "dst", options())
    assert manifest.classes == ("ant", "bee")
    assert manifest.splits["train"].samples == 6
    assert account(manifest)[-1].endswith(".txt (2), no suffix (2)")


def test_a_zip_written_to_a_pipe_has_its_checksums_behind_and_is_read(tmp_path, tree, expected):
    class Pipe(io.RawIOBase):
        written = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            self.written += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tree.rglob("*.jpg")):
            archive.write(file, str(file.relative_to(tree)))
    assert pipe.written[6] & 8
    (tmp_path / "data.zip").write_bytes(pipe.written)
    convert(str(tmp_path / "data.zip"), tmp_path / "dst", options())
    assert shards(tmp_path / "dst") == expected


def test_a_bomb_is_inflated_to_the_limit_and_no_further(tmp_path):
    import tracemalloc

    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"ant/{number}.jpg", file_bytes(picture(number)))
            archive.writestr(f"bee/{number}.jpg", file_bytes(picture(number)))
        archive.writestr("bee/bomb.bmp", bytes(400_000_000))
    tracemalloc.start()
    with pytest.raises(ConvertError, match="1 of 7 images could not be used"):
        convert(str(tmp_path / "s.zip"), tmp_path / "dst", options("max_image_bytes=1000000",
                                                                   "workers=1"))
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert "more than max_image_bytes = 1000000" in (tmp_path / "dst/rejected.jsonl").read_text()


def test_members_that_lie_over_each_other_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in ("ant/0.jpg", "ant/1.jpg", "bee/0.jpg"):
            archive.writestr(name, file_bytes(picture(len(name))))
    data = bytearray((tmp_path / "s.zip").read_bytes())
    second = [match.start() for match in re.finditer(b"PK\x01\x02", data)][1]
    data[second + 42:second + 46] = struct.pack("<I", 8)  # its header, inside the first member
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(ConfigError, match="lies over the member before it, as in a zip bomb"):
        convert(str(tmp_path / "s.zip"), tmp_path / "dst", options())


def encrypted(data: bytearray) -> None:
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(signature, bytes(data)):
            data[match.start() + at] |= 1


@pytest.mark.parametrize(("edit", "message"), [
    (encrypted, "is encrypted; unpack it first"),
    (lambda data: data.__delitem__(slice(len(data) // 2, None)), "no zip archive, or a damaged"),
    (lambda data: data.clear(), "no zip archive, or a damaged"),
])
def test_a_zip_that_cannot_be_read_is_refused_in_words(tmp_path, tree, edit, message):
    data = bytearray(make_zip(tmp_path / "s.zip", tree).read_bytes())
    edit(data)
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        convert(str(tmp_path / "s.zip"), tmp_path / "dst", options())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_flipped_bit_of_a_member_is_found(tmp_path, tree, method):
    whole = make_zip(tmp_path / "s.zip", tree, method).read_bytes()
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        info = next(info for info in archive.infolist() if not info.is_dir())
    start = info.header_offset + 30 + len(info.filename)
    rng = np.random.default_rng(0)
    for number, bit in enumerate(rng.integers(8 * start, 8 * (start + info.compress_size), 8)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "s.zip").write_bytes(data)
        with pytest.raises(ConvertError, match=r"1 of 36 images .*is damaged in its zip archive"):
            convert(str(tmp_path / "s.zip"), tmp_path / f"dst{number}", options("workers=1"))


# -- URLs ------------------------------------------------------------------------------------------

@pytest.fixture
def memory(tree: Path) -> Iterator[str]:
    """URL of fsspec's memory file system with the tree, an archive of each kind, and a table."""
    import pyarrow
    import pyarrow.parquet

    system = fsspec.filesystem("memory")
    system.put(str(tree), "/bucket/tree", recursive=True)
    make_tar(tree.parent / "data.tar", tree)
    make_tar(tree.parent / "data.tar.gz", tree, "w:gz")
    make_zip(tree.parent / "data.zip", tree)
    for path in tree.parent.glob("data.*"):
        system.put(str(path), f"/bucket/{path.name}")
    files = sorted((tree / "train").rglob("*.jpg"))
    table = pyarrow.table({"image": [file.read_bytes() for file in files],
                           "label": [file.parent.name for file in files]})
    with system.open("/bucket/table/data/train-00000-of-00001.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    yield "memory://bucket"
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("name", ["tree", "data.tar", "data.tar.gz", "data.zip"])
def test_a_url_gives_the_shards_of_what_lies_on_disk(tmp_path, memory, expected, name):
    convert(f"{memory}/{name}", tmp_path / "dst", options("workers=1"))
    assert shards(tmp_path / "dst") == expected
    # The same command again has nothing to do.
    assert convert(f"{memory}/{name}", tmp_path / "dst", options("workers=1")).name == "dst"


def test_tables_behind_a_url_are_found_and_read(tmp_path, memory, tree):
    convert(f"{memory}/table", tmp_path / "dst", options("workers=1"))
    convert(str(tree / "train"), tmp_path / "plain", options())
    assert named(tmp_path / "dst", "train") == named(tmp_path / "plain", "train")


def test_labels_behind_a_url_are_read(tmp_path, memory):
    import fsspec

    system = fsspec.filesystem("memory")
    for number in range(4):
        system.pipe(f"/listed/{number}.jpg", file_bytes(picture(number)))
    system.pipe("/listed.csv", b"path,label\n" + b"".join(
        b"%d.jpg,%s\n" % (number, (b"cat", b"dog")[number % 2]) for number in range(4)))
    done = convert("memory://listed", tmp_path / "dst",
                   options("labels=memory://listed.csv", "workers=1"))
    assert done.classes == ("cat", "dog")
    with pytest.raises(ConfigError, match=r"memory://nowhere\.csv: nothing is there"):
        convert("memory://listed", tmp_path / "dst2", options("labels=memory://nowhere.csv"))


def test_what_is_not_there_is_refused(tmp_path, memory):
    for name in ("nothing", "nothing.tar", "nothing.zip", "nothing.parquet"):
        with pytest.raises(ConfigError, match="noth"):
            convert(f"{memory}/{name}", tmp_path / "dst", options())


@pytest.mark.parametrize(("url", "library"), [
    ("s3://bucket/x.tar", "s3fs"), ("gs://bucket/x.zip", "gcsfs"),
    ("hf://datasets/someone/something", "huggingface_hub"),
    ("https://example.org/x.tar", "aiohttp")])
def test_a_driver_that_is_not_installed_is_named(tmp_path, monkeypatch, url, library):
    for module in (library, "fsspec.implementations.http", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    protocol = url.partition(":")[0]
    loaded = importlib.import_module("fsspec.registry")._registry  # the package hides its module
    monkeypatch.delitem(loaded, protocol, raising=False)
    with pytest.raises(ConfigError, match=rf"{protocol}:// needs a library that is not here; "
                                          rf"`pip install {library}`"):
        convert(url, tmp_path / "dst", options())


def test_a_protocol_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nonsense"):
        convert("nonsense://x/y.tar", tmp_path / "dst", options())


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's server, with ranges, which stores have and it has not."""

    ranges = True

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not (self.ranges and path.is_file()):
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first:last + 1])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not (self.ranges and path.is_file()):
            super().do_HEAD()
            return
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()


@contextmanager
def served(folder: Path, ranges: bool) -> Iterator[str]:
    handler = type("Handler", (Ranges,), {"ranges": ranges})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None,
                                reason="fsspec's HTTP driver needs aiohttp")


@needs_http
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["source", "data.tar", "data.tar.gz", "data.zip"])
def test_a_web_server_gives_the_shards_of_what_lies_on_disk(
        tmp_path, memory, tree, expected, name, ranges):
    with served(tree.parent, ranges) as url:
        if name == "data.zip" and not ranges:
            with pytest.raises(ConfigError, match="gives no ranges, which a zip needs"):
                convert(f"{url}/{name}", tmp_path / "dst", options())
            return
        convert(f"{url}/{name}", tmp_path / "dst", options("workers=2"))
    assert shards(tmp_path / "dst") == expected


@needs_http
def test_a_class_with_spaces_and_another_script_is_found_behind_a_web_server(tmp_path):
    for name in ("a b & c", "猫", "50%"):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "src" / name / f"x y#{number}.jpg").write_bytes(file_bytes(picture(number)))
    with served(tmp_path / "src", ranges=True) as url:
        manifest = convert(url, tmp_path / "dst", options("workers=1"))
    assert manifest.classes == ("50%", "a b & c", "猫")


@needs_http
def test_a_server_that_goes_away_ends_the_conversion_and_rejects_nothing(tmp_path, tree):
    with served(tree.parent, ranges=True) as url:
        from data_prep.convert import opened_for, prepare, run

        opened, _ = opened_for(f"{url}/source", tmp_path / "dst", options())
        plan = prepare(opened, f"{url}/source", tmp_path / "dst", options())
    with pytest.raises(ConvertError, match="cannot be read"):
        run(plan, 1, progress=False)
    assert not (tmp_path / "dst" / "rejected.jsonl").exists()
