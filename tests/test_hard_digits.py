"""Hard digits: fixed views of held-out digits, nothing of these in training, both twins alike."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from condconv.engine import config
from condconv.engine.experiment import build_model
from data import hard_digits as hard
from data.digits import digits
from data.hard_digits import SIZE, VIEWS, hard_view
from data.pipeline import Pipeline
from data.preprocess import whole

PROXY = pathlib.Path(__file__).parents[1] / "configs" / "proxy"
NETWORKS = sorted(path.stem for path in PROXY.glob("*.gin") if path.stem != "proxy")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(hard.hard_digits(), whole(SIZE, augmentations=(hard_view,)))


@pytest.fixture(scope="module")
def minival(pipeline) -> dict[str, np.ndarray]:
    return next(pipeline.eval_batches("minival", batch_size=1440).as_numpy_iterator())


def upright(split: str) -> tuple[np.ndarray, np.ndarray]:
    plain = Pipeline(digits(), whole(SIZE))
    size = plain.num_examples(split)
    batch = next(plain.eval_batches(split, batch_size=size).as_numpy_iterator())
    return batch["image"], batch["label"]


def of(image: np.ndarray, *seed: int) -> np.ndarray:
    return hard_view(tf.constant(image), tf.constant(seed, tf.int64)).numpy()


def test_each_held_out_digit_comes_in_ten_views_that_follow_each_other(pipeline, minival):
    assert {n: pipeline.num_examples(n) for n in ("train", "minival", "test")} == {
        "train": 1293,
        "minival": 1440,
        "test": 3600,
    }
    views = {name: pipeline.views_per_image(name) for name in ("train", "minival", "test")}
    assert views == {"train": 1, "minival": 10, "test": 10}
    images, labels = upright("minival")
    np.testing.assert_array_equal(minival["label"], np.repeat(labels, VIEWS))
    source = pipeline.source.splits["minival"]
    for index in (0, 7, 1439):
        scan, view = source.parse(tf.constant(index, tf.int64))["id"].numpy().split(b".")
        assert int(view) == index % VIEWS
        expected = of(images[index // VIEWS], int(scan), int(view))
        np.testing.assert_array_equal(minival["image"][index], expected)


def test_views_do_not_depend_on_batch_or_shard(pipeline, minival):
    shard = pipeline.eval_batches("minival", batch_size=90, shard=1, num_shards=2)
    for batch in shard.take(2).as_numpy_iterator():
        np.testing.assert_array_equal(batch["image"], minival["image"][batch["index"]])


def test_views_are_the_same_on_every_machine(minival):
    """Up to rounding: the mean of the first views, as they were when results were published."""
    means = minival["image"][:5].astype(float).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, (200.85, 190.29, 197.25, 198.07, 201.88), atol=0.1)


def test_views_of_all_digits_differ_and_half_are_inverted(minival):
    assert len({image.tobytes() for image in minival["image"]}) == 1440
    corners = minival["image"][:, ::31, ::31, 0].mean(axis=(1, 2))
    assert 0.45 < np.mean(corners > 128) < 0.55
    np.testing.assert_array_equal(minival["image"][..., 0], minival["image"][..., 2])


def test_training_draws_by_position_and_repeats_nothing(pipeline):
    def batches(seed: int, start: int = 0) -> np.ndarray:
        read = pipeline.train_batches("train", batch_size=60, seed=seed, start=start)
        return np.stack([b["image"] for b in read.take(4 - start).as_numpy_iterator()])

    first = batches(0)
    np.testing.assert_array_equal(first[3:], batches(0, start=3))
    assert len({image.tobytes() for image in first.reshape(-1, SIZE, SIZE, 3)}) == 4 * 60
    assert not np.array_equal(first[0], batches(1, start=3)[0])


def test_clutter_is_of_training_digits_alone():
    """All of it: an empty image gets ink, and none of it is there if training digits are blank."""
    images, _ = upright("train")
    np.testing.assert_array_equal(hard._training_digits()[..., 0], images[..., 0])
    empty = np.zeros((SIZE, SIZE, 3), np.uint8)
    ink = [abs(of(empty, 1, n).astype(float) - np.median(of(empty, 1, n))).max() for n in range(8)]
    assert min(ink) > 40


def test_a_digit_is_turned_through_the_whole_circle(monkeypatch):
    """A bar that points from the middle to the right comes to point everywhere."""
    monkeypatch.setattr(hard, "_PIECE_INK", (0.0, 0.0))
    monkeypatch.setattr(hard, "_NOISE", 0.0)
    bar = np.zeros((SIZE, SIZE, 3), np.uint8)
    bar[14:18, 16:30] = 255
    quadrants, sizes = set(), []
    for n in range(40):
        view = of(bar, n, 0)[..., 0].astype(float)
        ink = abs(view - view[0, 0])
        y, x = (ink * np.indices(ink.shape) / ink.sum()).sum(axis=(1, 2)) - (SIZE - 1) / 2
        quadrants.add((y > 0, x > 0))
        sizes.append(ink.sum() / ink.max())
    assert len(quadrants) == 4
    assert max(sizes) > 1.2 * min(sizes)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"takes an image \(32, 32, 3\), not .*whole.image_size"):
        of(np.zeros((28, 28, 3), np.uint8), 0, 0)


def layers(network: str, num_experts: int) -> dict[str, dict]:
    """What decides how a network is trained besides its kernels, by layer."""
    bindings = [f"{network}.num_experts = {num_experts}"]
    model = build_model(config.load([str(PROXY / f"{network}.gin")], bindings), num_classes=10)
    kinds = ("Dropout", "StochasticDepth", "BatchNormalization", "PixelNormalization")
    return {
        layer.name: {k: v for k, v in layer.get_config().items() if k != "dtype"}
        for layer in model.layers
        if type(layer).__name__ in kinds
    }


@pytest.mark.parametrize(
    "network",
    [n if n == "efficientnet_b0" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
)
def test_both_twins_are_normalised_and_regularised_alike(network):
    assert len(NETWORKS) == 5
    static = layers(network, 0)
    assert static == layers(network, 8)
    assert static["normalization"]
