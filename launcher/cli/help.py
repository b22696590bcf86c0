"""`--help` in rich's colours without all that typer's own needs: markdown, tracebacks, syntax.

Those imports took more than half of the time between the key and the answer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

_CODE = re.compile(r"`([^`]+)`", re.DOTALL)


class Verb(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _show(self, ctx)


class Verbs(TyperGroup):
    """A group of commands with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _show(self, ctx, [(name, _first(self.commands[name].help))
                          for name in self.list_commands(ctx)])


def _show(command: Verb | Verbs, ctx: Any, verbs: Sequence[tuple[str, str]] = ()) -> None:
    console = Console()
    console.print()
    console.print(Text(f" {command.get_usage(ctx)}", "bold"), soft_wrap=True)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        console.print("\n", _styled(" " + " ".join(paragraph.split())), sep="", soft_wrap=True)
    console.print()
    records = [(each.param_type_name, each.get_help_record(ctx))
               for each in command.get_params(ctx)]
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        _panel(console, title, [record for each, record in records if each == kind and record])
    _panel(console, "Commands", verbs)


def _panel(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=max(len(name) for name, _ in rows) < 40)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), _styled(text))
    console.print(Panel(table, title=Text(title), title_align="left", border_style="dim",
                        box=box.ROUNDED if console.encoding.startswith("utf") else box.ASCII))


def _first(text: str | None) -> str:
    """The first paragraph, which says what it is."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _styled(text: str) -> Text:
    """What stands between backticks in colour, without them."""
    found = Text()
    for place, part in enumerate(_CODE.split(text)):
        found.append(part, "cyan" if place % 2 else "")
    return found
