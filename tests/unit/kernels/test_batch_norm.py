"""Ghost BatchNorm: the fast version against its definition, and the book-keeping of statistics."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import reference
from resnet_dist.models.norm import (
    GhostBatchNorm2d,
    bn_running_vector,
    bn_stat_vector,
    commit_running_stats,
    flatten_bn_stats,
    set_bn_running_vector,
    set_bn_stat_vector,
)

NHWC = torch.channels_last
# |difference| allowed, relative to the largest value: rounding of the dtype, few operations deep
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def close(a, b, dtype):
    return (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


def draw(*shape, dtype=torch.float32, layout=NHWC, grad=True):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_(grad)


@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bn_batch", [2, 4, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fast_version_equals_the_reference(dtype, bn_batch, with_residual, relu, layout):
    torch.manual_seed(0)
    x = draw(8, 6, 3, 5, dtype=dtype, layout=layout)
    residual = draw(8, 6, 3, 5, dtype=dtype, layout=layout) if with_residual else None
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(6, dtype=wide, requires_grad=True)
    bias = torch.randn(6, dtype=wide, requires_grad=True)
    inputs = [x, weight, bias] + ([residual] if with_residual else [])

    got = kernels.ghost_batch_norm(x, weight, bias, bn_batch, 1e-5, residual, relu)
    want = reference.ghost_batch_norm(x, weight, bias, bn_batch, 1e-5, residual, relu)

    assert got[0].dtype == dtype
    assert got[0].is_contiguous(memory_format=layout)
    assert close(got[0], want[0], dtype)
    assert close(got[1], want[1], wide)
    assert close(got[2], want[2], wide)
    grad = torch.randn_like(got[0])
    for a, b in zip(torch.autograd.grad(got[0], inputs, grad),
                    torch.autograd.grad(want[0], inputs, grad), strict=True):
        assert close(a, b, dtype)


def test_each_group_is_what_the_library_computes_for_it_alone():
    torch.manual_seed(0)
    x = draw(12, 5, 4, 4)
    ghost, plain = GhostBatchNorm2d(5, bn_batch=4), nn.BatchNorm2d(5)
    assert torch.equal(ghost(x), torch.cat([plain(part) for part in x.split(4)]))


def test_a_group_alone_has_the_bits_it_has_in_company():
    x = draw(8, 16, 6, 6)
    bn = GhostBatchNorm2d(16, bn_batch=4)
    together, alone = bn(x), bn(x[4:])
    assert torch.equal(together[4:], alone)


@pytest.mark.parametrize("bn_batch", [2, 4])
def test_gradients_are_numerically_right(bn_batch):
    torch.manual_seed(1)
    x = draw(4, 3, 2, 2, dtype=torch.float64)
    residual = draw(4, 3, 2, 2, dtype=torch.float64)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: kernels.ghost_batch_norm(*a[:3], bn_batch, 1e-5, a[3], True)[0],
        (x, weight, bias, residual),
    )


def test_strided_input_and_expanded_gradient_are_right():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8)[:, ::2, 1::2].requires_grad_()
    bn = GhostBatchNorm2d(3, bn_batch=2)
    bn(x).relu().sum().backward()
    got, x.grad = x.grad.clone(), None
    reference.ghost_batch_norm(x, bn.weight, bn.bias, 2, bn.eps)[0].relu().sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-5)


@pytest.mark.parametrize(("images", "bn_batch"), [(6, 4), (3, 4), (0, 4)])
def test_images_that_are_no_whole_groups_are_refused_naming_both(images, bn_batch):
    with pytest.raises(ValueError, match=rf"{bn_batch}.*{images} images"):
        GhostBatchNorm2d(2, bn_batch=bn_batch)(torch.zeros(images, 2, 3, 3))


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value"):
        GhostBatchNorm2d(2, bn_batch=1)(torch.zeros(4, 2, 1, 1))


def test_evaluation_takes_any_batch_and_equals_the_library():
    torch.manual_seed(0)
    ghost, plain = GhostBatchNorm2d(4, bn_batch=32).eval(), nn.BatchNorm2d(4).eval()
    state = {name: torch.rand_like(value) for name, value in plain.state_dict().items()
             if value.is_floating_point()}
    ghost.load_state_dict(state, strict=False)
    plain.load_state_dict(state, strict=False)
    x, residual = draw(3, 4, 5, 5), draw(3, 4, 5, 5)
    assert torch.equal(ghost(x, residual, True), torch.relu(plain(x) + residual))


def network(bn_batch=2):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), GhostBatchNorm2d(8, bn_batch=bn_batch), nn.ReLU(),
        nn.Conv2d(8, 4, 3), GhostBatchNorm2d(4, bn_batch=bn_batch, momentum=0.3),
    ).to(memory_format=NHWC)
    flatten_bn_stats(model)
    return model


def test_training_forward_never_changes_running_statistics():
    model = network()
    before = bn_running_vector(model)
    model(draw(8, 3, 9, 9))
    assert torch.equal(bn_running_vector(model), before)
    commit_running_stats(model)
    assert not torch.equal(bn_running_vector(model), before)


def test_one_group_commits_what_the_library_would_have():
    x = draw(4, 8, 5, 5)
    ghost, plain = nn.Sequential(GhostBatchNorm2d(8)), nn.BatchNorm2d(8)
    flatten_bn_stats(ghost)
    for _ in range(3):
        ghost(x)
        plain(x)
        commit_running_stats(ghost)
    assert torch.allclose(ghost[0].running_mean, plain.running_mean, rtol=1e-6)
    assert torch.allclose(ghost[0].running_var, plain.running_var, rtol=1e-6)
    assert ghost[0].num_batches_tracked == plain.num_batches_tracked == 3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_committed_statistics_do_not_depend_on_the_cut_into_micro_batches(groups):
    torch.manual_seed(len(groups))
    x = draw(2 * sum(groups), 3, 9, 9, grad=False)
    whole, cut = network(), network()
    whole(x)
    for part in x.split([2 * g for g in groups]):
        cut(part)
    for model in (whole, cut):
        commit_running_stats(model)
    assert torch.allclose(bn_running_vector(whole), bn_running_vector(cut), rtol=1e-5, atol=1e-7)
    assert whole[1].num_batches_tracked == cut[1].num_batches_tracked == 1


def test_statistics_of_disjoint_groups_add_up():
    x = draw(8, 3, 9, 9)
    whole, left, right = network(), network(), network()
    whole(x)
    left(x[:4])
    right(x[4:])
    set_bn_stat_vector(left, bn_stat_vector(left) + bn_stat_vector(right))
    assert torch.allclose(bn_stat_vector(left), bn_stat_vector(whole), rtol=1e-5, atol=1e-6)
    assert bn_stat_vector(left)[-2:].tolist() == [4, 4]
    commit_running_stats(left)
    commit_running_stats(whole)
    assert torch.allclose(bn_running_vector(left), bn_running_vector(whole), rtol=1e-5, atol=1e-7)
    assert not bn_stat_vector(left).any()


def test_momentum_one_commits_the_plain_average():
    model = network(bn_batch=None)
    parts = [draw(2, 3, 9, 9) for _ in range(3)]
    activations = [model[0](part) for part in parts]
    for part in parts:
        model(part)
    commit_running_stats(model, momentum=1.0)
    expected = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    assert torch.allclose(model[1].running_mean, expected, atol=1e-6)


def test_a_layer_that_saw_nothing_keeps_its_statistics():
    model = network()
    model[:3](draw(4, 3, 9, 9))
    commit_running_stats(model)
    assert torch.equal(model[4].running_mean, torch.zeros(4))
    assert torch.equal(model[4].running_var, torch.ones(4))
    assert [model[k].num_batches_tracked.item() for k in (1, 4)] == [1, 0]


def test_flattening_keeps_values_and_state_dict_and_survives_copying(tmp_path):
    model = network()
    model(draw(4, 3, 9, 9))
    commit_running_stats(model)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).state_dict())
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    twin(draw(4, 3, 9, 9))
    commit_running_stats(twin)
    assert twin[1].num_batches_tracked == 2
    assert model[1].num_batches_tracked == 1  # the copy has tensors of its own

    model.load_state_dict(twin.state_dict())
    assert torch.equal(bn_running_vector(model), bn_running_vector(twin))
    set_bn_running_vector(model, torch.full_like(bn_running_vector(model), 7.0))
    assert (model[4].running_var == 7.0).all()


def test_replaced_buffers_are_noticed():
    model = network().double()
    with pytest.raises(RuntimeError, match="flatten_bn_stats"):
        commit_running_stats(model)
    flatten_bn_stats(model)
    commit_running_stats(model)


def test_model_that_was_not_flattened_is_refused():
    with pytest.raises(RuntimeError, match="flatten_bn_stats"):
        commit_running_stats(GhostBatchNorm2d(2))


def test_model_without_batch_norm_has_nothing_to_commit():
    model = nn.Linear(2, 2)
    flatten_bn_stats(model)
    commit_running_stats(model)
    assert bn_stat_vector(model).numel() == 0


def test_vector_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="another architecture"):
        set_bn_running_vector(network(), torch.zeros(3))


def test_under_autocast_activations_are_16_bit_and_statistics_are_not():
    model = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(draw(8, 3, 9, 9, grad=False))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=NHWC)
    assert bn_stat_vector(model).dtype == torch.float32
    assert model[1].weight.grad.dtype == torch.float32


def test_same_input_gives_the_same_bits():
    model = network()
    x = draw(8, 3, 9, 9, grad=False)

    def bits():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        vector = bn_stat_vector(model)
        set_bn_stat_vector(model, torch.zeros_like(vector))
        return [y, vector, *(p.grad for p in model.parameters())]

    for a, b in zip(bits(), bits(), strict=True):
        assert torch.equal(a, b)
