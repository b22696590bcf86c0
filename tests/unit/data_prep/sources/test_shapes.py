"""The shapes in which people have their images: each read right, or refused with the remedy.

`UPDATE_DOCS=1 pytest tests/unit/data_prep/sources/test_shapes.py` writes the table in docs/data.md
anew, to be read before it is committed.
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from data_prep.convert import convert, planned
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from tests.conftest import ROOT, Cli
from tests.unit.data_prep.material import options, read_back, tar_bytes, tar_of

# The width of an image tells what it shows, so that a wrong label shows.
WIDTHS = {"n01440764": 10, "n01443537": 11, "n01484850": 12, "cat": 20, "dog": 21, "bird": 22,
          "terrier": 30, "beagle": 31, "siamese": 32} | {str(k): 40 + k for k in range(12)}
WNIDS = ("n01440764", "n01443537", "n01484850")
Counts = dict[str, dict[str, int]]  # split -> class -> images


def image(name: str, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTHS[name], 9), (90, 120, 40)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(name))


def text(path: Path, content: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def tree(root: Path, names: tuple[str, ...] = WNIDS, count: int = 3, inside: str = "") -> None:
    for name in names:
        for number in range(count):
            put(root / name / inside / f"{name}_{number}.JPEG", name)


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w:gz") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def kaggle(root: Path) -> None:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    tree(data / "train")
    rows = ["ImageId,PredictionString"]
    for number in range(1, 7):
        name = WNIDS[number % 3]
        put(data / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", name)
        put(data / "test" / f"ILSVRC2012_test_{number:08d}.JPEG", name)
        rows.append(f"ILSVRC2012_val_{number:08d},{name} 1 1 30 30 {name} 2 2 9 9")
    text(root / "LOC_val_solution.csv", "\n".join(rows))
    text(root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "val.txt")
    text(root / "ILSVRC" / "Annotations" / "CLS-LOC" / "train" / WNIDS[0] / "a.xml", "<a/>")


def kaggle_short(root: Path) -> None:
    kaggle(root)
    lines = (root / "LOC_val_solution.csv").read_text().splitlines()
    text(root / "LOC_val_solution.csv", "\n".join(lines[:-1]))


def hub(root: Path) -> None:
    for shard in range(2):
        tar(root / "data" / f"train_images_{shard}.tar.gz",
            [(f"{name}_{number}{shard}_{name}.JPEG", image(name))
             for name in WNIDS for number in range(2)])
    tar(root / "data" / "val_images.tar.gz",
        [(f"ILSVRC2012_val_{number:08d}_{WNIDS[number % 3]}.JPEG", image(WNIDS[number % 3]))
         for number in range(6)])


def tiny(root: Path) -> None:
    tree(root / "train", inside="images")
    rows = []
    for number in range(6):
        put(root / "val" / "images" / f"val_{number}.JPEG", WNIDS[number % 3])
        put(root / "test" / "images" / f"test_{number}.JPEG", WNIDS[number % 3])
        rows.append(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t0\t9\t9")
    text(root / "val" / "val_annotations.txt", "\n".join(rows))
    text(root / "words.txt", "n01440764\ttench")


def tiny_zipped(root: Path) -> None:
    tiny(root / "tiny-imagenet-200")
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted((root / "tiny-imagenet-200").rglob("*")):
            archive.write(path, path.relative_to(root))


def dogs(root: Path) -> None:
    for number in range(4):
        put(root / "train" / f"cat.{number}.jpg", "cat")
        put(root / "train" / f"dog.{number}.jpg", "dog")
        put(root / "test" / f"{number}.jpg", "dog")


def both(root: Path, train: str = "train", val: str = "val",
         names: tuple[str, ...] = ("cat", "dog")) -> None:
    tree(root / train, names)
    tree(root / val, names, 2)


def deep(root: Path) -> None:
    for animal, names in {"dogs": ("terrier", "beagle"), "cats": ("siamese",)}.items():
        tree(root / "train" / animal, names)


def wrapped(root: Path) -> None:
    tree(root / "CUB" / "images", ("cat", "dog"))
    text(root / "CUB" / "attributes" / "a.txt")
    for junk in (".git", "@eaDir", "lost+found", "__MACOSX", ".ipynb_checkpoints"):
        put(root / "CUB" / "images" / "cat" / junk / "thumb.jpg", "bird")
        put(root / junk / "thumb.jpg", "bird")


def unequal(root: Path) -> None:
    tree(root / "train", ("cat", "dog"))
    tree(root / "val", ("dog", "bird"))


def hollow(root: Path) -> None:
    both(root)
    (root / "train" / "bird").mkdir()


def stray_archive(root: Path) -> None:
    tree(root / "train", ("cat", "dog"))
    tar(root / "backup.tar.gz", [("bird/0.jpg", image("bird"))])


def vehicle(root: Path) -> None:
    tree(root, ("cat", "dog"))
    for number in range(3):
        put(root / "train" / f"{number}.jpg", "bird")


def halves(root: Path) -> None:
    both(root, "part1", "part2")


def listed(root: Path) -> None:
    rows = ["file,breed,subset"]
    for number in range(8):
        name, split = ("cat", "dog")[number % 2], "train" if number < 4 else "valid"
        put(root / "photos" / f"{number}.jpg", name)
        rows.append(f"photos/{number}.jpg,{name},{split}")
    text(root / "list.csv", "\n".join(rows))


def linked(root: Path) -> None:
    tree(root / "pool", ("cat", "dog"))
    for name in ("cat", "dog"):
        (root / "set" / "train").mkdir(parents=True, exist_ok=True)
        (root / "set" / "train" / name).symlink_to(root / "pool" / name)
    (root / "set" / "train" / "dog" / "up").symlink_to(root / "set")


def dangling(root: Path) -> None:
    tree(root / "train", ("cat", "dog"))
    (root / "train" / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")


def webdataset(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    tar(root / "set-train-0000.tar", [each for number in range(6) for each in (
        (f"s{number}.jpg", image(str(number % 3))), (f"s{number}.cls", str(number % 3).encode()),
        (f"s{number}.seg.png", image("bird", "PNG")))], "w:")


def parquet(path: Path, labels: list[object], kind: pa.DataType, stored: bool = True,
            column: str = "label") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": image(("cat", "dog", "bird")[number % 3]) if stored else None,
               "path": f"{number}.jpg"} for number in range(len(labels))]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, struct),
                             column: pa.array(labels, kind)}), path)


NAMES = [("cat", "dog", "bird")[number % 3] for number in range(9)]


@dataclass(frozen=True)
class Shape:
    lies: str  # what is there, for the table
    build: Callable[[Path], object]
    outcome: Counts | str  # or what the refusal says
    words: tuple[str, ...] = ()
    source: str = ""  # below the folder
    classes: tuple[str, ...] | None = None


def of(names: tuple[str, ...], train: int, val: int = 0) -> Counts:
    found = {"train": dict.fromkeys(names, train)}
    return found | ({"val": dict.fromkeys(names, val)} if val else {})


PETS = ("cat", "dog")
SHAPES = {
    "kaggle": Shape("ImageNet from Kaggle: `ILSVRC/Data/CLS-LOC/{train,val,test}`, "
                    "`LOC_val_solution.csv`", kaggle, of(WNIDS, 3, 2)),
    "kaggle, a label missing": Shape("the same, an image without a row", kaggle_short,
                                     "has no label for 1 of 6 images"),
    "hub": Shape("ImageNet from the hub: `data/train_images_N.tar.gz`, `val_images.tar.gz`", hub,
                 of(WNIDS, 4, 2)),
    "folders": Shape("`{train,val}/CLASS/*`", lambda root: both(root, names=WNIDS),
                     of(WNIDS, 3, 2)),
    "tiny": Shape("tiny-imagenet-200: `train/CLASS/images/*`, `val/images/*`, "
                  "`val_annotations.txt`", tiny, of(WNIDS, 3, 2)),
    "tiny, zipped": Shape("the same as downloaded, a .zip", tiny_zipped, of(WNIDS, 3, 2),
                          source="tiny-imagenet-200.zip"),
    "dogs": Shape("`train/cat.0.jpg`, `test/0.jpg`", dogs, of(PETS, 4)),
    "numbers": Shape("folders `0` to `11`", lambda root: tree(root, tuple(map(str, range(12)))),
                     of(tuple(map(str, range(12))), 3), classes=tuple(map(str, range(12)))),
    "other names": Shape("`{Training,Validation}/CLASS/*`",
                         lambda root: both(root, "Training", "Validation"), of(PETS, 3, 2)),
    "development set": Shape("`{train,dev}/CLASS/*`", lambda root: both(root, "train", "dev"),
                             of(PETS, 3, 2)),
    "words in names": Shape("`seg_train/seg_train/CLASS/*`, `seg_test/seg_test/CLASS/*`",
                            lambda root: both(root, "seg_train/seg_train", "seg_test/seg_test"),
                            of(PETS, 3, 2)),
    "21K": Shape("a tar of `imagenet21k_{train,val}/CLASS/*`",
                 lambda root: tar(root / "imagenet21k_resized.tar.gz", [
                     (f"imagenet21k_{split}/{name}/{number}.JPEG", image(name))
                     for split in ("train", "val") for name in WNIDS for number in range(2)]),
                 of(WNIDS, 2, 2)),
    "wrapped": Shape("`CUB/images/CLASS/*` beside folders without images; folders that machines "
                     "make", wrapped, of(PETS, 3)),
    "links": Shape("class folders that are links, one leading back", linked, of(PETS, 3),
                   source="set"),
    "dangling": Shape("a link to an image that is gone", dangling, "No such file"),
    "deep": Shape("`train/dogs/terrier/*`: two folders deep", deep, "class_depth=1"),
    "deep, two": Shape("the same", deep, {"train": {"dogs/terrier": 3, "dogs/beagle": 3,
                                                    "cats/siamese": 3}}, ("class_depth=2",)),
    "deep, one": Shape("the same", deep, {"train": {"dogs": 6, "cats": 3}}, ("class_depth=1",)),
    "unequal": Shape("train and val with other classes", unequal, "unequal_classes"),
    "unequal, wanted": Shape("the same", unequal, {"train": {"cat": 3, "dog": 3},
                                                   "val": {"dog": 3, "bird": 3}},
                             ("accept=[unequal_classes]",)),
    "hollow": Shape("an empty class folder", hollow, "empty_classes"),
    "train, a vehicle": Shape("a class `train` beside others", vehicle, "splits=none"),
    "train, a vehicle, said": Shape("the same", vehicle, {"train": {"cat": 3, "dog": 3,
                                                                    "train": 3}}, ("splits=none",)),
    "halves": Shape("`part1/CLASS/*`, `part2/CLASS/*`", halves, "splits='{train: part1, val: "),
    "halves, said": Shape("the same", halves, of(PETS, 3, 2),
                          ("splits={train: part1, val: part2}",)),
    "one class": Shape("all images in one folder", lambda root: tree(root / "train", ("cat",)),
                       "one_class"),
    "flat": Shape("images without folders or labels",
                  lambda root: [put(root / f"{number}.jpg", "cat") for number in range(4)],
                  "labels=FILE"),
    "list": Shape("a table of files, classes and splits", listed, of(PETS, 2, 2),
                  ("labels=list.csv",), source="."),
    "archive beside": Shape("class folders and a stray archive", stray_archive, "take=folders"),
    "archive beside, said": Shape("the same", stray_archive, of(PETS, 3), ("take=folders",)),
    "webdataset": Shape("WebDataset with two images a key", webdataset, "a sample has 2 images"),
    "webdataset-image": Shape("the same", webdataset, of(("0", "1", "2"), 2), ("image=jpg",)),
    "parquet": Shape("Parquet, `default/{train,validation}/0000.parquet`", lambda root: [
        parquet(root / "default" / split / "0000.parquet", NAMES, pa.string())
        for split in ("train", "validation")], of(("cat", "dog", "bird"), 3, 3)),
    "parquet, lists": Shape("Parquet with lists of labels", lambda root: parquet(
        root / "train.parquet", [[1, 2]] * 4, pa.list_(pa.int64())), "lists of labels"),
    "parquet, fractions": Shape("Parquet with float labels", lambda root: parquet(
        root / "train.parquet", [0.5] * 4, pa.float32()), "fractions"),
    "parquet, paths": Shape("Parquet with paths in place of images", lambda root: parquet(
        root / "train.parquet", [0, 1] * 2, pa.int64(), stored=False), "holds no images"),
}


def made(shape: Shape, folder: Path) -> str:
    shape.build(folder)
    return str(folder / shape.source) if shape.source else str(folder)


def said(shape: Shape, folder: Path) -> list[str]:
    return [word.replace("labels=", f"labels={folder}/") for word in shape.words]


def held(dst: Path) -> Counts:
    """What a data set holds; every image's width must be that of its class."""
    manifest = load_manifest(dst)
    found: Counts = {}
    for split in manifest.splits:
        counted: Counter[str] = Counter()
        for label, pixels in read_back(dst, split):
            name = manifest.classes[label]
            shown = {width: each for each, width in WIDTHS.items()}[pixels.shape[1]]
            true = {"dogs": ("terrier", "beagle"), "cats": ("siamese",), "train": ("bird",)}
            assert shown in true.get(name, (name.rpartition("/")[2],)), f"{shown} as {name}"
            counted[name] += 1
        found[split] = dict(counted)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_right_or_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    source = made(shape, tmp_path / "source")
    asked = options("workers=1", *said(shape, tmp_path / "source"))
    if isinstance(shape.outcome, str):
        with pytest.raises(Exception) as refusal:
            convert(source, tmp_path / "dst", asked)
        assert shape.outcome in str(refusal.value)
        assert not (tmp_path / "dst" / "dataset.json").exists()
        return
    plan = planned(source, tmp_path / "dst", asked)
    assert not (tmp_path / "dst").exists(), "a plan leaves nothing behind"
    convert(source, tmp_path / "dst", asked)
    assert held(tmp_path / "dst") == shape.outcome
    assert {split: sum(counts.values()) for split, counts in shape.outcome.items()} == {
        split: each["images"] for split, each in plan["splits"].items()}
    if shape.classes:
        assert load_manifest(tmp_path / "dst").classes == shape.classes


def unique(number: int) -> bytes:
    """A JPEG of which there is one: a flat colour."""
    out = io.BytesIO()
    Image.new("RGB", (32, 24), (7 * number % 256, 40 * (number % 6), 90)).save(out, "JPEG")
    return out.getvalue()


def imagenet_in_five_ways(root: Path) -> list[Path]:
    """The same twelve images as ImageNet is distributed: by its authors, by Kaggle, by the hub as
    Parquet and as archives, and as class folders."""
    train = [(WNIDS[number % 3], number) for number in range(6)]
    val = [(WNIDS[-number % 3], 100 + number) for number in range(1, 7)]
    ways = [root / name for name in ("ilsvrc", "kaggle", "parquet", "hub", "folders")]
    authors, contest, table, hub_tars, folders = ways
    authors.mkdir(parents=True)
    tar_of(authors / "ILSVRC2012_img_train.tar", [(f"{wnid}.tar", tar_bytes(
        [(f"{wnid}_{number}.JPEG", unique(number)) for each, number in train if each == wnid]))
        for wnid in reversed(WNIDS)])
    tar_of(authors / "ILSVRC2012_img_val.tar", [
        (f"ILSVRC2012_val_{number - 100:08d}.JPEG", unique(number)) for _, number in val])
    kit = authors / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    idents = {WNIDS[1]: 1, WNIDS[2]: 2, WNIDS[0]: 3}  # of the kit, in an order of its own
    savemat(kit / "meta.mat", {"synsets": np.array(
        [(ident, wnid) for wnid, ident in idents.items()],
        [("ILSVRC2012_ID", "i4"), ("WNID", "O")])})
    text(kit / "ILSVRC2012_validation_ground_truth.txt",
         "".join(f"{idents[wnid]}\n" for wnid, _ in val))
    rows = ["ImageId,PredictionString"]
    for folder in (contest / "ILSVRC" / "Data" / "CLS-LOC", folders):
        for wnid, number in train:
            (folder / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (folder / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(unique(number))
        for wnid, number in val:
            name = f"ILSVRC2012_val_{number - 100:08d}"
            place = folder / "val" / ("" if folder != folders else wnid)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.JPEG").write_bytes(unique(number))
            if folder != folders:
                rows.append(f"{name},{wnid} 1 1 30 30")
    text(contest / "LOC_val_solution.csv", "\n".join(rows))
    features = {"label": {"names": list(WNIDS), "_type": "ClassLabel"}}
    table.mkdir()
    for split, listed in (("train", train), ("validation", val)):
        pq.write_table(pa.table({
            "image": [{"bytes": unique(number), "path": None} for _, number in listed],
            "label": [WNIDS.index(wnid) for wnid, _ in listed]}).replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}),
            table / f"{split}-00000-of-00001.parquet")
    tar(hub_tars / "data" / "train_images_0.tar.gz", [
        (f"{wnid}_{number}_{wnid}.JPEG", unique(number)) for wnid, number in train])
    tar(hub_tars / "data" / "val_images.tar.gz", [
        (f"ILSVRC2012_val_{number - 100:08d}_{wnid}.JPEG", unique(number)) for wnid, number in val])
    return ways


def test_the_five_distributions_of_imagenet_give_equal_classes_and_labels(tmp_path: Path) -> None:
    found = []
    for source in imagenet_in_five_ways(tmp_path):
        dst = tmp_path / f"{source.name}-dst"
        convert(str(source), dst, options("workers=1"))
        assert load_manifest(dst).classes == WNIDS
        found.append({split: {(label, pixels.tobytes()) for label, pixels in read_back(dst, split)}
                      for split in ("train", "val")})
    assert [len(images) for images in found[0].values()] == [6, 6]
    assert found[1:] == found[:1] * 4
    tiny_source = made(SHAPES["tiny"], tmp_path / "tiny")
    convert(tiny_source, tmp_path / "tiny-dst", options("workers=1"))
    assert load_manifest(tmp_path / "tiny-dst").classes == WNIDS


def test_a_second_conversion_of_something_else_is_not_complete_already(tmp_path: Path) -> None:
    tree(tmp_path / "a" / "train", PETS)
    convert(str(tmp_path / "a"), tmp_path / "dst", options())
    convert(str(tmp_path / "a"), tmp_path / "dst", options())
    put(tmp_path / "a" / "train" / "cat" / "new.jpg", "cat")
    with pytest.raises(ConfigError, match="holds another data set"):
        convert(str(tmp_path / "a"), tmp_path / "dst", options())
    (tmp_path / "a" / "train" / "cat" / "new.jpg").unlink()
    text(tmp_path / "names", "dog\ncat\n")
    with pytest.raises(ConfigError, match="holds another data set"):
        convert(str(tmp_path / "a"), tmp_path / "dst", options(f"classes={tmp_path / 'names'}"))


ODD_NAMES = ("猫", "a b & c", "d'e\"f", "=SUM(A1)", "x,y:z", "-rf", "é́", "😀")


def test_names_of_any_bytes_give_a_data_set_that_reads_back(tmp_path: Path, cli: Cli) -> None:
    for name in ODD_NAMES:
        for number in range(2):
            (tmp_path / "a" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / name / f"{name}{number}.jpg").write_bytes(image("cat"))
    raw = os.fsencode(tmp_path / "a") + b"/caf\xe9"
    os.mkdir(raw)
    for leaf in (b"/\xf1.jpg", b"/x.jpg", b"/\xff.jpg"):
        Path(os.fsdecode(raw + leaf)).write_bytes(image("dog") if leaf != b"/\xff.jpg" else b"")
    done = cli("convert", tmp_path / "a", tmp_path / "dst", "max_rejected=1",
               env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert set(load_manifest(tmp_path / "dst").classes) == {*ODD_NAMES, "caf\\xe9"}
    assert cli("verify", tmp_path / "dst", "--deep").returncode == 0
    json.loads((tmp_path / "dst" / "dataset.json").read_text(encoding="utf-8"))
    (line,) = (tmp_path / "dst" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["image"] == "caf\\xe9/\\xff.jpg"
    (tmp_path / "a" / "caf\\xe9").mkdir()
    put(tmp_path / "a" / "caf\\xe9" / "0.jpg", "cat")
    with pytest.raises(ConfigError, match="read the same"):
        convert(str(tmp_path / "a"), tmp_path / "other", options("max_rejected=1"))


def test_file_names_that_python_would_read_as_ascii_are_refused(tmp_path: Path, cli: Cli) -> None:
    tree(tmp_path / "a" / "train", PETS)
    done = cli("convert", tmp_path / "a", tmp_path / "dst",
               env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 2
    assert "PYTHONUTF8 = 0" in done.stderr


def test_an_image_is_chosen_only_where_there_is_a_choice(tmp_path: Path) -> None:
    tree(tmp_path / "a" / "train", PETS)
    with pytest.raises(ConfigError, match="image = jpg: chooses among the images of a WebDataset"):
        convert(str(tmp_path / "a"), tmp_path / "dst", options("image=jpg"))


def test_a_destination_inside_the_source_is_refused(tmp_path: Path) -> None:
    tree(tmp_path / "a" / "train", PETS)
    with pytest.raises(ConfigError, match="lies inside SOURCE"):
        convert(str(tmp_path / "a"), tmp_path / "a" / "out", options())


def test_a_later_split_may_call_its_folders_otherwise(tmp_path: Path) -> None:
    tree(tmp_path / "a" / "train", PETS)
    for number, name in enumerate(PETS):
        for index in range(2):
            put(tmp_path / "b" / str(number) / f"{index}.jpg", name)
    convert(str(tmp_path / "a"), tmp_path / "dst", options())
    with pytest.raises(ConfigError, match="FOLDER<TAB>CLASS"):
        convert(str(tmp_path / "b"), tmp_path / "dst", options("append=true", "split=v2"))
    text(tmp_path / "names", "0\tcat\n1\tdog\n")
    convert(str(tmp_path / "b"), tmp_path / "dst", options(
        "append=true", "split=v2", f"classes={tmp_path / 'names'}"))
    assert held(tmp_path / "dst")["v2"] == {"cat": 2, "dog": 2}


# -- Random trees ----------------------------------------------------------------------------------

FOLDERS = ("train", "val", "test", "Valid", "cat", "dog", "bird", "images", "a b", "猫", "x,y",
           "set")
folder = st.sampled_from(FOLDERS)
trees = st.dictionaries(st.lists(folder, min_size=0, max_size=4).map("/".join),
                        st.integers(0, 3), min_size=1, max_size=9)
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def obvious(images: dict[str, int]) -> Counts | None:
    """A slow reading for trees that are [split/]class[/...], and for those only: every top folder
    is a split by its name, or none is; every class lies right below; else None."""
    full = {tuple(path.split("/")) if path else (): count
            for path, count in images.items() if count}
    while full and len({path[:1] for path in full}) == 1 and all(
            len(path) > 1 for path in full) and next(iter(full))[0].lower() not in SPLIT_OF:
        full = {path[1:]: count for path, count in full.items()}
    tops = {path[0].lower() for path in full if path}
    splits = bool(tops) and tops <= set(SPLIT_OF)
    if () in full or (not splits and tops & set(SPLIT_OF)):
        return None
    held_out = [name for name in ("val", "valid", "test") if name in tops]
    found: Counts = {}
    for path, count in full.items():
        if len(path) < 1 + splits:
            return None
        split = "train"
        if splits:
            top = path[0].lower()
            split = "train" if top == "train" else "val" if top == held_out[0] else top
        of_class = found.setdefault(split, {})
        of_class[path[splits]] = of_class.get(path[splits], 0) + count
    return found


def read_right(images: dict[str, int], root: Path) -> bool:
    """Whether a tree was read; it must be read as `obvious` says, or refused with a remedy."""
    for path, count in images.items():
        (root / path).mkdir(parents=True, exist_ok=True)
        text(root / path / "notes.txt")
        for number in range(count):
            (root / path / f"{number}.jpg").touch()
    try:
        plan = planned(str(root), root.parent / "never", options("accept=[few_images]"))
    except ConfigError as refusal:
        remedy = str(refusal)
    else:
        remedy = ""
    if remedy:
        assert any(word in remedy for word in ("accept=[", "class_depth=", "splits=", "outside=",
                                               "labels=FILE", "no images found")), remedy
        return False
    expected = obvious(images)
    assert expected is not None, f"{images} was read as {plan}, and has no obvious reading"
    assert plan["splits"] == {split: {"images": sum(counts.values()), "classes": len(counts)}
                              for split, counts in expected.items()}
    names = sorted({name for counts in expected.values() for name in counts})
    assert (plan["classes"], plan["first"]) == (len(names), names[:3])
    assert sum(plan["left_out"].values()) + sum(
        split["images"] for split in plan["splits"].values()) == sum(images.values())
    return True


@settings(max_examples=1000, deadline=None)
@given(images=trees)
def test_random_trees_are_read_as_the_obvious_reading_says_or_refused(
        images: dict[str, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read_right(images, Path(folder) / "tree")


def test_trees_without_surprises_are_read_and_not_refused(tmp_path: Path) -> None:
    """Else the test above could pass by refusing everything."""
    draw = random.Random(0)
    for number in range(60):
        names = draw.sample(["cat", "dog", "bird", "a b", "猫", "x,y"], draw.randint(2, 5))
        splits = draw.choice([("",), ("train/",), ("train/", "val/"), ("train/", "Valid/", "test/"),
                              ("set/train/", "set/test/")])
        inside = draw.choice(["", "/images"])
        images = {f"{split}{name}{inside}": draw.randint(1, 3) for split in splits
                  for name in names}
        assert read_right(images, tmp_path / str(number)), images


# -- The page --------------------------------------------------------------------------------------

MARK = "<!-- shapes: written by tests/unit/data_prep/sources/test_shapes.py -->"


def table(folder: Path) -> str:
    rows = ["| what lies there | say | what becomes of it |", "|---|---|---|"]
    for name, shape in SHAPES.items():
        place = folder / name.replace(" ", "_").replace(",", "") / "dir"
        source = made(shape, place)
        words = " ".join(f"`{word}`" for word in shape.words)
        if isinstance(shape.outcome, str):
            try:
                convert(source, place.with_name("dst"), options("workers=1", *said(shape, place)))
            except Exception as error:
                told = str(error).splitlines()[0].replace(str(place), "DIR").replace("|", "\\|")
                told = told.replace(str(place.with_name("dst")), "DST")
                became = f"refused: {told}"
        else:
            plan = planned(source, folder / "none", options(*said(shape, place)))
            splits = ", ".join(f"{split['images']} {each}" for each, split in
                               plan["splits"].items())
            became = f"{plan['shape']}: {splits} of {plan['classes']} classes"
            if plan["left_out"]:
                became += "; left out: " + ", ".join(plan["left_out"])
        rows.append(f"| {shape.lies} | {words} | {became} |")
    return "\n".join(rows)


def test_the_page_shows_what_becomes_of_each_shape(tmp_path: Path) -> None:
    page = ROOT / "docs" / "data.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(MARK)[2]
    made_now = f"{head}{MARK}\n\n{table(tmp_path)}\n\n{MARK}{after}"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(made_now, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == made_now
