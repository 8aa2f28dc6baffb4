"""Mixup and CutMix against numpy, over groups that do not depend on the batch."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from data import mixing
from data.digits import digits
from data.pipeline import Pipeline
from data.preprocess import whole

CLASSES = 40


def traced(function):
    """Runs a mixing as the pipeline does."""
    run = tf.function(function)
    return lambda *columns, **arguments: run(*map(tf.constant, columns), **arguments)


mixup, cutmix, mixup_or_cutmix = map(traced, (mixing.mixup, mixing.cutmix, mixing.mixup_or_cutmix))


def batch(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of one value each, which is their number, as are their labels."""
    images = np.broadcast_to(np.arange(size)[:, None, None, None], (size, 8, 6, 3))
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(size) % CLASSES]
    seeds = np.stack([np.arange(size), np.full(size, seed)], axis=1).astype(np.int32)
    return images.astype(np.float32), labels, seeds


def shares(label: np.ndarray, size: int) -> np.ndarray:
    """Returns how much of itself each example has kept."""
    return label[np.arange(size), np.arange(size)]


def test_the_official_pairing_mixes_the_first_with_the_last_of_a_group():
    images, labels, seeds = batch(16)
    mixed, label = (x.numpy() for x in mixup(images, labels, seeds, alpha=0.4, group=4))
    partner = np.arange(16).reshape(4, 4)[:, ::-1].ravel()
    own = shares(label, 16)
    assert (own >= 0.5).all()
    assert len(set(own)) > 8
    np.testing.assert_allclose(
        mixed[:, 0, 0, 0], own * np.arange(16) + (1 - own) * partner, rtol=1e-5
    )
    wanted = own[:, None] * labels + (1 - own[:, None]) * labels[partner]
    np.testing.assert_allclose(label, wanted, atol=1e-6)


def test_the_standard_pairing_permutes_a_group_that_shares_one_share():
    images, labels, seeds = batch(32)
    mixed, label = (
        x.numpy() for x in mixup(images, labels, seeds, alpha=1.0, pairing="standard", group=8)
    )
    np.testing.assert_allclose(label.sum(axis=1), 1, rtol=1e-6)
    means = (label[:, :32] * np.arange(32)).sum(axis=1)
    np.testing.assert_allclose(mixed[:, 3, 3, 1], means, rtol=1e-4, atol=1e-4)
    for group in range(4):
        places = slice(8 * group, 8 * group + 8)
        inside = label[places, places]
        np.testing.assert_allclose(inside.sum(axis=(0, 1)), 8, rtol=1e-5)
        # Each is once itself, with the group's share, and once somebody's partner.
        np.testing.assert_allclose(inside.sum(axis=0), 1, rtol=1e-5)
        own = np.diag(inside)
        own = own[own < 0.999]
        assert np.ptp(own) < 1e-5


@pytest.mark.parametrize("mix", [mixup, cutmix, mixup_or_cutmix])
def test_a_part_of_a_batch_is_mixed_as_in_the_whole(mix):
    images, labels, seeds = batch(32)
    whole_batch = mix(images, labels, seeds)
    part = mix(images[8:24], labels[8:24], seeds[8:24])
    for all_of_it, some in zip(whole_batch, part, strict=True):
        np.testing.assert_array_equal(all_of_it.numpy()[8:24], some.numpy())


def test_cutmix_pastes_a_box_and_counts_its_area():
    size = 512
    images, _, seeds = batch(size)
    labels = np.eye(size, dtype=np.float32)
    pasted, label = (x.numpy() for x in cutmix(images, labels, seeds, group=8))
    for place in range(size):
        values, counts = np.unique(pasted[place, :, :, 0], return_counts=True)
        assert set(values) <= set(range(place // 8 * 8, place // 8 * 8 + 8))
        for value, count in zip(values.astype(int), counts, strict=True):
            np.testing.assert_allclose(label[place, value], count / 48, atol=1e-6)
        if len(values) == 2:
            other = pasted[place, :, :, 0] != place
            rows, columns = np.where(other.any(1))[0], np.where(other.any(0))[0]
            assert other.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    # One box in a group.
    for group in pasted.reshape(-1, 8, 8, 6, 3)[..., 0]:
        own = np.arange(8) + group.min() // 8 * 8
        boxes = {tuple(np.where((g != o).ravel())[0]) for g, o in zip(group, own, strict=True)}
        assert len(boxes - {()}) <= 1


def test_either_is_chosen_by_group():
    images, labels, seeds = batch(320)
    mixed, _ = (x.numpy() for x in mixup_or_cutmix(images, labels, seeds, switch=0.5))
    one_value = (np.ptp(mixed, axis=(1, 2, 3)) < 1e-3).reshape(-1, 8).all(axis=1)
    assert 8 < one_value.sum() < 38
    never, _ = mixup_or_cutmix(images, labels, seeds, switch=0.0)
    assert (np.ptp(never.numpy(), axis=(1, 2, 3)) < 1e-3).all()


def below_one(values: np.ndarray, cdf) -> tuple:
    """Cuts off what float32 rounds to 1, where a Beta of small alpha has much of its mass."""
    most = 1 - 1e-6
    return values[values < most].astype(np.float64), lambda x: cdf(x) / cdf(most)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_follow_the_beta_distribution(alpha):
    """20,000 draws, Kolmogorov-Smirnov."""
    size = 20_000
    seeds = np.stack([np.arange(size), np.full(size, 7)], axis=1).astype(np.int32)
    images = np.zeros((size, 1, 1, 3), np.float32)
    labels = np.tile(np.eye(2, dtype=np.float32), (size // 2, 1))
    _, label = mixup(images, labels, seeds, alpha=alpha, group=2)
    own = label.numpy()[np.arange(size), np.arange(size) % 2]
    folded = stats.beta(alpha, alpha)
    # The larger of λ and 1 − λ: P(≤ x) = F(x) − F(1 − x) from ½ on.
    found = stats.kstest(*below_one(own, lambda x: folded.cdf(x) - folded.cdf(1 - x)))
    assert found.pvalue > 1e-4
    _, label = mixup(images, labels, seeds, alpha=alpha, pairing="standard", group=2)
    own = label.numpy().reshape(-1, 2, 2)
    swapped = own[:, 0, 0] < 1 - 1e-6
    found = stats.kstest(*below_one(own[swapped, 0, 0], folded.cdf))
    assert found.pvalue > 1e-4
    share = 0.5 * folded.cdf(1 - 1e-6)  # a permutation of two swaps half of the time
    assert abs(swapped.mean() - share) < 0.025


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha takes a number above 0, not 0.0"),
        ({"pairing": "random"}, "pairing takes official or standard, not 'random'"),
        ({"group": 5}, "group takes a divisor of the batch of 16, not 5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixup(*batch(16), **arguments)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_mixed_batches_do_not_depend_on_the_hosts(num_shards):
    pipeline = Pipeline(digits(), whole(8), mixing=functools.partial(mixing.mixup, group=4))
    parts = [
        next(
            iter(
                pipeline.train_batches(
                    "train", batch_size=16 // num_shards, seed=1, shard=s, num_shards=num_shards
                )
            )
        )
        for s in range(num_shards)
    ]
    one = next(iter(pipeline.train_batches("train", batch_size=16, seed=1)))
    for name in ("image", "label"):
        together = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(one[name], together)
    assert one["label"].shape == (16, 10)
    assert one["image"].dtype == tf.float32
