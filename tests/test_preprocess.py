"""Cropping and resizing: the evaluation images of the official code, to the grey level."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from data import preprocess

# Five JPEGs, and what the official code made of them, in 64ths of a grey level.
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "preprocess.npz")
OUTPUTS = [key for key in GOLDEN.files if not key.startswith("jpeg")]


def jpeg(number: int | str) -> bytes:
    return GOLDEN[f"jpeg{number}"].tobytes()


@pytest.mark.parametrize("key", OUTPUTS)
def test_evaluation_images_are_those_of_the_official_code(key):
    recipe, number = key.split("_")
    size, mnasnet = int(recipe[-3:]), recipe.startswith("mnas")
    encoded = jpeg(number)
    method = "legacy_bilinear" if mnasnet else "legacy_bicubic"
    recipe = preprocess.crops(size, method, eval_padding=32 if mnasnet else None)
    np.testing.assert_allclose(recipe.evaluate(encoded).numpy(), GOLDEN[key] / 64, atol=0.01)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(375, 500, (24, 86, 328, 328)), (500, 333, (105, 21, 291, 291)), (80, 101, (5, 16, 70, 70))],
)
def test_the_central_square(height, width, box):
    assert tuple(preprocess.centre_box(tf.constant([height, width]), 224).numpy()) == box


def test_a_crop_lies_within_the_image_and_follows_its_seed():
    extent = tf.constant([90, 120])
    boxes = [preprocess.distorted_box(extent, [seed, 0], 64).numpy() for seed in range(300)]
    boxes = np.array(boxes)
    top, left, height, width = boxes.T
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 90) & (left + width <= 120))
    share, aspect = height * width / (90 * 120), width / height
    centre = (height == width) & (height == int(preprocess.centre_box(extent, 64)[2]))
    assert np.all((share[~centre] > 0.09) & (aspect[~centre] > 0.70) & (aspect[~centre] < 1.4))
    assert len({tuple(box) for box in boxes}) > 250
    again = preprocess.distorted_box(extent, [7, 0], 64)
    np.testing.assert_array_equal(again, boxes[7])


def test_where_no_crop_fits_it_is_the_central_square():
    extent = tf.constant([10, 1000])
    box = preprocess.distorted_box(extent, [0, 0], 224)
    np.testing.assert_array_equal(box, preprocess.centre_box(extent, 224))


def test_any_format_is_cut_where_a_jpeg_would_be():
    whole = tf.io.decode_jpeg(jpeg(3), channels=3)
    png = tf.io.encode_png(whole).numpy()
    seen = []

    def choose(extent: tf.Tensor) -> tf.Tensor:
        seen.append(tuple(extent.numpy()))
        return tf.constant([5, 16, 70, 60])

    got = preprocess.decode_crop(png, choose).numpy()
    np.testing.assert_array_equal(got, whole.numpy()[5:75, 16:76])
    # Cutting before decoding differs at the edges alone, where chroma is interpolated.
    inner = preprocess.decode_crop(jpeg(3), choose).numpy()[:, 1:-1]
    np.testing.assert_array_equal(inner, whole.numpy()[5:75, 17:75])
    assert seen == [(80, 101), (80, 101)]


def test_grey_images_become_three_channels():
    grey = tf.io.encode_jpeg(tf.zeros((20, 20, 1), tf.uint8)).numpy()
    assert preprocess.decode_crop(grey, lambda _: tf.constant([0, 0, 20, 20])).shape == (20, 20, 3)


@pytest.mark.parametrize("method", preprocess.RESIZES)
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_a_constant_image_keeps_it(method, antialias):
    image = tf.fill((37, 53, 3), tf.constant(99, tf.uint8))
    if antialias and method.startswith("legacy"):
        with pytest.raises(ValueError, match="has no antialias"):
            preprocess.resize(image, 16, method, antialias)
        return
    resized = preprocess.resize(image, 16, method, antialias)
    np.testing.assert_allclose(resized.numpy(), np.full((16, 16, 3), 99.0), atol=0.01)


def test_an_unknown_resize_is_named():
    with pytest.raises(ValueError, match="resize takes one of legacy_bicubic"):
        preprocess.resize(tf.zeros((4, 4, 3), tf.uint8), 2, "lanczos")
