"""Shared by all tests: where the sample images are, and the command as a user calls it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.slurm.cluster import Cluster, why_not


def a_gpu_computes() -> bool:
    """Whether torch sees a GPU. In a container it may, where /proc/driver/nvidia is hidden."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


# Without a GPU, Triton's kernels run in its interpreter; it asks when they are defined.
if not a_gpu_computes():
    os.environ["TRITON_INTERPRET"] = "1"

# A change is judged on the same examples every time; at a desk, new ones are looked for.
hypothesis.settings.register_profile("desk", deadline=None)  # a busy machine proves nothing
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared" / "data"


CLUSTER = {"slurm", "faults"}  # folders whose tests share one cluster


class ByFile(LoadScopeScheduling):
    """With several workers a file stays on one; all that needs SLURM is on one, and starts first.

    Those tests mostly wait, so that the other worker has the machine. (xdist's own groups are lost
    with pytest 9.2, which no longer lets a plugin rename a test: each file's fixtures, and the
    cluster, were made on every worker.)
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "cluster" if CLUSTER & set(path.split("/")) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not CLUSTER & set(item.path.parts))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder with cifar10-jpeg.tar.gz and imagenet-sample-500.tar, beside the checkout."""
    if not SAMPLES.is_dir():
        pytest.skip(f"sample images not found at {SAMPLES}")
    return SAMPLES


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits, converted once for all tests."""
    from data_prep.convert import convert, parse_convert_overrides

    dst = tmp_path_factory.mktemp("digits") / "data"
    convert("digits", dst, parse_convert_overrides([]))
    return dst


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `resnet-dist ARGS...` and return the finished process, output as text."""
    command = Path(sys.executable).with_name("resnet-dist")

    def call(*arguments: str | Path, timeout: float = 120, cwd: Path | None = None,
             env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(command), *map(str, arguments)], capture_output=True, text=True,
                              timeout=timeout, cwd=cwd, env={**os.environ, **(env or {})})

    return call


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster; SLURM_CONF points to it until the session ends. One for all tests.

    Skips, with the reason, where Debian's SLURM packages are missing or the user is not root.
    """
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    with cluster.guarded(), pytest.MonkeyPatch.context() as patch:
        up = cluster.script("up")
        if up.returncode:
            pytest.fail(f"the local SLURM did not start:\n{up.stderr}")
        patch.setenv("SLURM_CONF", str(cluster.prefix / "etc" / "slurm.conf"))
        yield cluster
