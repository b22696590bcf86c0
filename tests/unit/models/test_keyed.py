"""Draws inside a network: functions of (key, layer, element), whatever the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resnet_dist.models.build import build_model
from resnet_dist.models.keyed import (
    KeyedDropout,
    StochasticDepth,
    keep_mask,
    number_keyed_layers,
    set_sample_keys,
    splitmix64,
)

WORD = (1 << 64) - 1


def splitmix64_integers(state):
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_known_first_output():
    # The first output of the published generator for seed 0.
    assert np.uint64(splitmix64(torch.zeros(1, dtype=torch.int64)).numpy()[0]) == 0xE220A8397B1DCDAF


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_tensor_arithmetic_equals_integer_arithmetic(state):
    got = splitmix64(torch.tensor([state], dtype=torch.int64)).numpy().view(np.uint64)[0]
    assert int(got) == splitmix64_integers(state & WORD)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=2, max_size=8),
       st.integers(1, 7), st.integers(0, 100))
def test_draws_do_not_depend_on_the_batch_split(keys, cut, layer):
    keys = torch.tensor(keys)
    whole = keep_mask(keys, layer, 5, 0.4)
    parts = [keep_mask(part, layer, 5, 0.4) for part in keys.split(cut)]
    assert torch.equal(whole, torch.cat(parts))


def test_rates_are_met_and_layers_and_samples_are_uncorrelated():
    keys = torch.arange(20_000)
    masks = [keep_mask(keys, layer, 2, 0.3).double() for layer in (0, 1)]
    columns = torch.stack([masks[0][:, 0], masks[0][:, 1], masks[1][:, 0], masks[1][:, 1]])
    assert ((columns.mean(1) - 0.7).abs() < 0.015).all()  # 4.6 standard deviations
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.035
    shifted = torch.corrcoef(torch.stack([columns[0][1:], columns[0][:-1]]))[0, 1]
    assert shifted.abs() < 0.035


def test_dropping_keeps_the_expectation_and_evaluation_is_the_identity():
    x = torch.ones(4000, 3, 2, 2)
    for layer in (StochasticDepth(0.25), KeyedDropout(0.25)):
        set_sample_keys(layer, torch.arange(4000))
        assert abs(layer(x).mean() - 1.0) < 0.04
        assert torch.equal(layer.eval()(x), x)


def test_stochastic_depth_drops_whole_samples():
    layer = StochasticDepth(0.5)
    set_sample_keys(layer, torch.arange(64))
    per_sample = layer(torch.ones(64, 3, 2, 2)).flatten(1)
    assert set(per_sample.unique().tolist()) == {0.0, 2.0}
    assert (per_sample == per_sample[:, :1]).all()


def test_layers_of_one_network_draw_differently():
    model = nn.Sequential(StochasticDepth(0.5), StochasticDepth(0.5))
    number_keyed_layers(model)
    set_sample_keys(model, torch.arange(64))
    x = torch.ones(64, 1)
    assert not torch.equal(model[0](x), model[1](x))


def test_training_without_keys_or_with_the_wrong_number_is_refused():
    layer = StochasticDepth(0.5)
    with pytest.raises(RuntimeError, match="set_sample_keys"):
        layer(torch.ones(2, 1))
    set_sample_keys(layer, torch.arange(3))
    with pytest.raises(ValueError, match="3 sample keys for a batch of 2"):
        layer(torch.ones(2, 1))


def test_network_with_stochastic_depth_is_a_function_of_the_keys():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, stochastic_depth=0.5, dropout=0.2, bn_batch=2)
    x = torch.randn(4, 3, 32, 32)

    def logits(keys, batch):
        set_sample_keys(model, keys)
        return model(batch)

    keys = torch.tensor([5, 6, 7, 8])
    whole = logits(keys, x)
    assert torch.equal(whole, logits(keys, x))
    assert torch.allclose(whole[2:], logits(keys[2:], x[2:]), atol=1e-5)
    assert not torch.allclose(whole, logits(keys + 4, x), atol=1e-3)
