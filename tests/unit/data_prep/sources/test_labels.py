"""Files that list images with their labels: every format, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_prep.sources.found import SourceError
from data_prep.sources.labels import read_labels

ROWS = {"a/1.jpg": ("cat", "train"), "a/2.jpg": ("dog", "val")}
ALONE = {name: (label, None) for name, (label, _) in ROWS.items()}


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("name", "text", "rows"), [
    ("l.csv", "path,label,split\na/1.jpg,cat,train\na/2.jpg,dog,val\n", ROWS),
    ("l.csv", "split,Filename,Class\ntrain,./a/1.jpg,cat\nval,a\\2.jpg,dog\n", ROWS),
    ("l.tsv", "image\tbreed\na/1.jpg\tcat\na/2.jpg\tdog\n", ALONE),
    ("l.csv", "image_id;species\na/1.jpg;cat\na/2.jpg;dog\n", ALONE),
    ("l.csv", 'path,label\n"a/1.jpg","cat"\n"a/2.jpg",dog\n', ALONE),
    ("l.txt", "a/1.jpg cat\na/2.jpg dog\n", ALONE),
    ("l.csv", "a/1.jpg,cat\na/2.jpg,dog\n", ALONE),
    ("l.jsonl", '{"file": "a/1.jpg", "label": "cat", "split": "train"}\n\n'
                '{"file": "a/2.jpg", "label": "dog", "split": "val"}\n', ROWS),
    ("l.json", json.dumps({"a/1.jpg": "cat", "a/2.jpg": "dog"}), ALONE),
    ("l.json", json.dumps([{"path": "a/1.jpg", "target": 0}, {"path": "a/2.jpg", "target": 1}]),
     {"a/1.jpg": ("0", None), "a/2.jpg": ("1", None)}),
    ("val_annotations.txt", "a/1.jpg\tcat\t0\t0\t9\t9\na/2.jpg\tdog\t0\t0\t9\t9\n", ALONE),
    ("LOC_val_solution.csv", "ImageId,PredictionString\na/1.jpg,cat 1 2 3 4 cat 5 6 7 8\n"
                             "a/2.jpg,dog 1 2 3 4\n", ALONE),
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_is_read(tmp_path: Path, name: str, text: str, rows: dict, encoding: str) -> None:
    assert read_labels(written(tmp_path / name, text, encoding)).rows == rows


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", "what,where,kind,part\ncat,a/1.jpg,x,train\n"
                                       "dog,a/2.jpg,y,val\n")
    with pytest.raises(SourceError, match=r"which of its columns what, where, kind, part is the "
                                          r"path.*labels_path=COLUMN"):
        read_labels(path)
    assert read_labels(path, path_column="where", label_column="what",
                       split_column="part").rows == ROWS
    with pytest.raises(SourceError, match=r"labels_label = nothing: .* has the columns what"):
        read_labels(path, path_column="where", label_column="nothing")


def test_cub_lists_are_joined_by_number(tmp_path: Path) -> None:
    written(tmp_path / "images.txt", "1 a/1.jpg\n2 a/2.jpg\n")
    written(tmp_path / "image_class_labels.txt", "1 7\n2 8\n")
    written(tmp_path / "classes.txt", "7 cat\n8 dog\n")
    written(tmp_path / "train_test_split.txt", "1 1\n2 0\n")
    for name in ("images.txt", "image_class_labels.txt"):
        assert read_labels(tmp_path / name).rows == {"a/1.jpg": ("cat", "train"),
                                                     "a/2.jpg": ("dog", "test")}


def test_stanfords_kits_are_read(tmp_path: Path) -> None:
    cars = np.array([("a/1.jpg", 1, 0), ("a/2.jpg", 2, 1)],
                    [("relative_im_path", "O"), ("class", "O"), ("test", "O")])
    savemat(tmp_path / "cars_annos.mat", {
        "annotations": cars, "class_names": np.array(["cat", "dog"], object)})
    assert read_labels(tmp_path / "cars_annos.mat").rows == {"a/1.jpg": ("cat", "train"),
                                                             "a/2.jpg": ("dog", "test")}
    savemat(tmp_path / "train_list.mat", {"file_list": np.array(["a/1.jpg", "a/2.jpg"], object),
                                          "labels": np.array([1, 2])})
    assert read_labels(tmp_path / "train_list.mat").rows == {"a/1.jpg": ("1", None),
                                                             "a/2.jpg": ("2", None)}
    savemat(tmp_path / "other.mat", {"boxes": np.zeros(3)})
    with pytest.raises(SourceError, match="holds boxes"):
        read_labels(tmp_path / "other.mat")


@pytest.mark.parametrize(("name", "content", "told"), [
    ("l.csv", b"path,label\na.jpg,cat\na.jpg,dog\n", "a.jpg has two labels, 'cat' and 'dog'"),
    ("l.csv", b"path,label\na.jpg,\n", "has the label ''"),
    ("l.csv", b"path,label\na.jpg,tench, Tinca\n", "row 2 has 3 cells"),
    ("l.csv", b"path,label,class\na.jpg,x,y\n", "label and class may both be"),
    ("l.csv", b"path,label\na.jpg,caf\xe9\n", "is not UTF-8 text"),
    ("l.csv", b"path,label\n", "names no image"),
    ("truth.txt", b"490\n361\n171\n", "holds one column"),
    ("l.json", b"{", "not JSON"), ("l.json", b"[1, 2]", "expected {path: label}"),
    ("l.jsonl", b'{"path": "a.jpg", "label": ["x"]}', "record 1 has the path 'a.jpg' and"),
    ("absent/l.csv", None, "cannot be read"),
    ("broken.mat", b"MATLAB no more", "cannot be read"),
])
def test_what_is_no_list_is_refused_in_words(tmp_path: Path, name: str, content: bytes | None,
                                             told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as refusal:
        read_labels(tmp_path / name)
    assert told in str(refusal.value)
    assert "labels = " in str(refusal.value)
