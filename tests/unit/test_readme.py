"""What the README says about the project is so."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


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
    from launcher.cli import app

    verbs = {command.name or command.callback.__name__
             for command in app.registered_commands if command.callback}
    shown = set(re.findall(r"resnet-dist ([a-z]+)\b", README))
    assert shown <= verbs, shown - verbs
