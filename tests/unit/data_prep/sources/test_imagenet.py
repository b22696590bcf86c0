"""ImageNet as it is distributed: the same images, classes and labels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from data_prep.convert import convert
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import options, read_back, tar_bytes, tar_of
from tests.unit.data_prep.sources.shapes import SHAPES, WNIDS, made, tar, text


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
