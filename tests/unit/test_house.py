"""The house keeps its shape: which room may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("launcher", "resnet_dist", "data_prep")


def imports() -> list[tuple[str, str]]:
    """(module, imported module) for every import statement of the product."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found += [(module, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{module}: relative import"
                    found.append((module, node.module or ""))
                    found += [(module, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def in_room(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_resnet_dist_imports_neither_launcher_nor_data_prep() -> None:
    bad = [pair for pair in imports() if in_room(pair[0], "resnet_dist")
           and (in_room(pair[1], "launcher") or in_room(pair[1], "data_prep"))]
    assert not bad


@pytest.mark.parametrize("room", ["launcher", "data_prep"])
def test_outer_rooms_use_only_the_torch_free_front_of_resnet_dist(room: str) -> None:
    allowed = ("resnet_dist.config", "resnet_dist.run.paths", "resnet_dist.run.curves",
               "resnet_dist.run.lease", "resnet_dist.run.rollback",
               "resnet_dist.data.shards.manifest", "resnet_dist.data.shards.digest",
               "resnet_dist.models.catalog")
    bad = [pair for pair in imports()
           if in_room(pair[0], room) and in_room(pair[1], "resnet_dist")
           and not any(in_room(pair[1], front) for front in allowed)
           and not any(front.startswith(pair[1] + ".") for front in allowed)]
    assert not bad


def test_kernels_import_only_torch_triton_numpy() -> None:
    own = {"torch", "triton", "numpy", "resnet_dist"}
    bad = [pair for pair in imports() if in_room(pair[0], "resnet_dist.kernels")
           and pair[1].split(".")[0] not in own | set(sys.stdlib_module_names)]
    bad += [pair for pair in imports() if in_room(pair[0], "resnet_dist.kernels")
            and in_room(pair[1], "resnet_dist") and not in_room(pair[1], "resnet_dist.kernels")]
    assert not bad


def test_the_command_and_the_login_node_modules_import_no_torch() -> None:
    code = ("import sys, launcher.cli.verbs, launcher.submission.submit, launcher.job, "
            "launcher.watch.status, launcher.frozen.freeze, launcher.foreground, "
            "resnet_dist.data.shards.manifest; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
