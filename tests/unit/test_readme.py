"""What the README says about the project is so."""

import itertools
import re
from pathlib import Path

import pytest

from resnet_dist.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAPERS = (ROOT / "docs" / "papers.md").read_text()


def expand(pattern: str) -> set[str]:
    """`a{1,2}{x,y}` -> a1x, a1y, a2x, a2y."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return {"".join(words) for words in itertools.product(*choices)}


def test_the_recipes_table_lists_every_recipe_and_no_other() -> None:
    table = README.split("| recipes in `configs/` |")[1].split("\n\n")[0]
    listed = set().union(*(expand(name) for name in re.findall(r"^\| `([^`]+)`", table, re.M)))
    present = {str(path.relative_to(ROOT / "configs").with_suffix(""))
               for path in (ROOT / "configs").rglob("*.yaml")}
    assert listed == present


def test_every_link_and_file_it_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_verb_it_shows_exists() -> None:
    from launcher.cli.verbs import app

    verbs = {command.name or command.callback.__name__
             for command in app.registered_commands if command.callback}
    shown = set(re.findall(r"resnet-dist ([a-z]+)\b", README))
    assert shown <= verbs, shown - verbs


def test_every_recipe_that_the_papers_guide_names_exists() -> None:
    present = {path.stem for path in (ROOT / "configs").rglob("*.yaml")}
    named = set()
    for word in re.findall(r"`([^` ]+)`", PAPERS):
        if word.startswith("configs/") or re.search(r"_(he201|goyal|ffcv|torchvision|timm)", word):
            files = expand(word)
            named |= {Path(file).stem for file in files}
            assert all((ROOT / file).exists() for file in files if "/" in file), word
    assert named <= present, named - present
    assert len(named) > 40


@pytest.mark.parametrize("row", ["table 1, shortcuts", "table 2, activations"])
def test_the_experiments_of_2016_that_the_papers_guide_names_are_accepted(row: str) -> None:
    line, = (line for line in PAPERS.splitlines() if line.startswith(f"| {row}"))
    key, first = re.findall(r"`(model\.(?!gate)\w+)=(\w+)`", line)[0]
    values = [first, *re.findall(r"`(\w+)`", line.split(f"{key}={first}`")[1])]
    assert len(values) >= 4
    for value in values:
        gate = ["model.gate_bias=-6"] if value.endswith("gating") else []
        config = load_config(ROOT / "configs/cifar10/resnet110_he2016.yaml",
                             [f"{key}={value}", *gate])
        assert value in (config.model.shortcut, config.model.activation)


def test_every_door_that_the_architecture_page_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = [word for word in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page)
             if not word.endswith((".py", ".md", ".json", ".jsonl", ".cpp"))]
    assert len(named) >= 20
    for word in named:
        places = [ROOT.joinpath(package, *word.split(".")) for package in
                  ("", "launcher", "data_prep", "resnet_dist")]
        if any(place.is_dir() or place.with_suffix(".py").is_file() for place in places):
            continue  # a room or a file
        name = word.rpartition(".")[2]
        files = [file for place in places if (file := place.parent.with_suffix(".py")).is_file()]
        assert any(re.search(rf"^(?:def|class) {name}\b", file.read_text(), re.M)
                   for file in files), f"{word}: not in {files}"
