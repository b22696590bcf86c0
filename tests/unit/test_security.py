"""What SECURITY.md says of the whole product, and not of one room."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.slurm import private_folder
from launcher.job import RunFailed, TrainJob
from launcher.submission.submit import prepare
from resnet_dist.config.schema import ConfigError
from resnet_dist.run.paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("launcher", "resnet_dist", "data_prep")
# Their loads run code; tarfile's extraction has followed links out of its folder again and again.
RUNS_CODE = ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "tarfile")
# CIFAR's archives; tests/unit/data_prep/sources/test_sources.py
UNPICKLES_ARRAYS_ALONE = "data_prep/sources/arrays.py"


def source_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that may run code out of data, or pass words to a shell."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {each.arg: each.value for each in node.keywords}
        told = {key: ast.unparse(value) for key, value in options.items()}
        if (name in ("eval", "exec", "os.system", "os.popen")
                or told.get("shell", "False") != "False"
                or (name == "torch.load" and told.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load")
                    and told.get("allow_pickle", "False") != "False")
                or (name.startswith("yaml.") and "load" in name and name != "yaml.safe_load"
                    and told.get("Loader") not in ("_LOADER", "yaml.SafeLoader"))):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("text", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "eval(text)",
    "np.load(path, allow_pickle=True)", "yaml.load(text)", "yaml.full_load(text)",
    "yaml.load(text, Loader=yaml.Loader)", "subprocess.run(text, shell=True)", "os.system(text)"])
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert list(unsafe_calls(ast.parse(text)))


def test_nothing_is_loaded_in_a_way_that_runs_code() -> None:
    found = [f"{path.relative_to(ROOT)}, {call}" for path in source_files()
             for call in unsafe_calls(ast.parse(path.read_text()))]
    assert not found


def test_only_the_reader_of_cifars_archives_knows_pickles() -> None:
    users = set()
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in RUNS_CODE for name in names):
                users.add(str(path.relative_to(ROOT)))
    assert users == {UNPICKLES_ARRAYS_ALONE}


def test_torch_is_past_the_ways_around_weights_only() -> None:
    """CVE-2026-24747 was open before 2.10."""
    found = re.search(r'"torch>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    assert (int(found[1]), int(found[2])) >= (2, 10)


@pytest.mark.parametrize("which", ["root", "submitit"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_job_runs_nothing_that_others_could_have_written(
        which: str, mode: int, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    run.root.mkdir(mode=0o700)
    prepare(run)
    getattr(run, which).chmod(mode)
    with pytest.raises(RunFailed, match=r"must belong to uid .* writable by nobody"):
        TrainJob(str(run.root))()


def test_a_job_runs_nothing_of_another_owner(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a folder away")
    run = RunPaths(tmp_path / "run")
    run.root.mkdir(mode=0o700)
    prepare(run)
    os.chown(run.submitit, 12345, 12345)
    with pytest.raises(RunFailed, match="it belongs to uid 12345"):
        TrainJob(str(run.root))()


def test_a_conversions_calls_lie_in_a_folder_of_its_owner_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "dst")
    assert folder.stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to uid 12345"):
            private_folder(tmp_path / "dst")
