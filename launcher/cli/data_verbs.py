"""`resnet-dist convert` and `verify`: their words and what they print; see `verbs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from launcher.cli.words import Json, Overrides, console, errors, rows


def convert(
    source: Annotated[str, typer.Argument(help="class-folder tree, tar of one, or `digits`")],
    dst: Annotated[Path, typer.Argument(help="data set directory to write")],
    options: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="as a job array")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show how SOURCE is read; no more")]
    = False,
    as_json: Json = False,
) -> None:
    """Convert images to FFCV shards. The same command again finishes a killed conversion.

    Example: `resnet-dist convert imagenet/ data/imagenet workers=8`
    """
    import logging
    from contextlib import nullcontext

    from data_prep.conversion.account import account
    from data_prep.conversion.shown import lines
    from data_prep.convert import convert, parse_convert_overrides, planned
    from data_prep.slurm import convert_slurm
    from launcher.submission.submit import outside_any_job

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress off a terminal
    checked = parse_convert_overrides(options or [])

    def tell(plan: dict[str, Any]) -> None:
        if not as_json:
            rows(lines(plan))

    if dry_run:
        plan = planned(source, dst, checked)
        print(json.dumps(plan)) if as_json else tell(plan)
        return
    with outside_any_job() if slurm else nullcontext():
        manifest = (convert_slurm if slurm else convert)(source, dst, checked, progress=True,
                                                         tell=tell)
    assert manifest is not None, "it waited"
    if as_json:
        print(json.dumps({"dataset": str(dst), "classes": manifest.num_classes, "splits": {
            name: split.samples for name, split in manifest.splits.items()}}))
        return
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    console.print(f"[green]done[/]  {dst}: {counts} images in {manifest.num_classes} classes")
    for line in account(manifest):
        console.print(f"      {line}", markup=False, highlight=False, soft_wrap=True)


def verify(
    dst: Annotated[Path, typer.Argument(help="data set directory")],
    deep: Annotated[bool, typer.Option("--deep", help="decode every image")] = False,
    as_json: Json = False,
) -> None:
    """Check every shard of a data set: headers, bounds, hashes; with --deep every image.

    Example: `resnet-dist verify data/imagenet --deep`
    """
    from data_prep.verify import verify

    report = verify(dst, deep=deep)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        rows(report.summary_rows())
        for warning in report.warnings:
            errors.print(f"[yellow]warning[/]  {escape(warning)}", soft_wrap=True)
        for problem in report.problems:
            errors.print(f"[red]problem[/]  {escape(problem)}")
    raise typer.Exit(1 if report.problems else 0)
