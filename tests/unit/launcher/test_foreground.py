"""`train` as one rank of torchrun, and where torchrun's variables are left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

COMPLETE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511"}


@pytest.mark.parametrize(("changed", "words"), [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE = '': RANK = '0' is set"),
    ({"RANK": "zero"}, "RANK = 'zero'"),
    ({"RANK": "3"}, "RANK = 3: is not below WORLD_SIZE = 1"),
    ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR = 'nowhere.invalid': is not found"),
    ({"MASTER_PORT": ""}, "MASTER_PORT = ''"),
    ({"WORLD_SIZE": "7"}, "WORLD_SIZE = 7: as torchrun has set it"),
])
def test_variables_left_over_from_torchrun_are_named(
        changed: dict[str, str], words: str, tmp_path: Path, cli: Cli) -> None:
    done = cli("train", ROOT / "configs" / "digits" / "quickstart.yaml", f"runs={tmp_path}",
               env=COMPLETE | changed)
    assert done.returncode == 2, done.stderr
    shown = " ".join(done.stderr.split())
    assert words in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())
