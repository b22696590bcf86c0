"""`resnet-dist bench ...`: what can be measured, and its help, nothing else; see `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.words import Json, console

bench = typer.Typer(no_args_is_help=True, help="Measure, side by side with the usual choice.")


def _words(context: typer.Context, *left_out: str) -> list[str]:
    """The options as words for the program that measures; what is off or unset stays out."""
    words = []
    for name, value in context.params.items():
        if name not in ("as_json", *left_out) and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@bench.command("convert")
def bench_convert(
    source: Annotated[str, typer.Argument(help="images, repeated to --images")],
    images: int = 5000,
    workers: int = 2,
    repeats: int = 3,
    case: Annotated[str | None, typer.Option(help="mixed or encode alone")] = None,
    scratch: Annotated[Path | None, typer.Option(help="folder to work in")] = None,
    as_json: Json = False,
) -> None:
    """Conversion beside FFCV's own DatasetWriter.

    Example: `resnet-dist bench convert photos/ --workers 4`
    """
    from launcher.bench import convert_beside_ffcv

    convert_beside_ffcv(console, source, scratch, images=images, workers=workers, repeats=repeats,
                        case=case, as_json=as_json)


@bench.command("loader")
def bench_loader(
    context: typer.Context,
    dataset: Annotated[Path, typer.Argument(help="data set directory with JPEG shards")],
    size: Annotated[int, typer.Option(help="pixels")] = 224,
    threads: int = 2,
    rounds: int = 5,
    images: Annotated[int, typer.Option(help="of one loader in one round")] = 1536,
    sheet: Annotated[Path | None, typer.Option(help="also draw crops to a PNG")] = None,
    as_json: Json = False,
) -> None:
    """Our loader beside stock FFCV's and a folder of files.

    Example: `resnet-dist bench loader data/imagenet --threads 8`
    """
    from launcher.bench import loaders_side_by_side

    loaders_side_by_side(console, dataset, _words(context, "dataset"), as_json=as_json)


@bench.command("step")
def bench_step(
    context: typer.Context,
    model: str = "resnet50",
    batch: Annotated[int, typer.Option(help="images of one step")] = 32,
    bn_batch: Annotated[int, typer.Option(help="ours: images a BatchNorm")] = 32,
    size: Annotated[int, typer.Option(help="pixels")] = 224,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32; auto")] = "auto",
    rounds: int = 5,
    steps: Annotated[int, typer.Option(help="of one competitor in one round")] = 3,
    account: Annotated[bool, typer.Option(
        "--account", help="count launches and bytes instead; no GPU needed")] = False,
    tb_per_s: Annotated[float, typer.Option(help="account: of a copy")] = 4.3,
    tflops: Annotated[float, typer.Option(help="account: of a product")] = 790,
    launch_us: Annotated[float, typer.Option(help="account: at least")] = 2.2,
    as_json: Json = False,
) -> None:
    """The training step beside torch's own: eager, channels_last, compiled; and the floor.

    Example, on an H200: `resnet-dist bench step --batch 256 --steps 20`
    """
    from launcher.bench import step_account, step_beside_torch

    if account:
        network = _words(context, "account", "rounds", "steps", "tb_per_s", "tflops")
        return step_account(console, [*network, "--bytes-per-s", str(1e12 * tb_per_s),
                                      "--flops-per-s", str(1e12 * tflops)], as_json=as_json)
    words = _words(context, "account", "tb_per_s", "tflops", "launch_us")
    step_beside_torch(console, words, as_json=as_json)


@bench.command("kernels")
def bench_kernels(
    context: typer.Context,
    batch: int = 32,
    bn_batch: int = 32,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32; auto")] = "auto",
    rounds: int = 5,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile, too")] = False,
    compile_only: Annotated[bool, typer.Option(
        "--compile-only", help="registers and spills of every kernel; no GPU needed")] = False,
    as_json: Json = False,
) -> None:
    """Each kernel beside its plain formulation, with the share of a copy's speed.

    Example: `resnet-dist bench kernels --batch 64 --precision bf16`
    """
    from launcher.bench import kernels_beside_torch, kernels_compiled

    if compile_only:
        return kernels_compiled(console, as_json=as_json)
    kernels_beside_torch(console, _words(context), as_json=as_json)


@bench.command("scaling")
def bench_scaling(
    context: typer.Context,
    plan: Annotated[bool, typer.Option("--plan", help="8 to 4,096 GPUs; measures nothing")] = False,
    worlds: Annotated[str, typer.Option(help="ranks to fit the model to")] = "1,2,4",
    unseen: Annotated[str, typer.Option(help="ranks to judge it on")] = "8",
    rounds: int = 2,
    figure: Annotated[Path | None, typer.Option(help="also draw a PNG")] = None,
    as_json: Json = False,
) -> None:
    """Weak and strong scaling on this machine's ranks, or a plan for many GPUs.

    Example: `resnet-dist bench scaling --plan`
    """
    from launcher.bench import scaling_here

    scaling_here(console, _words(context), planned=plan, as_json=as_json)


@bench.command("save")
def bench_save(
    context: typer.Context,
    model: str = "resnet50",
    size: Annotated[int, typer.Option(help="pixels of the made-up images")] = 64,
    batch_size: int = 32,
    rounds: Annotated[int, typer.Option(help="saves in each way")] = 5,
    scratch: Annotated[Path | None, typer.Option(help="folder to save in")] = None,
    as_json: Json = False,
) -> None:
    """Saving in the background beside saving while the step waits.

    Example: `resnet-dist bench save --model resnet50 --scratch /scratch`
    """
    from launcher.bench import saves_side_by_side

    saves_side_by_side(console, scratch, _words(context, "scratch"), as_json=as_json)
