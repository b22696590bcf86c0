"""Every recipe is complete, says what it costs and reaches, and really trains and evaluates."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from resnet_dist.build import model_of, normalization_of, train_loader
from resnet_dist.config.load import config_from_dict, config_to_dict, dump_config, load_config
from resnet_dist.config.schema import Config
from resnet_dist.data.augmentation.mix import mixer
from resnet_dist.data.augmentation.random import sample_keys
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.engine.ddp import make_engine
from resnet_dist.engine.optim import lr_at
from resnet_dist.evaluate.passes import evaluate
from resnet_dist.evaluate.views import eval_loader
from resnet_dist.ranks.distributed import World
from tests.unit.data.samples import jpeg_sample, raw_sample, write_dataset

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
ALONE = World(0, 1, 0, torch.device("cpu"))
IMAGES, BATCH, GROUP = 8, 4, 2  # an epoch is two steps
# Pixels: as few as leave 2 x 2 for the last stage, of which BatchNorm learns what holds for other
# images, too. So even 1,202 layers fit into the suite.
ICON, PHOTO, LARGER = 8, 36, 44


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every one of a thousand layers take far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [jpeg_sample(i, i % 10, *((50, 66) if i % 2 else (70, 48))) for i in range(IMAGES)]
    return write_dataset(tmp_path_factory.mktemp("photos") / "d",
                         {"train": [samples], "val": [samples[:3]]})


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [raw_sample(i, i % 10, ICON, ICON) for i in range(IMAGES)]
    return write_dataset(tmp_path_factory.mktemp("icons") / "d",
                         {"train": [samples], "val": [samples[:3]]}, image_size=(ICON, ICON),
                         pixel_mean=np.full((ICON, ICON, 3), 120, np.float32))


def small(config: Config, data: Path) -> Config:
    """The same recipe for a tiny data set: fewer and smaller images, everything else kept."""
    tree = config_to_dict(config)
    tree |= {"data": {"path": str(data), "repeats": min(config.data.repeats, BATCH // GROUP)},
             "steps": 4, "batch_size": BATCH, "device": "cpu",
             "micro_batch": None, "launch": {}, "threads": 1,
             "bn_batch": GROUP if config.bn_batch else None}
    tree["schedule"]["warmup_steps"] = min(config.schedule.warmup_steps, 1)
    tree["schedule"]["milestones"] = [1, 2, 3][:len(config.schedule.milestones)]
    tree["optimizer"]["lr"] *= BATCH / config.batch_size
    tree["ema"]["every_steps"] = 1
    tree["data"]["threads"] = 1
    if config.augment.name == "pad_crop":
        tree["augment"]["size"] = tree["eval"]["size"] = ICON
    else:
        tree["augment"] |= {"size": PHOTO, "min_side": PHOTO + 2, "max_side": LARGER}
        tree["augment"]["sizes"] = [[0, LARGER]] if config.augment.sizes else []
        tree["eval"] |= {"size": PHOTO, "resize": PHOTO + 4}
    return config_from_dict(tree)


def ids(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_every_recipe_trains_and_evaluates(recipe: Path, photos: Path, icons: Path) -> None:
    published = load_config(recipe)
    config = small(published, icons if published.augment.name == "pad_crop" else photos)
    manifest = check_dataset(config)
    engine = make_engine(model_of(config, manifest), config, ALONE,
                         normalization_of(config, manifest))
    before = [p.detach().clone() for p in engine.module.parameters()]
    with train_loader(config, ALONE, first_step=0) as loader:
        for step, batch in zip(range(2), loader, strict=False):
            images = batch.images
            lr = lr_at(config.schedule, config.optimizer.lr, step, config.steps)
            keys = torch.from_numpy(sample_keys(config.seed, batch.epochs, batch.sample_ids))
            engine.train_step(batch.images, batch.labels, keys, lr,
                              mixer(config.augment, config.seed, step, 0, GROUP))
    if config.augment.sizes:
        assert batch.images.shape[1] == LARGER
    assert engine.finite()
    assert np.isfinite(engine.read_window()["loss"])
    moved = [not torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True)]
    # Branches that start as zero (zero_init_last_bn) pass no gradient to their inside yet.
    assert sum(moved) > 0.5 * len(moved), "two steps must move the weights"
    # After two steps the running statistics are still far from the true ones, which a deep network
    # answers with infinities.
    engine.refresh_bn([images])
    with engine.eval_model() as model:
        outcomes = evaluate(model, engine.normalize, eval_loader(config, ALONE), ALONE)
    assert len(outcomes.labels) == 3
    assert np.isfinite(outcomes.losses).all()
    if config.ema.decay is not None:
        with engine.eval_model(ema=True) as model:
            averaged = evaluate(model, engine.normalize, eval_loader(config, ALONE), ALONE)
        assert not np.array_equal(averaged.losses, outcomes.losses)


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_the_header_says_command_cost_accuracy_and_source(recipe: Path) -> None:
    text = recipe.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for word in ("Command:", "Cost:", "Expected:", "Source:"):
        assert re.search(rf"^# {word} +\S", header, re.MULTILINE), word
    named = re.search(r"^# Command: +resnet-dist submit (\S+)", header, re.MULTILINE)
    assert named
    assert named[1] == str(recipe.relative_to(CONFIGS.parent))
    config = load_config(recipe)
    said = re.search(r"([\d,]+) iterations of ([\d,]+) images", header)
    if said:
        assert [int(number.replace(",", "")) for number in said.groups()] == [
            config.steps, config.batch_size]


# What a published recipe fixes is said even where it is the default, so that the page is complete.
SAID_ANYWAY = {"steps", "batch_size", "bn_batch", "data", "augment", "model", "optimizer",
               "schedule", "launch", "eval", "checkpoint"}


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_a_recipe_sets_nothing_to_its_default_but_what_was_published(recipe: Path) -> None:
    written, default = yaml.safe_load(recipe.read_text()), config_to_dict(Config())
    for key, value in written.items():
        assert key in SAID_ANYWAY or value != default[key], key


@pytest.mark.parametrize(("stem", "epochs", "images"), [
    ("resnet50_torchvision_v1", 90, 1_281_167), ("resnet50_goyal2017", 90, 1_281_167),
    ("resnet50_ffcv16", 16, 1_281_167), ("resnet18_ffcv88", 88, 1_281_167),
    ("resnet50_timm_a3", 100, 1_281_167), ("resnet50_torchvision_v2", 600, 1_281_167)])
def test_recipes_in_epochs_have_the_iterations_of_these_epochs(
        stem: str, epochs: int, images: int) -> None:
    config = load_config(CONFIGS / "imagenet" / f"{stem}.yaml")
    assert config.steps * config.batch_size == pytest.approx(epochs * images, abs=config.batch_size)


def test_the_papers_recipes_differ_only_in_the_network() -> None:
    papers = [load_config(path) for path in sorted((CONFIGS / "imagenet").glob("*_he2015.yaml"))]
    assert len(papers) == 9
    assert len({config.model for config in papers}) == 9
    assert len({dump_config(replace(config, name="same", model=papers[0].model))
                for config in papers}) == 1
