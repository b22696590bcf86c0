"""A validation error in a user's words: key, value, what is wrong, the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, get_type_hints

from pydantic import ValidationError


def explain(error: ValidationError, root: type) -> str:
    """One line a problem that pydantic found in a tree of `Section`s whose top is `root`."""
    return "\n".join(_explain(problem, root) for problem in error.errors())


def _explain(problem: Any, root: type) -> str:
    location = [str(part) for part in problem["loc"]]
    key, value = ".".join(location), problem["input"]
    if problem["type"] == "unexpected_keyword_argument":
        owner: Any = root
        for part in location[:-1]:
            owner = get_type_hints(owner)[part]
        valid = [f.name for f in dataclasses.fields(owner)]
        near = nearest(location[-1], valid)
        if owner is root and (inside := _sections_with(location[0], root)):
            near = f"; did you mean {' or '.join(inside)}?"
        return f"{key} = {_short(value)}: unknown key{near}"
    message = problem["msg"].removeprefix("Input ")
    return f"{key} = {_short(value)}: {message}"


def _sections_with(key: str, root: type) -> list[str]:
    """`lr` -> `["optimizer.lr"]`: where a key stands that was written without its section."""
    sections = {name: kind for name, kind in get_type_hints(root).items()
                if dataclasses.is_dataclass(kind)}
    return [f"{name}.{key}" for name, kind in sections.items()
            if key in (each.name for each in dataclasses.fields(kind))]


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of a refusal: what was probably meant, or all that there is."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"
