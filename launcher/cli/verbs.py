"""The `resnet-dist` command: verbs and their help, nothing else; `data_verbs` and
`bench_verbs` have those on data sets and of bench.

Every verb delegates to one function, imported when the verb runs, so that `--help` stays instant.
Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped before its last step (`train`).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import completion
from launcher.cli.bench_verbs import bench
from launcher.cli.data_verbs import convert, verify
from launcher.cli.words import Allow, Json, Overrides, Recipe, Run, Runs, console, errors, tell

app = typer.Typer(
    name="resnet-dist", no_args_is_help=True, add_completion=True,
    rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Train residual networks on SLURM or on one machine.")

app.command()(convert)
app.command()(verify)


@app.command()
def submit(
    config: Recipe,
    options: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="run here even where SLURM is")] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="show configuration, batch script and cost; queue nothing")] = False,
    sweep: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE,VALUE",
        help="a run for each value, as a job array; repeatable: all combinations")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="runs of the sweep at once")] = None,
    convert: Annotated[str | None, typer.Option(
        metavar="SOURCE", help="make the data set first; options as convert.KEY")
    ] = None,
    evaluate: Annotated[list[str] | None, typer.Option(
        "--eval", metavar="PROTOCOL", help="evaluate when it has finished; repeatable")] = None,
    after: Annotated[list[str] | None, typer.Option(
        metavar="RUN", help="start when this run, or job, has ended well")] = None,
    trust_slurm: Annotated[bool, typer.Option(
        "--trust-slurm", help="leave it to SLURM whether the cluster can do it")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe, freeze a run directory, and queue the job.

    Examples:

    `resnet-dist submit configs/cifar10/resnet20.yaml data=data/cifar10 launch.nodes=2`

    `resnet-dist submit configs/imagenet/resnet50_he2015.yaml data=data/imagenet cluster=gpu
    --dry-run`

    `resnet-dist submit configs/cifar10/resnet20.yaml data=data/cifar10 --sweep seed=0,1,2,3`

    `resnet-dist submit configs/digits/quickstart.yaml data=data/digits --convert digits
    --eval 1crop`
    """
    from launcher.submission import campaign, preflight

    order = preflight.Order(
        config, tuple(options or ()), local=local, sweep=tuple(sweep or ()), parallel=parallel,
        convert=convert, evaluate=tuple(evaluate or ()), after=tuple(after or ()),
        trust_slurm=trust_slurm)
    if dry_run:
        preflight.show(console, campaign.plan_order(order), as_json=as_json)
        return
    submitted = campaign.submit_order(order)
    if as_json:
        for each in submitted:  # one object a run
            print(json.dumps(each.as_json()))
    else:
        campaign.show(console, submitted)


@app.command()
def train(
    config: Recipe,
    options: Overrides = None,
    allow: Allow = "",
    as_json: Json = False,
) -> None:
    """Train in the foreground; also one rank of `torchrun --no-python resnet-dist train CONFIG`.

    Running the same command again resumes.

    Example: `resnet-dist train configs/digits/quickstart.yaml data=data/digits`
    """
    from launcher.foreground import train_here

    raise typer.Exit(train_here(config, options or [], _words(allow), as_json=as_json))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(
        metavar="[RUN]", help="one run in detail",
        autocompletion=completion.run_names)] = None,
    watch: Annotated[bool, typer.Option(
        "--watch", help="refresh until it, and evaluations queued behind it, have ended")] = False,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """What is running, where, how fast, until when.

    Example: `resnet-dist status resnet50 --watch`
    """
    from launcher.watch.show import show_status

    raise typer.Exit(show_status(console, run, Path(runs), watch=watch, as_json=as_json))


@app.command()
def logs(
    run: Run,
    rank: Annotated[list[int] | None, typer.Option(help="only this; repeatable")] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX")] = None,
    since: Annotated[str | None, typer.Option(
        help="an age such as 10m, 2h or 1d, or a moment '2026-11-21 11:30'")] = None,
    level: Annotated[str | None, typer.Option(help="warning: those and errors")] = None,
    attempt: Annotated[int | None, typer.Option(help="only this")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing")] = False,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Print a run's logs, merged by time, each line with its rank.

    Example: `resnet-dist logs resnet50 --level warning --since 2h`
    """
    from launcher.frozen.freeze import find_run
    from launcher.watch.logs import print_logs

    print_logs(console, find_run(run, runs), ranks=rank or (), grep=grep, since=since, level=level,
               attempt=attempt, follow=follow, as_json=as_json)


@app.command()
def compare(
    first: Run,
    others: Annotated[list[str], typer.Argument(
        metavar="RUN ...", help="to lay beside it", autocompletion=completion.run_names)],
    curve: Annotated[str, typer.Option(help="loss, top1, images_per_s, ...")] = "loss",
    png: Annotated[Path | None, typer.Option(help="draw the curves to this file")] = None,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """What differs between runs: settings, results, curves.

    Example: `resnet-dist compare resnet20 plain20 --curve top1 --png curves.png`
    """
    from launcher.frozen.freeze import find_run
    from launcher.watch.compare import compare_runs

    compare_runs(console, [find_run(name, runs) for name in (first, *others)], curve, png,
                 as_json=as_json)


@app.command()
def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="kill without a checkpoint")] = False,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Save a checkpoint and end the job; `resume` continues it.

    Example: `resnet-dist stop resnet50`
    """
    from launcher.frozen.freeze import find_run
    from launcher.submission.control import stop

    done = stop(find_run(run, runs), now=now)
    tell(as_json, {"run": run, "done": done}, done)


@app.command()
def resume(run: Run, options: Overrides = None,
           local: Annotated[bool, typer.Option("--local", help="run here")] = False,
           code: Annotated[str, typer.Option(
               help="frozen: as it was submitted; current: as installed now")] = "frozen",
           allow: Allow = "",
           runs: Runs = "runs",
           as_json: Json = False) -> None:
    """Continue a run from its newest checkpoint, on other nodes or for more steps.

    Example: `resnet-dist resume resnet50 steps=700000 launch.nodes=4`
    """
    from launcher.frozen.freeze import find_run
    from launcher.submission.control import resume

    found = find_run(run, runs)
    job = resume(found, options or [], local=local, code=code, allow=_words(allow))
    tell(as_json, {"run": str(found.root), "job": job}, f"[green]resumed[/]  job {job}")


@app.command("eval")
def evaluate(
    run: Run,
    step: Annotated[int | None, typer.Option(help="checkpoint; default newest")] = None,
    split: Annotated[str | None, typer.Option(help="default: the run's")] = None,
    protocol: Annotated[str | None, typer.Option(
        help="1crop, flip, 10crop or multiscale; default: the run's")] = None,
    size: Annotated[int | None, typer.Option(help="pixels of the square crop")] = None,
    resize: Annotated[int | None, typer.Option(
        help="shorter side before the crop; 0: the image as it is")] = None,
    weights: Annotated[str | None, typer.Option(
        help="raw or ema; default: ema where the run averages its weights")] = None,
    batch_size: Annotated[int | None, typer.Option(
        help="images of one rank in one forward")] = None,
    ensemble: Annotated[list[str] | None, typer.Option(
        metavar="RUN[@STEP]", help="average with this run too; repeatable")] = None,
    responses: Annotated[bool, typer.Option(
        "--responses", help="also measure how strongly each layer responds")] = False,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on every validation image; report in RUN/eval and TensorBoard.

    Several ranks: `torchrun --nproc-per-node 8 --no-python resnet-dist eval RUN`

    Example: `resnet-dist eval resnet50 --protocol 10crop --ensemble resnet101`
    """
    from launcher.foreground import evaluate_here

    result = evaluate_here(run, runs, step=step, split=split, protocol=protocol, size=size,
                           resize=resize, weights=weights, batch_size=batch_size,
                           ensemble=tuple(ensemble or ()), responses=responses)
    if result is None:
        return  # torchrun's other ranks: rank 0 tells
    low, high = result["top1_interval"]
    low5, high5 = result["top5_interval"]
    tell(as_json, result,
         f"{' + '.join(result['members'])}, {result['protocol']} of {result['split']}: top-1 "
         f"[bold]{result['top1']:.2f}%[/] ({low:.2f} to {high:.2f}), top-5 {result['top5']:.2f}% "
         f"({low5:.2f} to {high5:.2f}), loss {result['loss']:.4f}, calibration error "
         f"{result['ece']:.2f}% over {result['samples']:,} images; intervals at 95%\n"
         f"report  {result['report']}")


@app.command()
def tensorboard(
    names: Annotated[list[str] | None, typer.Argument(
        metavar="[RUN ...]", autocompletion=completion.run_names)] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 6006,
    everyone: Annotated[bool, typer.Option(
        "--everyone", help="listen beyond localhost: no password guards it")] = False,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Show curves in a browser; on localhost only. Over SSH it prints the tunnel command.

    Example: `resnet-dist tensorboard resnet20 plain20 --port 6007`
    """
    from launcher.watch.board import run_tensorboard

    raise typer.Exit(run_tensorboard(console, names or [], runs, port, everyone=everyone,
                                 as_json=as_json))


@app.command()
def export(
    run: Run,
    form: Annotated[str, typer.Option("--format", help="torchvision, timm, safetensors or onnx")],
    out: Annotated[Path, typer.Option(help="file to write")],
    step: Annotated[int | None, typer.Option(help="checkpoint; default newest")] = None,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights for another program.

    Example: `resnet-dist export resnet50 --format onnx --out resnet50.onnx`
    """
    from launcher.foreground import export_here

    written = export_here(run, runs, form, out, step)
    tell(as_json, {"file": str(out), "step": written},
         f"[green]written[/]  {out}, weights of step {written}")


@app.command()
def doctor(
    options: Annotated[list[str] | None, typer.Argument(
        metavar="[key=value ...]", help="with --slurm: settings of the job, e.g. launch.nodes=2",
        autocompletion=completion.settings)] = None,
    slurm: Annotated[bool, typer.Option(
        "--slurm", help="examine nodes of the cluster, and what is between them")] = False,
    data: Annotated[str | None, typer.Option(help="a data set to look at, too")] = None,
    model: Annotated[str | None, typer.Option(
        help="show a network instead: layers, sizes, parameters, FLOPs")] = None,
    as_json: Json = False,
) -> None:
    """Is this machine ready: native libraries, packages, GPU, SLURM, file system, data set.

    Examples:

    `resnet-dist doctor --data data/imagenet`

    `resnet-dist doctor --slurm cluster=gpu launch.nodes=2`
    """
    from launcher.foreground import doctor_here

    raise typer.Exit(doctor_here(console, options or [], slurm=slurm, data=data, model=model,
                                 as_json=as_json))


app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # LC_ALL=C: a class may be called 猫
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except (ValueError, RuntimeError) as error:
        # Late imports: `--help` need not wait for them.
        from rich.markup import escape

        from data_prep.conversion.pool import ConvertError
        from resnet_dist.config.schema import ConfigError

        if not isinstance(error, (ConfigError, ConvertError)):
            raise
        for line in str(error).splitlines():
            errors.print(f"[red]error[/]  {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
