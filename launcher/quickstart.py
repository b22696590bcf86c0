"""`make quickstart`: the whole path on real images, in the commands that a user would type.

Converts the handwritten digits, submits a job of two ranks (of one where there is one GPU), kills
one rank with SIGKILL on the way, watches the run resume by itself, and ends with a table. Exits
non-zero where the run does not recover or does not reach 97%.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from launcher.journal.progress import reached
from launcher.watch.status import run_status
from resnet_dist.config.load import load_config
from resnet_dist.run.paths import RunPaths

RECIPE = Path("configs/digits/quickstart.yaml")
DATA = Path("data/digits")
TARGET_TOP1 = 97.0
DEADLINE_S = 600.0
console = Console()


def main() -> int:
    began = time.monotonic()
    if not (DATA / "dataset.json").exists():
        command("convert", "digits", str(DATA))
    command("verify", str(DATA))
    name = time.strftime("quickstart-%Y%m%d-%H%M%S")
    said, here = on_this_machine(usable_gpus())
    console.print(f"\n{said}", highlight=False)
    command("submit", str(RECIPE), f"name={name}", *here, "--local")
    run, config = RunPaths(Path("runs") / name), load_config(RECIPE, here)
    killed_at = watch(run, config.steps)
    return report(run, killed_at, time.monotonic() - began, config.world)


def usable_gpus() -> int:
    """GPUs that torch can use, asked in a child process: the command imports no torch."""
    code = "import torch; print(torch.cuda.is_available() and torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else 0


def on_this_machine(gpus: int) -> tuple[str, list[str]]:
    """What the ranks will compute on, in words and as settings: each takes a GPU of its own."""
    if not gpus:
        return "torch sees no GPU here: two ranks on the CPUs", ["device=cpu"]
    if gpus == 1:
        return ("one GPU, and a rank takes a whole one: one rank instead of two",
                ["device=cuda", "launch.ranks_per_node=1"])
    return f"{gpus} GPUs: two ranks on two of them", ["device=cuda"]


def command(*arguments: str) -> None:
    console.print(f"\n[bold]$ resnet-dist {shlex.join(arguments)}[/]", highlight=False)
    done = subprocess.run([str(Path(sys.executable).with_name("resnet-dist")), *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def watch(run: RunPaths, steps: int) -> int:
    """Show progress until the run ends; kill the last rank once, past a third; the step then."""
    killed_at = -1
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"),
               TextColumn("of {task.total} steps"), TimeElapsedColumn(), TimeRemainingColumn())
    deadline = time.monotonic() + DEADLINE_S
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=steps)
        last_line = 0.0
        while time.monotonic() < deadline:
            status = run_status(run)
            progress.update(bar, completed=status.step, description=status.state)
            if not console.is_terminal and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                console.print(f"{status.state}: step {status.step} of {steps}")
            if status.state in ("finished", "failed", "stopped"):
                return killed_at
            if killed_at < 0 and status.step > steps / 3 and status.worker_pids:
                killed_at = reached(run, 1)
                os.kill(status.worker_pids[-1], signal.SIGKILL)
                progress.console.print(f"[yellow]killed rank {len(status.worker_pids) - 1} with "
                                       f"SIGKILL at step {killed_at}; now hands off[/]")
            time.sleep(0.2)
    console.print(f"[red]the run did not end within {DEADLINE_S:.0f} s[/]")
    return killed_at


def report(run: RunPaths, killed_at: int, seconds: float, ranks: int) -> int:
    """Print the closing table. Returns the exit code: 0 where all that was promised was seen."""
    status = run_status(run)
    top1 = status.top1 or 0.0
    recovered = killed_at >= 0 and status.state == "finished" and status.restarts >= 1
    table = Table(title="quickstart", show_header=False)
    for what, value in {
            "state": status.state + (f": {status.cause}" if status.cause else ""),
            "test accuracy": f"{top1:.2f}% (promised: {TARGET_TOP1:.0f}%)",
            "speed": f"{status.images_per_s or 0:,.0f} images/s on {ranks} rank{'s' * (ranks > 1)}",
            "killed with SIGKILL": f"at step {killed_at}" if killed_at >= 0 else "never",
            "restarts": str(status.restarts), "iterations redone": str(status.redone_steps),
            "run directory": str(run.root), "whole quickstart": f"{seconds:.0f} s",
            "curves": f".venv/bin/resnet-dist tensorboard {run.name}"}.items():
        table.add_row(what, value)
    console.print(table)
    if not recovered:
        console.print(f"[red]the run did not recover; see {run.logs}[/]")
    return 0 if recovered and top1 >= TARGET_TOP1 else 1


if __name__ == "__main__":
    sys.exit(main())
