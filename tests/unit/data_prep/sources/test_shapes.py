"""The shapes in which people have their images: each read right, or refused with the remedy.

`UPDATE_DOCS=1 pytest tests/unit/data_prep/sources/test_shapes.py` writes the table in docs/data.md
anew, to be read before it is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.convert import convert, planned
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from tests.conftest import ROOT, Cli
from tests.unit.data_prep.material import options
from tests.unit.data_prep.sources.shapes import (
    PETS,
    SHAPES,
    held,
    image,
    made,
    put,
    said,
    text,
    tree,
)


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
