"""What the verbs share: arguments with their help and completion, and where they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.cli import completion

console = Console()
errors = Console(stderr=True)



def tell(as_json: bool, facts: object, words: str) -> None:
    """What a verb has done: for a script on one line, else in words."""
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        console.print(words, highlight=False, soft_wrap=True)


def rows(pairs: Iterable[tuple[str, object]]) -> None:
    """What is what, a line each."""
    for what, value in pairs:
        console.print(f"{what:>12}  {value}", highlight=False, markup=False, soft_wrap=True)


Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="a recipe from configs/",
                                        autocompletion=completion.recipes)]
Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[key=value ...]", help="settings laid over the recipe",
    autocompletion=completion.settings)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run's name under --runs, or its path",
                                    autocompletion=completion.run_names)]
Runs = Annotated[str, typer.Option("--runs", help="folder that holds the run directories")]
Allow = Annotated[str, typer.Option("--allow", metavar="KIND[,KIND]", help=(
    "go on though config, code, data or (resume) schedule is not what the run recorded"))]
Json = Annotated[bool, typer.Option("--json", help="print JSON for a script")]
