"""Configuration: strict, and every refusal names key, value and remedy."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.load import (
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    load_frozen,
)
from resnet_dist.config.rules import world_problems
from resnet_dist.config.schema import Config, ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_an_empty_recipe_is_the_published_one(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{}")
    config = load_config(recipe)
    assert (config.name, config.batch_size, config.steps, config.bn_batch) == (
        "mine", 256, 600_000, 32)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_says_what_it_costs_and_reaches(recipe: Path) -> None:
    load_config(recipe)
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Cost:", "Expected:"):
        assert any(word in line for line in header), word


def test_overrides_win_and_a_section_may_be_named_by_its_leading_field(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {path: a, threads: 3}\noptimizer: {lr: 1e-2}\n")
    config = load_config(recipe, ["data=b", "optimizer.momentum=0.8", "launch.nodes=2",
                                  "schedule.milestones=[10,20]"])
    assert (config.data.path, config.data.threads) == ("b", 3)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.01, 0.8)
    assert config.schedule.milestones == (10, 20)


@pytest.mark.parametrize(("override", "key", "value", "remedy"), [
    ("optimizer.lrr=1", "optimizer.lrr", "1", "did you mean 'lr'"),
    ("optmizer.lr=1", "optmizer", "", "did you mean 'optimizer'"),
    ("steps=many", "steps", "many", "should be a valid integer"),
    ("steps=0", "steps", "0", "greater than or equal to 1"),
    ("steps=1.5", "steps", "1.5", "integer"),
    ("seed=true", "seed", "true", "integer"),
    ("batch_size=100", "bn_batch", "32", "must divide batch_size = 100"),
    ("launch.ranks_per_node=3", "launch.ranks_per_node", "3", "must divide batch_size / bn_batch"),
    ("model=resnet51", "model.name", "resnet51", "did you mean"),
    ("precision=fp8", "precision", "fp8", "'bf16'"),
    ("augment.size=300", "augment.size", "300", "augment.min_side = 256"),
    ("micro_batch=48", "micro_batch", "48", "multiple of bn_batch"),
    ("schedule.milestones=[2,1]", "schedule.milestones", "[2, 1]", "increase"),
    ("name=../x", "name", "../x", "use letters"),
    ("data.repeats=9", "data.repeats", "9", "set bn_batch so that a batch has at least 9"),
])
def test_a_mistake_names_key_value_and_remedy(
        tmp_path: Path, override: str, key: str, value: str, remedy: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    message = str(caught.value)
    assert key in message
    assert value in message
    assert remedy in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["steps=no", "seed=-1", "foo=1"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "steps: 1\nsteps: 2\n"])
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError):
        load_config(recipe)


@given(seed=st.integers(0, 2**31), groups=st.integers(1, 16), bn=st.integers(1, 64),
       lr=st.floats(1e-6, 10))
def test_a_frozen_configuration_reads_back_equal(
        tmp_path_factory: pytest.TempPathFactory, seed: int, groups: int, bn: int,
        lr: float) -> None:
    config = config_from_dict({"name": "x", "seed": seed, "batch_size": groups * bn,
                               "bn_batch": bn, "optimizer": {"lr": lr}})
    path = tmp_path_factory.mktemp("frozen") / "config.yaml"
    path.write_text(dump_config(config))
    assert load_frozen(path) == config
    assert config_from_dict(config_to_dict(config)) == config


@given(groups=st.integers(1, 64), bn=st.integers(1, 8), world=st.integers(1, 64))
def test_a_world_is_legal_exactly_when_it_divides_the_groups(
        groups: int, bn: int, world: int) -> None:
    config = dataclasses.replace(Config(name="x"), batch_size=groups * bn, bn_batch=bn)
    assert bool(world_problems(config, world)) == bool(groups % world)
    exact = dataclasses.replace(config, mode="exact")
    power_of_two = re.fullmatch("0b10*", bin(world)) is not None
    assert bool(world_problems(exact, world)) == bool(groups % world or not power_of_two)


def test_an_unwritten_default_stays_out_of_yaml() -> None:
    for recipe in CONFIGS.rglob("*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        defaults = config_to_dict(Config())
        for key, value in values.items():
            assert not isinstance(value, dict) or value, f"{recipe}: {key} is empty"
            assert key in defaults
