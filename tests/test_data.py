"""Input: every example once, in an order that can be sought, whatever the number of shards."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from data.augment import shift_and_rotate
from data.digits import digits
from data.pipeline import Pipeline, Split


def numbered(num_examples: int) -> Pipeline:
    """Images that hold their own index; augmentation adds a draw of its key."""

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"image": tf.fill((1, 1, 1), tf.cast(index, tf.float32)), "label": index}

    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.concat([image, tf.random.stateless_uniform((1, 1, 1), seed)], -1)

    return Pipeline("numbered", num_examples, {"all": Split(num_examples, read)}, augment)


def take(batches: tf.data.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    read = list(batches.take(count).as_numpy_iterator())
    return np.stack([b["label"] for b in read]), np.stack([b["image"] for b in read])


@pytest.mark.parametrize("num_examples", [1, 7, 64])
def test_each_epoch_is_a_permutation_of_its_own(num_examples):
    labels, _ = take(numbered(num_examples).train_batches("all", batch_size=1, seed=3), 192)
    epochs = labels[: 192 // num_examples * num_examples].reshape(-1, num_examples)
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_examples))
    if num_examples == 64:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        other, _ = take(numbered(64).train_batches("all", batch_size=1, seed=4), 64)
        assert tuple(other.ravel()) != tuple(epochs[0])


def test_no_place_of_an_epoch_prefers_an_example():
    """Over many epochs each example comes first about equally often (chi-square, p > 1e-6)."""
    labels, _ = take(numbered(8).train_batches("all", batch_size=8, seed=0), 2000)
    counts = np.bincount(labels[:, 0], minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 45


@pytest.mark.parametrize("start", [1, 5, 23])
def test_starting_at_a_step_gives_the_same_batches_bit_for_bit(start):
    pipeline = numbered(10)
    labels, images = take(pipeline.train_batches("all", batch_size=3, seed=1), start + 4)
    sought = take(pipeline.train_batches("all", batch_size=3, seed=1, start=start), 4)
    np.testing.assert_array_equal(labels[start:], sought[0])
    np.testing.assert_array_equal(images[start:], sought[1])


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_shards_together_are_the_batches_of_one(num_shards):
    pipeline, size = numbered(10), 12
    whole = take(pipeline.train_batches("all", batch_size=size, seed=1), 5)
    parts = [
        take(
            pipeline.train_batches(
                "all", batch_size=size // num_shards, seed=1, shard=s, num_shards=num_shards
            ),
            5,
        )
        for s in range(num_shards)
    ]
    for column in (0, 1):
        together = np.concatenate([part[column] for part in parts], axis=1)
        np.testing.assert_array_equal(whole[column], together)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (10, 5), (2, 8), (7, 7)])
def test_evaluation_sees_each_example_once_and_marks_the_rest(num_examples, batch_size):
    batches = list(numbered(num_examples).eval_batches("all", batch_size=batch_size))
    assert all(batch["label"].shape == (batch_size,) for batch in batches)
    index = np.concatenate([batch["index"] for batch in batches])
    assert sorted(index[index >= 0]) == list(range(num_examples))
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels[index >= 0], index[index >= 0])


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="numbered has no split 'train'; it has all"):
        numbered(3).num_examples("train")


def test_digits_are_split_once_and_for_all_by_class():
    pipeline = digits()
    sizes = {name: split.num_examples for name, split in pipeline.splits.items()}
    assert sizes == {"train": 1293, "minival": 144, "test": 360}
    target = load_digits().target
    everything = []
    for name in sizes:
        batches = pipeline.eval_batches(name, batch_size=sizes[name])
        labels = next(iter(batches))["label"].numpy()
        everything.append(labels)
        share = np.bincount(labels) / len(labels)
        np.testing.assert_allclose(share, np.bincount(target) / len(target), atol=0.01)
    np.testing.assert_array_equal(np.bincount(np.concatenate(everything)), np.bincount(target))


def test_digits_are_the_scans_scaled_up():
    images = next(iter(digits(image_size=8).eval_batches("test", batch_size=360)))["image"]
    scans = (load_digits().images * (255 / 16)).round()
    known = {scan.astype(np.uint8).tobytes() for scan in scans}
    for image in images.numpy():
        assert image[..., 0].tobytes() in known
        np.testing.assert_array_equal(image[..., 0], image[..., 2])
    large = next(iter(digits(image_size=32).eval_batches("test", batch_size=2)))["image"]
    assert large.shape == (2, 32, 32, 3)
    assert large.dtype == tf.uint8


def blob(row: int, column: int) -> np.ndarray:
    image = np.zeros((33, 33, 1), np.uint8)
    image[row - 1 : row + 2, column - 1 : column + 2] = 255
    return image


def centre(image: np.ndarray) -> np.ndarray:
    weights = image[..., 0] / image.sum()
    return np.array([(np.arange(33)[:, None] * weights).sum(), (np.arange(33) * weights).sum()])


def draws(seed: int) -> np.ndarray:
    return tf.random.stateless_uniform([3], [seed, 0], -1, 1).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_moves_by_the_drawn_share(seed):
    moved = shift_and_rotate(tf.constant(blob(16, 16)), [seed, 0], 0.2, 0.0).numpy()
    shift = draws(seed)[1:] * 0.2 * 33
    np.testing.assert_allclose(centre(moved), 16 - shift, atol=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_rotation_turns_about_the_centre_by_the_drawn_angle(seed):
    turned = shift_and_rotate(tf.constant(blob(16, 26)), [seed, 0], 0.0, 45.0).numpy()
    angle = np.deg2rad(draws(seed)[0] * 45)
    wanted = 16 + 10 * np.array([-np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(centre(turned), wanted, atol=0.15)


def test_no_shift_and_no_rotation_change_nothing():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    same = shift_and_rotate(tf.constant(image), [0, 0], 0.0, 0.0)
    np.testing.assert_array_equal(same.numpy(), image)


@pytest.mark.parametrize("arguments", [{"image_size": 7}, {"max_shift": -1.0}, {"max_degrees": -1}])
def test_bad_arguments_of_digits_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        digits(**arguments)
