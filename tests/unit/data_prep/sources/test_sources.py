"""Every kind of source, built small and real, gives its images with its labels."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.convert import ConvertError, convert
from data_prep.sources import tars
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import (
    file_bytes,
    make_tree,
    named,
    old_pickle,
    options,
    picture,
    read_back,
    tar_bytes,
    tar_of,
)

WNIDS = ("n01440764", "n01443537", "n01484850")


def pixels_of(data: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()


def jpeg_of(seed: int) -> bytes:
    return file_bytes(picture(seed), quality=90)


def make_ilsvrc(root: Path) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """The three archives as published, in small. Returns (wnid, pixels) of train and val."""
    from scipy.io import savemat

    root.mkdir()
    train, outer = [], []
    for index, wnid in enumerate(reversed(WNIDS)):  # published in no particular order
        images = [(f"{wnid}_{n}.JPEG", jpeg_of(100 * index + n)) for n in range(5)]
        train += [(wnid, pixels_of(data)) for _, data in images]
        outer.append((f"{wnid}.tar", tar_bytes(images)))
    tar_of(root / "ILSVRC2012_img_train.tar", outer)
    val, members, truth = [], [], []
    for number in range(1, 8):
        data, ident = jpeg_of(1000 + number), 1 + number % 3
        members.append((f"ILSVRC2012_val_{number:08d}.JPEG", data))
        truth.append(ident)
        val.append((WNIDS[(ident + 1) % 3], pixels_of(data)))
    tar_of(root / "ILSVRC2012_img_val.tar", members)
    # IDs of the kit are not in the order of wnids.
    synsets = np.array([(ident, WNIDS[(ident + 1) % 3], "words", 0) for ident in (1, 2, 3)],
                       [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"),
                        ("num_children", "i4")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = "ILSVRC2012_devkit_t12/data/"
    tar_of(root / "ILSVRC2012_devkit_t12.tar.gz",
           [(kit + "meta.mat", meta.getvalue()),
            (kit + "ILSVRC2012_validation_ground_truth.txt",
             "".join(f"{ident}\n" for ident in truth).encode())], "w:gz")
    return train, val


def test_ilsvrc_archives_are_read_as_published(tmp_path):
    train, val = make_ilsvrc(tmp_path / "source")
    manifest = convert(str(tmp_path / "source"), tmp_path / "dst", options("workers=1"))
    assert manifest.classes == WNIDS
    assert named(tmp_path / "dst", "train") == sorted(train)
    assert named(tmp_path / "dst", "val") == sorted(val)


def test_ilsvrc_training_archive_alone_is_enough_to_train(tmp_path):
    train, _ = make_ilsvrc(tmp_path / "source")
    convert(str(tmp_path / "source" / "ILSVRC2012_img_train.tar"), tmp_path / "dst", options())
    assert named(tmp_path / "dst", "train") == sorted(train)


def test_ilsvrc_validation_without_the_kit_names_the_missing_file(tmp_path):
    make_ilsvrc(tmp_path / "source")
    (tmp_path / "source" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(ConfigError, match=r"put ILSVRC2012_devkit_t12.tar.gz beside it"):
        convert(str(tmp_path / "source" / "ILSVRC2012_img_val.tar"), tmp_path / "dst", options())


def test_extracted_class_tars_are_classes_by_name(tmp_path):
    (tmp_path / "source").mkdir()
    expected = []
    for wnid in WNIDS:
        images = [(f"{wnid}_{n}.JPEG", jpeg_of(hash(wnid) % 1000 + n)) for n in range(3)]
        tar_of(tmp_path / "source" / f"{wnid}.tar", images)
        expected += [(wnid, pixels_of(data)) for _, data in images]
    convert(str(tmp_path / "source"), tmp_path / "dst", options())
    assert named(tmp_path / "dst", "train") == sorted(expected)


@pytest.mark.parametrize("layout", ["huggingface", "plain", "text"])
def test_parquet_files_give_images_and_class_names(tmp_path, layout):
    source = tmp_path / "data"
    source.mkdir()
    names = ["tench, Tinca tinca", "goldfish", "abacus"]
    expected: dict[str, list] = {"train": [], "validation": []}
    seed = 0
    for split, files in (("train", 2), ("validation", 1)):
        for number in range(files):
            images, labels = [], []
            for row in range(9):
                seed += 1
                images.append(jpeg_of(seed))
                labels.append(row % 3)
                expected[split].append((names[row % 3] if layout != "plain" else str(row % 3),
                                        pixels_of(images[-1])))
            if layout == "huggingface":
                structs = [{"bytes": data, "path": None} for data in images]
                table = pa.table({"image": structs, "label": labels})
                features = {"label": {"names": names, "_type": "ClassLabel"}}
                table = table.replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": features}})})
            elif layout == "plain":
                table = pa.table({"jpg": pa.array(images, pa.binary()), "cls": labels})
            else:
                table = pa.table({"image": pa.array(images, pa.binary()),
                                  "label": [names[label] for label in labels]})
            pq.write_table(table, source / f"{split}-{number:05d}-of-{files:05d}.parquet",
                           row_group_size=4)
    manifest = convert(str(source), tmp_path / "dst", options("shard_samples=5"))
    if layout == "huggingface":
        assert manifest.classes == tuple(names)  # the order of the file, not the alphabet's
    assert named(tmp_path / "dst", "train") == sorted(expected["train"])
    assert named(tmp_path / "dst", "val") == sorted(expected["validation"])


def test_unlabelled_parquet_rows_are_refused_or_left_out(tmp_path):
    table = pa.table({"image": pa.array([jpeg_of(1), jpeg_of(2)], pa.binary()), "label": [0, -1]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="outside=ignore"):
        convert(str(tmp_path / "train.parquet"), tmp_path / "dst", options())
    manifest = convert(str(tmp_path / "train.parquet"), tmp_path / "dst",
                       options("outside=ignore", "accept=[one_class]"))
    assert manifest.splits["train"].samples == 1


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_webdataset_shards_pair_images_with_labels(tmp_path, ending):
    expected: dict[str, list] = {"train": [], "val": []}
    seed = 0
    for split in ("train", "val"):
        for shard in range(2):
            members = []
            for _ in range(6):
                seed += 1
                label, data = (seed * 7) % 11, jpeg_of(seed)
                text = str(label) if ending == "cls" else json.dumps({"label": label})
                members += [(f"s{seed:04d}.jpg", data), (f"s{seed:04d}.{ending}", text.encode())]
                expected[split].append((str(label), pixels_of(data)))
            tar_of(tmp_path / f"imagenet-{split}-{shard:06d}.tar", members)
    manifest = convert(str(tmp_path / "imagenet-*.tar"), tmp_path / "dst", options())
    assert manifest.classes == tuple(map(str, range(11)))  # 10 after 9, not after 1
    for split in ("train", "val"):
        assert named(tmp_path / "dst", split) == sorted(expected[split])


def make_cifar(root: Path, hundred: bool, binary: bool, rng) -> tuple[Path, dict[str, list]]:
    """An archive as published, in small, and its (label, RGB bytes) by split."""
    count = 100 if hundred else 10
    names = [f"thing_{chr(97 + n // 10)}{n % 10}" for n in range(count)]
    folder = f"cifar-{count}-" + ("binary" if hundred else "batches-bin") * binary + (
        "python" if hundred else "batches-py") * (not binary)
    files = {"train": ["train"], "val": ["test"]} if hundred else {
        "train": [f"data_batch_{n}" for n in range(1, 6)], "val": ["test_batch"]}
    members, expected = [], {"train": [], "val": []}
    for split, batches in files.items():
        for batch in batches:
            planes = rng.integers(0, 256, (7, 3072), np.uint8)
            labels = [int(label) for label in rng.integers(0, count, 7)]
            for row, label in zip(planes, labels, strict=True):
                image = row.reshape(3, 32, 32).transpose(1, 2, 0)
                expected[split].append((names[label], image.tobytes()))
            if binary:
                head = np.array(labels, np.uint8)[:, None]
                if hundred:
                    head = np.concatenate([head // 5, head], axis=1)
                data = np.concatenate([head, planes], axis=1).tobytes()
                members.append((f"{folder}/{batch}.bin", data))
            else:
                key = b"fine_labels" if hundred else b"labels"
                members.append((f"{folder}/{batch}", old_pickle(
                    {b"data": planes, key: labels, b"batch_label": b"of many"})))
    if binary:
        label_file = "fine_label_names.txt" if hundred else "batches.meta.txt"
        members.append((f"{folder}/{label_file}", "\n".join([*names, ""]).encode()))
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        members.append((f"{folder}/" + ("meta" if hundred else "batches.meta"),
                        old_pickle({key: [name.encode() for name in names]})))
    return tar_of(root / f"{folder}.tar.gz", members, "w:gz"), expected


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_archives_give_exact_pixels_and_labels(tmp_path, hundred, binary):
    archive, expected = make_cifar(tmp_path, hundred, binary, np.random.default_rng(0))
    few = ["accept=[few_images, unequal_classes]"] if hundred else []
    manifest = convert(str(archive), tmp_path / "a", options("workers=1", *few))
    assert manifest.num_classes == (100 if hundred else 10)
    assert manifest.image_size == (32, 32)
    assert manifest.encoding["encoding"] == "raw"
    for split in ("train", "val"):
        assert named(tmp_path / "a", split) == sorted(expected[split])
    (tmp_path / "extracted").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "extracted"], check=True)
    (folder,) = (tmp_path / "extracted").iterdir()
    convert(str(folder), tmp_path / "b", options(*few))
    assert named(tmp_path / "b", "train") == sorted(expected["train"])


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    members = [("cifar-10-batches-py/data_batch_1", pickle.dumps(_Evil(tmp_path / "owned"))),
               ("cifar-10-batches-py/batches.meta", old_pickle({b"label_names": [b"a"]}))]
    archive = tar_of(tmp_path / "cifar.tar", members)
    with pytest.raises(ConfigError, match=r"cannot be read safely \(it wants to call posix.mkdir"):
        convert(str(archive), tmp_path / "dst", options())
    assert not (tmp_path / "owned").exists()


def test_links_and_climbing_names_in_a_tar_are_told_and_never_followed(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg_of(99))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("train/ant/0.jpg", "../train/ant/1.jpg", "/train/ant/2.jpg",
                     "train/../../ant/3.jpg"):
            data = jpeg_of(5)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                                       tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"train/ant/{4 + number}.jpg")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    with pytest.raises(ConfigError, match=r"2 of its images are links, .*'train/ant/4.jpg'"):
        convert(str(tmp_path / "s.tar"), tmp_path / "dst", options("accept=[one_class]"))
    manifest = convert(str(tmp_path / "s.tar"), tmp_path / "dst",
                       options("outside=ignore", "accept=[one_class]"))
    assert manifest.splits["train"].samples == 1
    assert manifest.source["ignored_files"] == 7


def bad_tar(tmp_path: Path, edit) -> Path:
    data = bytearray(tar_bytes([("train/ant/0.jpg", jpeg_of(1)), ("train/bee/1.jpg", jpeg_of(2))]))
    edited = edit(data)
    path = tmp_path / "bad.tar"
    path.write_bytes(data if edited is None else edited)
    return path


def set_size(header: bytearray, value: bytes) -> None:
    header[124:136] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])


@pytest.mark.parametrize(("edit", "message"), [
    (lambda d: set_size(d, b"77777777777\0"), "cut off: the member .* claims 8589934591 bytes"),
    (lambda d: set_size(d, b"\x80" + b"\xff" * 11), "cut off: the member"),
    (lambda d: d[:700], "cut off"),
    (lambda d: d[:len(d) // 2 - 300], "cut off"),
    (lambda d: bytes(300), "cut off inside the header"),
    (lambda d: b"", "holds no tar"),
    (lambda d: d.__setitem__(3, d[3] ^ 1), "no tar header at byte 0"),
    (lambda d: os.urandom(4096), "no tar header at byte 0"),
])
def test_a_damaged_or_lying_tar_is_refused_in_words(tmp_path, edit, message):
    with pytest.raises(ConfigError, match=message):
        convert(str(bad_tar(tmp_path, edit)), tmp_path / "dst", options())


def test_a_giant_extended_header_is_refused_unread(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("train/ant/" + "x" * 300 + ".jpg")
        tar.addfile(info)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    set_size(data, b"77777777777\0")
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=r"extended header .* claims 8589934591 bytes; refused"):
        convert(str(tmp_path / "s.tar"), tmp_path / "dst", options())


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_walker_agrees_with_tarfile(tmp_path, form):
    names = ["a/b.jpg", "ü/日本.jpg" if form != tarfile.USTAR_FORMAT else "u/j.jpg",
             "d" * 90 + "/" + "e" * 90 + ".jpg", "empty.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names.append("x" * 280 + "/y.jpg")
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for index, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if "empty" in name else 700 * index + 3
            info.uid = 3_000_000 if form != tarfile.USTAR_FORMAT else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    walked = [(m.name, m.offset, m.size) for m in tars.members(tars.PlainFile(tmp_path / "s.tar"))]
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert walked == [(m.name, m.offset_data, m.size) for m in tar]


def test_a_truncated_compressed_tar_is_refused(tmp_path):
    path = tar_of(tmp_path / "s.tar.gz", [("train/ant/0.jpg", os.urandom(50_000))], "w:gz")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises((ConfigError, ConvertError), match=r"s.tar.gz: (damaged|is cut off)"):
        convert(str(path), tmp_path / "dst", options())


def test_classes_without_images_are_refused_or_keep_their_labels(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train",))
    (source / "train" / "aardvark").mkdir()
    with pytest.raises(ConfigError, match=r"'aardvark' hold no images.*accept=\[empty_classes\]"):
        convert(str(source), tmp_path / "dst", options())
    manifest = convert(str(source), tmp_path / "dst", options("accept=[empty_classes]"))
    assert manifest.classes == ("aardvark", "ant", "bee", "cat")
    assert {label for label, _ in read_back(tmp_path / "dst", "train")} == {1, 2, 3}


def test_hidden_and_foreign_files_in_folders_are_counted_not_converted(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train",))
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._0.jpg"):
        (source / "train" / "ant" / name).write_bytes(b"x")
    os.mkfifo(source / "train" / "ant" / "pipe.jpg")  # opening it would wait for ever
    convert(str(source), tmp_path / "dst", options())
    manifest = load_manifest(tmp_path / "dst")
    assert manifest.splits["train"].samples == 12
    assert manifest.source["ignored_files"] == 5
    assert manifest.source["ignored_suffixes"]["no regular file"] == 1


@pytest.mark.parametrize(("folders", "expected"), [
    (("train", "val"), {"train", "val"}), (("train", "test"), {"train", "val"}),
    (("train", "valid", "test"), {"train", "val", "test"}),
    (("Training", "Validation"), {"train", "val"}), (("wrap/train", "wrap/test"), {"train", "val"}),
])
def test_splits_are_found_by_the_names_of_folders(tmp_path, folders, expected):
    source = make_tree(tmp_path / "source", per_class=1, splits=folders)
    assert set(convert(str(source), tmp_path / "dst", options()).splits) == expected


def test_class_folders_alone_are_one_split_by_option(tmp_path):
    source = make_tree(tmp_path / "source", per_class=2, splits=("train",)) / "train"
    source.rename(tmp_path / "plain")
    assert set(convert(str(tmp_path / "plain"), tmp_path / "a", options()).splits) == {"train"}
    assert set(convert(str(tmp_path / "plain"), tmp_path / "b",
                       options("split=val")).splits) == {"val"}


def test_images_outside_class_folders_are_refused_by_number(tmp_path):
    source = make_tree(tmp_path / "source")
    (source / "val" / "stray.jpg").write_bytes(jpeg_of(1))
    with pytest.raises(ConfigError, match=r"1 images lie outside class folders.*'val'"):
        convert(str(source), tmp_path / "dst", options())
    assert convert(str(source), tmp_path / "dst", options("outside=ignore")).splits[
        "val"].samples == 12
