"""`resnet-dist tensorboard`: curves and pictures in a browser, for this user alone.

TensorBoard has no passwords: whoever reaches its port reads every run. So it listens on localhost,
and over SSH a tunnel leads there.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from launcher.frozen.freeze import find_run
from resnet_dist.config.schema import ConfigError


def run_tensorboard(console: Console, names: list[str], runs: str, port: int, *,
                    everyone: bool = False, as_json: bool = False) -> int:
    """TensorBoard over the named runs (all of them where none is), until Ctrl-C or SIGTERM.

    Args:
        everyone: listen on every interface, for whoever reaches this machine.
        as_json: tell address and tunnel in one object.

    Raises: ConfigError where a run is not there or the port is taken.
    """
    where = _log_folders(names, runs)
    host = "0.0.0.0" if everyone else "localhost"
    _check_free(host, port)
    command = "" if everyone else tunnel(dict(os.environ), port)
    address = f"http://{platform.node() if everyone else 'localhost'}:{port}"
    if as_json:
        sys.stdout.write(json.dumps({"address": address, "tunnel": command or None,
                                     "everyone": everyone}) + "\n")
        sys.stdout.flush()
    else:
        if everyone:
            console.print(f"[bold red]warning[/]  listening on every interface of "
                          f"{platform.node()}, without a password: whoever reaches port {port} "
                          "reads these runs", soft_wrap=True)
        elif command:
            console.print(f"on your own machine:  {command}", highlight=False, soft_wrap=True)
        console.print(f"then open  {address}", highlight=False)
    command_line = [sys.executable, "-m", "tensorboard.main", *where, "--port", str(port),
                    "--host", host]
    with subprocess.Popen(command_line) as board:
        usual = signal.signal(signal.SIGTERM, lambda *_: board.terminate())
        try:
            return max(board.wait(), 0)
        except KeyboardInterrupt:
            return 0
        finally:
            signal.signal(signal.SIGTERM, usual)


def tunnel(environment: dict[str, str], port: int) -> str:
    """What to type at home to reach `port` of this machine's localhost; "" where one sits at it.

    Inside an allocation the way to the node leads over the host that the job was submitted from.
    """
    user = environment.get("USER") or "USER"
    forward = f"ssh -N -L {port}:localhost:{port}"
    if "SLURM_JOB_ID" in environment and "SLURM_SUBMIT_HOST" in environment:
        here = environment.get("SLURMD_NODENAME") or platform.node()
        login = environment["SLURM_SUBMIT_HOST"]
        if here != login:
            return f"{forward} -J {user}@{login} {user}@{here}"
    connection = environment.get("SSH_CONNECTION", "").split()
    if not connection:
        return ""
    address = connection[2] if len(connection) == 4 else platform.node()
    return f"{forward} {user}@{address}"


def _log_folders(names: list[str], runs: str) -> list[str]:
    if not names:
        if not Path(runs).is_dir():
            raise ConfigError(f"--runs = {runs}: no such folder; name one that holds runs")
        return ["--logdir", runs]
    named = [find_run(name, runs) for name in names]
    return ["--logdir_spec", ",".join(f"{run.name}:{run.tensorboard}" for run in named)]


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise ConfigError(f"--port = {port}: cannot be opened ({error.strerror}); name "
                              f"another, e.g. --port {port + 1}") from None
