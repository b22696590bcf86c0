"""The house keeps its shape: rooms, their faces, and which room may import which."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PRODUCT = ("launcher", "resnet_dist", "data_prep")

# All arrows between rooms: who may import whom. A room is a folder; a file beside the rooms, such
# as resnet_dist/train.py, is a room of its own. Short names are of the same package.
ARROWS = {
    "resnet_dist.config": "models.catalog",
    "resnet_dist.run": "",
    "resnet_dist.ranks": "config",
    "resnet_dist.kernels": "kernels.gpu",
    "resnet_dist.kernels.gpu": "",
    "resnet_dist.models": "kernels models.catalog",
    "resnet_dist.models.catalog": "",
    "resnet_dist.models.analysis": "models models.catalog",
    "resnet_dist.data": "config data.augmentation data.decode data.shards run",
    "resnet_dist.data.augmentation": "config data.decode data.shards run",
    "resnet_dist.data.decode": "",
    "resnet_dist.data.shards": "config run",
    "resnet_dist.engine": "config data.augmentation kernels models ranks run",
    "resnet_dist.evaluate": "build config data data.decode data.shards engine models "
                            "models.analysis ranks run",
    "resnet_dist.watch": "config data data.shards engine evaluate models models.analysis run",
    "resnet_dist.build": "config data data.augmentation data.shards models ranks run",
    "resnet_dist.train": "build config data data.augmentation data.shards engine evaluate ranks "
                         "run watch",
    "resnet_dist.bench": "config data data.augmentation data.decode data.shards engine kernels "
                         "models ranks run",
    "data_prep.sources": "",
    "data_prep.shards": "resnet_dist.data.shards resnet_dist.run",
    "data_prep.encode": "sources resnet_dist.data.shards",
    "data_prep.options": "resnet_dist.config",
    "data_prep.conversion": "encode options shards sources resnet_dist.data.shards "
                            "resnet_dist.run",
    "data_prep.convert": "conversion encode options sources resnet_dist.config "
                         "resnet_dist.data.shards resnet_dist.run",
    "data_prep.slurm": "conversion convert options resnet_dist.config resnet_dist.data.shards "
                       "resnet_dist.run",
    "data_prep.verify": "conversion encode resnet_dist.config resnet_dist.data.shards "
                        "resnet_dist.run",
    "data_prep.bench": "conversion convert sources",
    "launcher.journal": "resnet_dist.run",
    "launcher.frozen": "journal resnet_dist.config resnet_dist.data.shards resnet_dist.run",
    "launcher.slurm": "frozen resnet_dist.config resnet_dist.run",
    "launcher.supervise": "journal slurm resnet_dist.config resnet_dist.run",
    "launcher.watch": "frozen journal slurm supervise resnet_dist.config resnet_dist.run",
    "launcher.job": "frozen journal slurm supervise resnet_dist.config resnet_dist.run",
    "launcher.submission": "frozen job journal slurm supervise watch data_prep.convert "
                           "data_prep.slurm resnet_dist.config resnet_dist.data.shards "
                           "resnet_dist.models.catalog resnet_dist.run",
    "launcher.doctor": "job slurm submission supervise resnet_dist.config "
                       "resnet_dist.data.shards resnet_dist.run",
    "launcher.foreground": "doctor frozen submission supervise watch resnet_dist.config "
                           "resnet_dist.data.shards resnet_dist.models.catalog resnet_dist.run",
    "launcher.bench": "data_prep.bench resnet_dist.config resnet_dist.data.shards",
    "launcher.quickstart": "journal watch resnet_dist.config resnet_dist.run",
    "launcher.cli": "bench foreground frozen submission watch data_prep.conversion "
                    "data_prep.convert data_prep.slurm data_prep.verify resnet_dist.config",
}
# Of these rooms the launcher and the preparation of data see only what needs no torch.
TORCH_FREE = ("resnet_dist.run.atomic", "resnet_dist.run.paths", "resnet_dist.run.curves",
              "resnet_dist.run.lease", "resnet_dist.run.rollback",
              "resnet_dist.data.shards", "resnet_dist.run.file_errors",
              "resnet_dist.config", "resnet_dist.models.catalog")

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for package in PRODUCT for path in sorted((ROOT / package).rglob("*.py"))}
ROOMS = {path.parent for path in FILES.values()} - {ROOT / package for package in PRODUCT}


def imports() -> list[tuple[str, str]]:
    """(module, imported module) for every import statement of the product."""
    found = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(module, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [(module, name if name in FILES else node.module or "") for name in names]
    return found


def room(module: str) -> str:
    """The room a module of the product stands in."""
    inside = len(module.split(".")) > 2 and FILES[module].name != "__init__.py"
    return module.rpartition(".")[0] if inside else module


def allowed(of: str) -> set[str]:
    """The rooms that the table lets a room import, by their whole names."""
    return {name if name.split(".")[0] in PRODUCT else f"{of.split('.')[0]}.{name}"
            for name in ARROWS.get(of, "").split()}


BETWEEN = [(module, other) for module, other in imports()
           if other in FILES and room(module) != room(other)]


def test_every_import_between_rooms_has_its_arrow() -> None:
    wrong = {f"{module} imports {other}, but {room(module)} may import only "
             f"{', '.join(sorted(allowed(room(module)))) or 'the standard library and packages'}. "
             "Move the code to the room that has what it needs, or, if a newcomer would look for "
             "it there, draw the arrow in ARROWS."
             for module, other in BETWEEN if room(other) not in allowed(room(module))}
    assert not wrong, "\n".join(sorted(wrong))


def test_every_arrow_is_used() -> None:
    used = defaultdict(set)
    for module, other in BETWEEN:
        used[room(module)].add(room(other))
    assert {of: allowed(of) for of in ARROWS} == {of: used[of] for of in ARROWS}


def test_no_circle_anywhere() -> None:
    TopologicalSorter({of: allowed(of) for of in ARROWS}).prepare()  # raises CycleError
    modules = defaultdict(set)
    for module, other in imports():
        if other in FILES and other != module:
            modules[module].add(other)
    TopologicalSorter(modules).prepare()


@pytest.mark.parametrize("folder", sorted(ROOMS), ids=lambda folder: folder.name)
def test_every_room_has_a_face_and_its_face_nothing_else(folder: Path) -> None:
    face = ast.parse((folder / "__init__.py").read_text())
    name = ".".join(folder.relative_to(ROOT).parts)
    text = ast.get_docstring(face) or ""
    assert len(face.body) == 1, f"{name}/__init__.py: code belongs in a file with a name"
    assert "In: " in text
    assert "Out: " in text
    told = text.rpartition("May import: ")[2].rstrip(".").replace(",", "").split()
    assert told == (ARROWS[name].split() or ["nothing", "of", "ours"]), f"{name}: {ARROWS[name]}"


def test_rooms_and_files_stay_small() -> None:
    top = [path for package in PRODUCT for path in (ROOT / package).glob("*.py")]
    assert len(top) <= 20
    assert not [folder for folder in ROOMS if len(list(folder.glob("*.py"))) > 14]
    sources = [path for package in PRODUCT for path in (ROOT / package).rglob("*")
               if path.suffix in (".py", ".cpp", ".h")]
    long = {str(path.relative_to(ROOT)): lines for path in sources
            if (lines := path.read_text().count("\n")) > 400}
    assert not long



@pytest.mark.parametrize("package", ["launcher", "data_prep"])
def test_outer_rooms_use_only_the_torch_free_front_of_resnet_dist(package: str) -> None:
    bad = [(module, other) for module, other in imports()
           if module.startswith(package + ".") and other.startswith("resnet_dist.")
           and not other.startswith(TORCH_FREE)]
    assert not bad


def test_kernels_import_only_torch_triton_numpy() -> None:
    own = {"torch", "triton", "numpy", "resnet_dist"} | set(sys.stdlib_module_names)
    bad = [pair for pair in imports() if pair[0].startswith("resnet_dist.kernels")
           and pair[1].split(".")[0] not in own]
    assert not bad


def test_the_command_and_the_login_node_modules_import_no_torch() -> None:
    code = ("import sys, launcher.cli.verbs, launcher.submission.submit, launcher.job, "
            "launcher.watch.status, launcher.frozen.freeze, launcher.foreground, "
            "resnet_dist.data.shards.manifest; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
