"""Random trees of folders, beside a slow and obvious reading."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.convert import planned
from resnet_dist.config.schema import ConfigError
from tests.unit.data_prep.material import options
from tests.unit.data_prep.sources.shapes import Counts, text

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
