"""What a person finds in TensorBoard after a run with two restarts: by HTTP, and in a browser."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from launcher.frozen.freeze import create_run
from resnet_dist.run.paths import RunPaths
from tests.dist.browser import Server, browser, tensorboard, wait_for
from tests.dist.test_training import config_of, finish, start, wait_for_step

STEPS = 24
SCALARS = {"train/loss", "train/lr", "norm/gradient", "norm/parameters", "speed/images_per_s",
           "speed/step_s", "speed/data_s", "speed/compute_s", "speed/communication_s",
           "speed/communication_exposed_s", "device/host_memory_gb", "val/loss", "val/top1",
           "val/ece", "events/start", "events/checkpoint"}
IMAGES = {"train/images", "val/confusion", "val/mistakes", "val/classes", "val/reliability",
          "layers/batch_norm", "layers/responses"}
TEXTS = {"config", "events", "provenance", "profile"}
HISTOGRAMS = {"batch_norm/running_mean", "batch_norm/running_std", "batch_norm/scale",
              "batch_norm/shift", "weights/sample"}


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Checkpoints every 8 steps, SIGKILL past steps 9 and 17; one rank, then two."""
    run = create_run(config_of(
        digits, tmp_path_factory.mktemp("runs"), "watched", steps=STEPS, profile="18:20",
        log={"every_steps": 2, "panels_every_steps": 8},
        checkpoint={"every_steps": 8}, eval={"every_steps": 8, "resize": None, "size": 32}))
    for step in (9, 17):
        (rank,) = start(run, 1)
        wait_for_step(run, step)
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    finish(run, 2)
    return run


@pytest.fixture(scope="module")
def server(run: RunPaths) -> Iterator[Server]:
    with tensorboard(run.root.parent) as served:
        yield served


def test_every_panel_is_served_without_set_up(server: Server) -> None:
    def tags(plugin: str) -> set[str]:
        return set(server.data(f"plugin/{plugin}/tags")["watched/tensorboard"])

    assert tags("scalars") >= SCALARS
    assert tags("images") == IMAGES
    assert {tag.removesuffix("/text_summary") for tag in tags("text")} == TEXTS
    assert tags("histograms") == HISTOGRAMS


def test_two_restarts_leave_one_clean_curve_of_everything(run: RunPaths, server: Server) -> None:
    def steps(plugin: str, tag: str) -> list[int]:
        found = server.data(f"plugin/{plugin}?run=watched%2Ftensorboard&tag={tag}&format=json")
        return [entry["step"] if isinstance(entry, dict) else entry[1] for entry in found]

    assert steps("scalars/scalars", "train/loss") == list(range(2, STEPS + 1, 2))
    assert steps("scalars/scalars", "val/top1") == [8, 16, 24]
    starts = steps("scalars/scalars", "events/start")
    assert len(starts) == 3
    assert starts == sorted({0, *starts[1:]})
    for tag in ("train/images", "layers/batch_norm"):
        assert steps("images/images", tag) == [1, 8, 16, 24], tag
    for tag in ("val/confusion", "val/mistakes", "layers/responses"):
        assert steps("images/images", tag) == [8, 16, 24], tag


def test_a_browser_shows_curves_pictures_and_text(server: Server) -> None:
    with browser(1280, 4000) as page:  # sections out of sight are not drawn
        # TensorBoard opens the first groups alone; what a filter finds is always open.
        for dashboard, tags in (("scalars", ["train/loss", "norm/gradient", "events/start"]),
                                ("images", ["val/confusion", "val/mistakes", "train/images"])):
            page.get(f"{server.address}/#{dashboard}&tagFilter={quote('|'.join(tags))}")
            page.refresh()
            wait_for(page, [f"tag: {tag}" for tag in tags])
        pictures = page.execute_script(
            "const found = []; (function walk(n) { if (n.tagName === 'IMG') found.push("
            "[n.complete, n.naturalWidth]); for (const c of n.children) walk(c);"
            "if (n.shadowRoot) walk(n.shadowRoot); })(document.body); return found")
        assert pictures
        assert any(complete and width > 200 for complete, width in pictures), pictures
        page.get(f"{server.address}/#text")
        page.refresh()
        text = wait_for(page, ["batch_size: 32", "resumed at step", "provenance"])
        assert "name: watched" in text
        page.get(f"{server.address}/#hparams")
        page.refresh()
        wait_for(page, ["optimizer.lr", "model.name", "resnet20"])
