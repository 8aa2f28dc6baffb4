"""Random changes to an image, each a pure function of the image and a seed."""

import math

import tensorflow as tf


def shift_and_rotate(
    image: tf.Tensor, seed: tf.Tensor, max_shift: float, max_degrees: float
) -> tf.Tensor:
    """Moves and turns an image about its centre, filling with black.

    Args:
        image: (H, W, C) uint8.
        seed: (2,) integer.
        max_shift: share of height and width by which it moves at most, to either side.
        max_degrees: by which it turns at most, to either side.

    Returns:
        (H, W, C) uint8.
    """
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    draw = tf.random.stateless_uniform([3], seed, -1, 1)
    angle = draw[0] * max_degrees * (math.pi / 180)
    shift = draw[1:] * max_shift * size
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = (size[0] - 1) / 2, (size[1] - 1) / 2
    # Where each output pixel comes from: turned about the centre, then moved.
    transform = [
        cos, -sin, x - cos * x + sin * y + shift[1],
        sin, cos, y - sin * x - cos * y + shift[0],
        0.0, 0.0,
    ]  # fmt: skip
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image, tf.float32)[None],
        transforms=tf.stack(transform)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]
    moved = tf.cast(tf.clip_by_value(tf.round(moved), 0, 255), tf.uint8)
    return tf.ensure_shape(moved, image.shape)
