"""Whether what a source was read as makes sense to learn from.

In: images by split and class. Out: warnings; or a refusal that names what is odd and the word of
`accept` that takes it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.sources.found import SourceError, is_machine_folder, printable, split_words
from data_prep.sources.readings import IMAGE_FOLDERS, Place

ODD_NAMES = IMAGE_FOLDERS | {"annotations", "imagesets", "labels", "data", "masks"}
SHOWN = 5  # names in a message


def judge(counts: Mapping[str, np.ndarray], classes: Sequence[str], empty: Sequence[Place],
          accept: Sequence[str], name: str, *, appended: bool, named: bool) -> list[str]:
    """Warnings. counts: int64 [classes] of every split.

    Args:
        appended: other splits are there already.
        named: somebody has said that these are the classes; folders alone have not.

    Raises: SourceError with one line a thing that makes no sense.
    """
    problems: list[str] = []

    def refuse(word: str, what: str) -> None:
        if word not in accept:
            problems.append(f"SOURCE = {name}: {what}; accept=[{word}] takes it as it is")

    # A class that only an empty folder names has no label; with images elsewhere it is told below.
    without = sorted({printable(place.class_name) for place in empty} - {
        each for label, each in enumerate(classes) if any(of[label] for of in counts.values())})
    if without:
        refuse("empty_classes", f"the folders of {_some(without)} hold no images, and nothing can "
                                "be learnt of such a class: remove them or fill them")
    first = "train" if "train" in counts else next(iter(counts))
    sizes = np.sum(list(counts.values()), axis=0)
    total, present = int(sizes.sum()), int((sizes > 0).sum())
    if len(classes) == 1:
        refuse("one_class", f"all {total} images are of one class, {classes[0]!r}: nothing can be "
                            "told apart. Is there a folder too many above the classes "
                            "(class_depth=2), or are labels in a file (labels=FILE) or in the "
                            "names (label_from=REGEX)?")
    elif total < 2 * present:
        refuse("few_images", f"{total} images in {present} classes: fewer than two a class. Are "
                             "the folders classes?")
    odd = [each for each in classes if is_machine_folder(each) or each.lower() in ODD_NAMES
           or split_words(each, exact=True)]
    if odd and not named:
        refuse("odd_names", f"{_some(odd)} look like splits or parts of a data set, not like "
                            "classes; splits={train: DIR, val: DIR} says what is what")
    for split, of in counts.items():
        if len(classes) > 1 and int((of > 0).sum()) == 1 and int(of.sum()) > 1:
            refuse("one_class", f"all {int(of.sum())} images of {split} are of class "
                                f"{classes[int(np.argmax(of))]!r}")
        if split == first or appended:
            continue
        unseen = (of > 0) & (counts[first] == 0)
        unknown = [classes[label] for label in np.flatnonzero(unseen).tolist()]
        if unknown:
            refuse("unequal_classes", f"{split} has classes of which {first} has no image: "
                                      f"{_some(unknown)}; what is never seen cannot be told")
    if problems:
        raise SourceError("\n".join(problems))
    warnings = [f"class {each!r} has no images" for each in without[:SHOWN]]
    for split, of in counts.items():
        lacking = [classes[label] for label in np.flatnonzero(of == 0).tolist()]
        if lacking and len(counts) > 1:
            warnings.append(f"{split} has no image of {_some(lacking)}")
    return warnings


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names[:SHOWN]))
    return listed if len(names) <= SHOWN else f"{listed}, ... ({len(names)} in all)"
