"""What a tree of folders means: which are splits, which are classes, what is left out, and why.

In: the folders of a source with their numbers of images, names and label files where a folder alone
does not tell, and what the user has said. Out: a `Reading`; or a refusal that shows the readings
there are and the `key=value` that chooses each. Nothing is read from disk here.

Folders are read as [wrappers/] [split/ [wrappers/]] class [/images]. A wrapper is the only folder
with images beside its like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.sources.found import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    Side,
    SourceError,
    split_names,
    split_words,
)
from data_prep.sources.namings import by_label_file, by_name

IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpeg", "jpegs", "jpegimages",
                           "photos", "pictures"})
SHOWN = 4  # names in a refusal


@dataclass(frozen=True)
class Place:
    """What an image is: its split and class."""

    split: str
    class_name: str


Labeller = Callable[[str], Place | None]  # from an image's path in the source; None: not known


@dataclass(frozen=True)
class Said:
    """What the user has said about a source; docs/data.md lists the keys."""

    split: str | None = None
    splits: Mapping[str, str] | str | None = None  # {train: DIR}; "none": folders are no splits
    class_depth: int | None = None
    label_from: re.Pattern[str] | None = None  # groups `label` and, where it tells, `split`
    labels: Mapping[str, tuple[str, str | None]] | None = None  # path -> (label, split)
    outside: str = "refuse"


@dataclass
class Reading:
    shape: str
    why: str
    # Of each folder: what its images are, how each one's name tells, or None: in no class.
    places: dict[str, Place | Labeller | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # folder -> why
    notes: list[str] = field(default_factory=list)


@dataclass
class Node:
    """A folder. `count`: images in it and below."""

    name: str
    path: str
    images: int = 0
    count: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def full(self) -> list[Node]:
        return [child for child in self.children.values() if child.count]

    def below(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.below()

    def names(self) -> set[str]:
        return {child.name for child in self.full()}


def read_folders(folders: Mapping[str, int], names: Callable[[str], list[str]], side: Side,
                 said: Said, source: str) -> Reading:
    """What the images of every folder are. Raises: SourceError, with the choices there are.

    Args:
        folders: path -> images directly in it; those without images count as classes where their
            siblings are some.
        names: the names of a folder's images.
        side: files that may hold labels, by path.
        source: as the user named it, for messages.
    """
    if said.labels is not None or said.label_from is not None:
        return _told_by_the_user(folders, said)
    root = _tree(folders)
    reading = Reading("class folders", "each folder with images is a class")
    if isinstance(said.splits, Mapping):
        parts = _named_splits(root, said.splits, source)
        reading.shape = "class folders below the named splits"
    else:
        root = _unwrapped(root)
        parts = _split_folders(root, said, source, reading)
    if said.split is not None and len(parts) > 1:
        raise SourceError(f"split = {said.split}: {source} has split folders of its own "
                          f"({_list(node.name for _, node in parts)}); drop the option")
    for split, node in parts:
        _read_split(said.split or split, node, names, side, said, source, reading)
    for node in root.below():
        if node.images:
            reading.places.setdefault(node.path, None)
    return reading


def _tree(folders: Mapping[str, int]) -> Node:
    root = Node("", "")
    for path, images in folders.items():
        node = root
        for part in path.split("/") if path else ():
            inner = f"{node.path}/{part}" if node.path else part
            node = node.children.setdefault(part, Node(part, inner))
        node.images += images
    for node in reversed(list(root.below())):
        node.count = node.images + sum(child.count for child in node.children.values())
    return root


def _unwrapped(node: Node, inside: str = "") -> Node:
    """The first folder below that holds images or several folders with some, or a split's."""
    while not node.images and len(node.full()) == 1:
        (child,) = node.full()
        words = split_words(child.name)
        again = bool(words) and words == split_words(inside)  # train/train/*, seg_val/seg_val/*
        if not again and (child.images or split_words(child.name, exact=True)):
            break
        node = child
    return node


def _named_splits(root: Node, splits: Mapping[str, str], source: str) -> list[tuple[str, Node]]:
    parts = []
    for split, folder in splits.items():
        node = root
        for part in str(folder).strip("/").split("/"):
            if part not in node.children:
                raise SourceError(f"splits = {split}: {folder}: {source} has no such folder; in "
                                  f"{node.path or '.'} are {_list(sorted(node.names()))}")
            node = node.children[part]
        parts.append((split, node))
    return parts


def _split_folders(root: Node, said: Said, source: str, reading: Reading
                   ) -> list[tuple[str, Node]]:
    """(split, its folder); the root alone where folders are no splits."""
    full = root.full()
    whole = [(said.split or "train", root)]
    if said.splits == "none" or (said.class_depth is not None and not any(
            split_words(node.name, exact=True) for node in full)):
        return whole
    exact = [node for node in full if split_words(node.name, exact=True)]
    others = [node.name for node in full if node not in exact]
    if exact and others and said.outside == "refuse":
        mapping = _mapping([(split_names([node.name.lower()])[node.name.lower()], node)
                            for node in exact])
        raise SourceError(
            f"SOURCE = {source}: beside {_list(node.name for node in exact)} lies "
            f"{_list(others)}. Either the former are splits, and the images of the latter lie "
            f"outside class folders: outside=ignore splits='{mapping}' leaves them out; or all are "
            "classes: splits=none")
    if exact:
        words = split_names(node.name.lower() for node in exact)
        reading.shape = "class folders below split folders"
        reading.why = f"splits by their names are {_list(node.path for node in exact)}"
        return [(words[node.name.lower()], node) for node in exact]
    told = {node.name: split_words(node.name) for node in full}
    if len(full) > 1 and all(len(words) == 1 for words in told.values()) and any(
            words <= set(TRAIN_NAMES) for words in told.values()):
        canonical = split_names(word for words in told.values() for word in words)
        found = [(canonical[next(iter(told[node.name]))], node) for node in full]
        kinds = {re.sub(r"\d+", "", node.name) for node in full}
        if len(kinds) > len({split for split, _ in found}):
            raise SourceError(f"SOURCE = {source}: several of its folders {_list(told)} are of one "
                              f"split; say which are which: splits='{_mapping(found)}'")
        reading.shape = "class folders below split folders"
        reading.why = f"splits by words in their names are {_list(node.path for node in full)}"
        return found
    alike = [node for node in full if not node.images and len(node.full()) > 1]
    if len(alike) == len(full) > 1:
        common = set.intersection(*(node.names() for node in alike))
        if len(common) > 1:
            guess = list(zip(("train", "val", "test"), full, strict=False))
            raise SourceError(
                f"SOURCE = {source}: {_list(node.name for node in full)} hold folders of the same "
                f"names ({_list(sorted(common))}). Either they are splits: "
                f"splits='{_mapping(guess)}', whichever is which; or classes, whatever lies in "
                "them: splits=none class_depth=1")
    return whole


def _read_split(split: str, node: Node, names: Callable[[str], list[str]], side: Side, said: Said,
                source: str, reading: Reading) -> None:
    """Places of all images of one split."""
    node = _unwrapped(node, inside=node.name)
    full = node.full()
    only = full[0] if len(full) == 1 and not node.images else None
    if only and only.images and not only.full() and only.name.lower() in IMAGE_FOLDERS:
        node, full = only, []  # SPLIT/images/*
    if node.images and not full:
        _read_flat(split, node, names, side, source, reading)
        return
    depth = said.class_depth or _depth(node, source)
    for inner in node.below():
        parts = inner.path[len(node.path):].strip("/").split("/")
        if inner is node:
            if inner.images:
                reading.places[inner.path] = None
        elif inner.images or (not inner.count and not inner.children and len(parts) == depth):
            known = len(parts) >= depth
            reading.places[inner.path] = Place(split, "/".join(parts[:depth])) if known else None
            if inner.images and {part.lower() for part in parts[depth:]} - IMAGE_FOLDERS:
                reading.notes.append(f"{inner.path}: counts to class {'/'.join(parts[:depth])}")


def _depth(node: Node, source: str) -> int:
    """1, unless that is one of two readings. Raises: SourceError."""
    deep = [child for child in node.full() if not child.images
            and not all(inner.name.lower() in IMAGE_FOLDERS and inner.images
                        for inner in child.full())]
    if not deep:
        return 1
    inner = [f"{child.name}/{grand.name}" for child in deep for grand in child.full()]
    raise SourceError(
        f"SOURCE = {source}: its images lie two folders deep, e.g. in "
        f"{node.path + '/' if node.path else ''}{inner[0]}. Either {_list(sorted(node.names()))} "
        f"are the classes: class_depth=1; or {_list(inner)}: class_depth=2")


def _read_flat(split: str, node: Node, names: Callable[[str], list[str]], side: Side, source: str,
               reading: Reading) -> None:
    """A split whose images lie in one folder: labels stand in a file, or in the names."""
    found = by_label_file(node.path, names, side, source) or by_name(names(node.path))
    if found is not None:
        how, label_of = found
        if how not in reading.shape:
            reading.shape += f", {how}"

        def place(name: str) -> Place | None:
            label = label_of(name.rpartition("/")[2])
            return Place(split, label) if label is not None else None

        reading.places[node.path] = place
    elif split == "test" or "test" in split_words(node.name):
        reading.left_out[node.path] = "test images without labels"
        reading.places[node.path] = None
    else:
        reading.places[node.path] = None


def _told_by_the_user(folders: Mapping[str, int], said: Said) -> Reading:
    """`label_from` or `labels`: a folder tells at most the split."""
    known: dict[str, str] = {}
    words = {word for path in folders for part in path.lower().split("/")
             for word in split_words(part, exact=True)}
    names = split_names(words)

    def split_of(path: str) -> str:
        if path not in known:
            parts = [names[part] for part in path.lower().split("/") if part in names]
            known[path] = parts[0] if parts else "train"
        return said.split or known[path]

    def by_pattern(name: str) -> Place | None:
        assert said.label_from is not None
        found = said.label_from.search(name)
        if found is None or not found["label"]:
            return None
        told = found.groupdict().get("split")
        return Place(_canonical(told) if told else split_of(name.rpartition("/")[0]),
                     found["label"])

    def by_labels(name: str) -> Place | None:
        assert said.labels is not None
        leaf = name.rpartition("/")[2]
        row = next((said.labels[key] for key in (name, leaf, name.rpartition(".")[0],
                                                leaf.rpartition(".")[0])
                    if key in said.labels), None)
        if row is None:
            return None
        label, told = row
        return Place(_canonical(told) if told else split_of(name.rpartition("/")[0]), label)

    if said.labels is not None:
        reading = Reading("images with a list of labels", "labels=FILE names every image's label")
        reading.places = dict.fromkeys(folders, by_labels)
    else:
        reading = Reading("images with labels in their names", "label_from=REGEX takes them out")
        reading.places = dict.fromkeys(folders, by_pattern)
    return reading


def _canonical(split: str) -> str:
    low = split.lower()
    return split_names([low])[low] if low in (*TRAIN_NAMES, *HELD_OUT_NAMES) else split


def _mapping(parts: Sequence[tuple[str, Node]]) -> str:
    return "{" + ", ".join(f"{split}: {node.path}" for split, node in parts) + "}"


def _list(names: object) -> str:
    """`a, b, c, ... (9 in all)`."""
    found = [str(name) for name in names]  # type: ignore[attr-defined]
    shown = ", ".join(found[:SHOWN])
    return shown if len(found) <= SHOWN else f"{shown}, ... ({len(found)} in all)"
