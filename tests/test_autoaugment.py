"""AutoAugment: the operations are those of the official port, value for value."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from data import autoaugment

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "autoaugment_operations.npz")
CASES = [key for key in GOLDEN.files if key.startswith("op:")]
GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_is_that_of_the_official_port(case):
    name, argument, image = case.removeprefix("op:").split("|")
    arguments = [float(argument)] if argument else []
    got = getattr(autoaugment, name)(tf.constant(GOLDEN[f"image{image}"]), *arguments).numpy()
    wanted = GOLDEN[case]
    assert got.dtype == np.uint8
    if name in GEOMETRIC:  # which of two pixels is nearest may differ at an edge
        assert np.mean(np.all(got == wanted, axis=-1)) >= 0.99
    else:
        np.testing.assert_array_equal(got, wanted)


def photo(height: int = 61, width: int = 48) -> tf.Tensor:
    rng = np.random.default_rng(0)
    return tf.constant(rng.integers(30, 220, (height, width, 3)), tf.uint8)


FIXES = {
    "contrast": (0.0, lambda image: np.full_like(image, int(np.mean(grey(image))))),
    "solarize": (256.0, lambda image: image),
    "posterize": (0.0, np.zeros_like),
}


def grey(image: np.ndarray) -> np.ndarray:
    return tf.image.rgb_to_grayscale(image).numpy()


@pytest.mark.parametrize("name", FIXES)
def test_the_corrected_variant_differs_where_the_port_was_wrong(name):
    value, wanted = FIXES[name]
    image = photo()
    corrected = getattr(autoaugment, name)(image, value, variant="corrected").numpy()
    published = getattr(autoaugment, name)(image, value).numpy()
    np.testing.assert_array_equal(corrected, wanted(image.numpy()))
    assert not np.array_equal(corrected, published)


def test_a_seed_repeats_itself_and_compiled_equals_eager():
    image = photo()
    for function in (autoaugment.auto_augment, autoaugment.rand_augment):
        compiled = tf.function(function)
        outputs = [function(image, [seed, 1]).numpy() for seed in range(8)]
        assert any(not np.array_equal(outputs[0], output) for output in outputs[1:])
        for seed, output in enumerate(outputs):
            np.testing.assert_array_equal(output, compiled(image, tf.constant([seed, 1])).numpy())


def test_cutout_greys_a_square_and_no_more():
    image = tf.zeros((40, 40, 3), tf.uint8)
    for seed in range(20):
        grey_pixels = np.all(autoaugment.cutout(image, 5, [seed, 0]).numpy() == 128, axis=-1)
        rows, columns = np.where(grey_pixels)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert grey_pixels.sum() == height * width
        assert 5 <= min(height, width) <= max(height, width) <= 10


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="published, corrected, not 'fixed'"):
        autoaugment.auto_augment(photo(), [0, 0], variant="fixed")
