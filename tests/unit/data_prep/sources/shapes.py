"""Sources in the shapes in which people have their images, built small."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import read_back

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
