"""The order of samples and the random numbers, against slow code that shares nothing with them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.data.augmentation.random import normals, philox4x32, uniforms
from resnet_dist.data.order import batch_of, batch_slice, permutation, stream

seeds = st.integers(0, 2**64 - 1)


def slow_philox(counter: list[int], key: list[int], bits: int) -> list[int]:
    """Philox with four words of `bits`, ten rounds, in Python integers, as the paper's figure 3."""
    multipliers = {32: (0xD2511F53, 0xCD9E8D57),
                   64: (0xD2E7470EE14C6C93, 0xCA5A826395121157)}[bits]
    weyl = {32: (0x9E3779B9, 0xBB67AE85), 64: (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)}[bits]
    mask = (1 << bits) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = c[0] * multipliers[0], c[2] * multipliers[1]
        c = [(product1 >> bits) ^ c[1] ^ k[0], product1 & mask,
             (product0 >> bits) ^ c[3] ^ k[1], product0 & mask]
        k = [(k[0] + weyl[0]) & mask, (k[1] + weyl[1]) & mask]
    return c


def slow_permutation(seed: int, epoch: int, n: int) -> list[int]:
    words: list[int] = []
    block = 0
    while len(words) < n:
        block += 1  # NumPy's generator counts up before it draws
        words += slow_philox([block, 0, epoch, 0], [seed, 0], 64)
    shift = max(1, (n - 1).bit_length())
    return sorted(range(n), key=lambda i: (words[i] >> shift, i))


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert philox4x32(np.array([counter], np.uint32), tuple(key))[0].tolist() == expected
    assert slow_philox(counter, key, 32) == expected


@given(seed=seeds, epoch=st.integers(0, 2**31), sample=st.integers(0, 2**32 - 1),
       purpose=st.integers(0, 2**32 - 1), count=st.integers(1, 41))
@settings(max_examples=60, deadline=None)
def test_uniforms_equal_the_slow_generator(seed, epoch, sample, purpose, count):
    drawn = uniforms(seed, np.array([epoch]), np.array([sample]), purpose, count)[0]
    words: list[int] = []
    for block in range(-(-count // 4)):
        words += slow_philox([sample, epoch, purpose, block], [seed & 0xFFFFFFFF, seed >> 32], 32)
    assert drawn.tolist() == [word / 2**32 for word in words[:count]]


@given(seed=seeds, epoch=st.integers(0, 10**6), n=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_permutation_equals_the_slow_one(seed, epoch, n):
    assert permutation(seed, epoch, n).tolist() == slow_permutation(seed, epoch, n)


@given(seed=seeds, epoch=st.integers(0, 1000), n=st.integers(1, 20_000))
@settings(max_examples=40, deadline=None)
def test_permutation_holds_every_sample_once(seed, epoch, n):
    assert np.array_equal(np.sort(permutation(seed, epoch, n)), np.arange(n))


def test_permutations_differ_between_epochs_and_seeds():
    first = permutation(0, 0, 1000)
    assert (first == permutation(0, 1, 1000)).mean() < 0.02
    assert (first == permutation(1, 0, 1000)).mean() < 0.02


def test_every_sample_is_equally_likely_at_every_position():
    n, epochs = 8, 4000
    seen = np.zeros((n, n))
    for epoch in range(epochs):
        seen[np.arange(n), permutation.__wrapped__(3, epoch, n)] += 1
    expected = epochs / n
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 100.0  # (n - 1)**2 = 49 degrees of freedom; p = 2e-5


@given(seed=st.integers(0, 5), n=st.integers(1, 40), batch=st.integers(1, 50),
       steps=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_batches_tile_the_epochs_and_lose_nothing(seed, n, batch, steps):
    taken = [stream(seed, n, *batch_slice(step, batch, 0, 1)) for step in range(steps)]
    epochs = np.concatenate([e for e, _ in taken])
    ids = np.concatenate([i for _, i in taken])
    for epoch in range(epochs[-1] + 1):
        assert ids[epochs == epoch].tolist() == (
            slow_permutation(seed, epoch, n)[:np.count_nonzero(epochs == epoch)])
    assert np.count_nonzero(epochs < epochs[-1]) == n * epochs[-1]


@given(step=st.integers(0, 2**40), local=st.integers(1, 64), world=st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_ranks_share_a_batch_in_contiguous_slices(step, local, world):
    batch = local * world
    slices = [batch_slice(step, batch, rank, world) for rank in range(world)]
    assert slices[0][0] == step * batch
    assert slices[-1][1] == (step + 1) * batch
    assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
    assert {stop - start for start, stop in slices} == {local}


def test_uniforms_are_uniform_and_normals_normal():
    ids = np.arange(50_000)
    u = uniforms(7, np.zeros_like(ids), ids, 2, 1)[:, 0]
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 105  # 49 degrees of freedom; p = 5e-6
    z = normals(7, np.zeros_like(ids), ids, 3, 3)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(z.T) - np.eye(3)).max() < 0.02


def test_the_permutation_of_imagenet_costs_little_more_than_one_sort():
    """25 to 75 ms, as the machine's vector instructions have it: bounded by NumPy's own sort."""
    def seconds(work):
        start = time.thread_time()
        work()
        return time.thread_time() - start

    n = 1_281_167
    drawn = np.random.Philox(key=1).random_raw(n)
    pairs = [(seconds(lambda epoch=epoch: permutation.__wrapped__(0, epoch, n)),
              seconds(drawn.copy().sort)) for epoch in range(5)]
    took, one_sort = map(min, zip(*pairs, strict=True))
    assert took < 2 * one_sort + 0.02


def ra_sampler(order: list[int], repeats: int, world: int) -> list[list[int]]:
    """torchvision's RASampler, a list a device: every index `repeats` times, dealt out in turn,
    and as many in all as there are samples."""
    repeated = [index for index in order for _ in range(repeats)]
    return [repeated[rank::world][:len(order) // world] for rank in range(world)]


@given(seed=st.integers(0, 2**40), groups=st.sampled_from([2, 4, 8]), group=st.integers(1, 6),
       batches=st.integers(1, 5), repeats=st.integers(2, 4), world=st.sampled_from([1, 2]))
def test_repeated_augmentation_shows_what_torchvisions_sampler_does(seed, groups, group, batches,
                                                                    repeats, world):
    batch, n = groups * group, groups * group * batches
    epoch = 3
    expected = ra_sampler(permutation(seed, epoch, n).tolist(), repeats, groups)
    seen: list[list[int]] = [[] for _ in range(groups)]
    views = set()
    for step in range(epoch * batches, (epoch + 1) * batches):
        parts = [batch_of(seed, n, step, batch, rank, world, repeats, groups)
                 for rank in range(world)]
        views_here, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert set(views_here // repeats) == {epoch}
        views |= set(zip(views_here.tolist(), ids.tolist(), strict=True))
        for index in range(groups):
            seen[index] += ids[index * group:(index + 1) * group].tolist()
    assert seen == expected
    assert len(views) == n  # no two copies are augmented alike
    assert len({sample for device in seen for sample in device}) == -(-n // repeats)


@given(seed=st.integers(0, 2**40), repeats=st.integers(2, 4), step=st.integers(0, 40))
def test_no_group_holds_two_copies_of_an_image(seed, repeats, step):
    _, ids = batch_of(seed, 61, step, 32, 0, 1, repeats, 4)  # epochs end inside of batches
    for group in ids.reshape(4, 8):
        counts = np.unique(group, return_counts=True)[1]
        assert (counts == 1).all() or step * 32 // 61 != ((step + 1) * 32 - 1) // 61


def test_without_repeats_a_batch_is_the_stream():
    for rank in range(2):
        views, ids = batch_of(7, 61, 5, 32, rank, 2, 1, 4)
        epochs, expected = stream(7, 61, *batch_slice(5, 32, rank, 2))
        assert np.array_equal(views, epochs)
        assert np.array_equal(ids, expected)
