"""Digits made hard: turned, scaled, inverted, in clutter and noise.

Any network reads plain digits to 99 %, so they cannot tell two apart. These leave room: they are
what the proxies of ``configs/proxy`` are trained on.
"""

import dataclasses
import functools
import math

import gin
import numpy as np
import tensorflow as tf

from data.augment import projected
from data.digits import digits
from data.preprocess import whole
from data.source import Example, Source, Split, indexed

VIEWS = 10  # of each held-out digit
SIZE = 32  # of an image, in pixels

_PIECES = 2  # of clutter in an image
_PIECE_ROWS = SIZE // 2  # that are left of a digit in a piece

# Bounds of what is drawn evenly. The side is that of the square that the scan fills, in pixels.
_SIDE = (25.0, 30.0)
_PIECE_SIDE = (12.0, 20.0)
_ROOM = 0.5  # of what the side leaves of the image, that the digit moves in
_PIECE_INK = (0.2, 0.4)  # of the digit's
_CONTRAST = (0.8, 1.0)  # of ink to paper, of the whole range of grey
_NOISE = 0.03  # its deviation, of the whole range of grey

_fold = tf.random.experimental.stateless_fold_in


@gin.register
def hard_digits() -> Source:
    """The digits of ``digits``, in its splits; held-out ones as ``hard_view`` makes them.

    "train" (1,293) has the plain scans, 8×8: bind ``whole.augmentations = (@hard_view,)`` and
    ``whole.image_size = 32``. Of "minival" (144) and "test" (360) there are 10 views each, 32×32,
    that depend on the digit and the view alone. Example 10·d + v is view v of digit d, so that
    there are 1,440 and 3,600; ``views_per_image`` of these splits is 10.
    """
    plain = digits()
    views = {name: _views(plain.splits[name]) for name in ("minival", "test")}
    return dataclasses.replace(plain, name="hard_digits", splits={**plain.splits, **views})


@gin.register(denylist=["image", "seed"])
def hard_view(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Puts a digit among pieces of others, all turned, scaled and moved, dark or light, in noise.

    Pieces are halves of training digits, fainter than the digit. What is drawn evenly: angles from
    the whole circle; the side of the digit from 25 to 30 pixels, and its place within the image;
    one half of the images inverted.

    Turned through the whole circle, a 6 can look like a 9. They are a fifth of all digits, so this
    could cost up to a tenth of the accuracy, but in most scans their tails differ.

    Args:
        image: (32, 32, 3) uint8, a digit light on black.
        seed: (2,) integer; decides everything.

    Returns:
        (32, 32, 3) uint8, grey.

    Raises:
        ValueError: for an image of another shape.
    """
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(
            f"hard_view takes an image ({SIZE}, {SIZE}, 3), not {image.shape}: "
            f"set whole.image_size = {SIZE}"
        )
    drawn = tf.random.stateless_uniform([_PIECES + 2, 7], _fold(seed, 0), alg="philox")
    pieces = _pieces(drawn[2:, 4], drawn[2:, 5], drawn[2:, 6])
    digit = tf.cast(image[None, ..., :1], tf.float32) / 255
    shapes = tf.concat([digit, pieces], axis=0)
    ink = tf.reduce_max(_moved(shapes, drawn[1:, :4]), axis=0)
    noise = tf.random.stateless_normal([SIZE, SIZE, 1], _fold(seed, 1), alg="philox")
    grey = _printed(ink, drawn[0]) + _NOISE * noise
    return tf.tile(tf.cast(tf.clip_by_value(tf.round(grey * 255), 0, 255), tf.uint8), [1, 1, 3])


def _pieces(which: tf.Tensor, where: tf.Tensor, ink: tf.Tensor) -> tf.Tensor:
    """Returns halves of training digits, (pieces, 32, 32, 1), by draws (pieces,) from 0 to 1.

    Cut along the rows, since a piece is turned through the whole circle anyway.
    """
    known = _training_digits()
    chosen = tf.gather(tf.constant(known), tf.cast(which * float(len(known)), tf.int32))
    first = tf.round(where * (SIZE - _PIECE_ROWS))[:, None]
    rows = tf.range(SIZE, dtype=tf.float32)
    left = (rows >= first) & (rows < first + _PIECE_ROWS)
    strength = (_PIECE_INK[0] + ink * (_PIECE_INK[1] - _PIECE_INK[0])) / 255
    kept = tf.cast(left, tf.float32) * strength[:, None]
    return tf.cast(chosen, tf.float32) * kept[:, :, None, None]


def _moved(shapes: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """Returns the ink of the digit, first, and of its clutter where each lands.

    Args:
        shapes: (1 + pieces, 32, 32, 1).
        drawn: (1 + pieces, 4) from 0 to 1: angle, side, and the place along both axes.
    """
    low, high = tf.unstack(tf.constant([_SIDE] + [_PIECE_SIDE] * _PIECES), axis=1)
    side = low + drawn[:, 1] * (high - low)
    # The digit stays near the middle; pieces may hang over the edge.
    room = tf.concat([[_ROOM * (SIZE - side[0])], tf.fill([_PIECES], float(SIZE))], axis=0)
    middle = (SIZE - 1) / 2
    x, y = (middle + (drawn[:, axis] - 0.5) * room for axis in (2, 3))
    angle = drawn[:, 0] * (2 * math.pi)
    cos, sin = tf.cos(angle) * SIZE / side, tf.sin(angle) * SIZE / side
    # Where each output pixel comes from.
    across, down = middle - cos * x + sin * y, middle - sin * x - cos * y
    return projected(shapes, (cos, -sin, across, sin, cos, down), "BILINEAR")


def _printed(ink: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """Returns the grey of each pixel from 0 to 1: light ink on black, or dark ink on white."""
    grey = ink * (_CONTRAST[0] + drawn[0] * (_CONTRAST[1] - _CONTRAST[0]))
    return tf.where(drawn[1] < 0.5, grey, 1 - grey)


def _views(split: Split) -> Split:
    upright = whole(SIZE).evaluate

    def example(index: tf.Tensor) -> Example:
        record, view = split.parse(index // VIEWS), index % VIEWS
        seed = tf.stack([tf.strings.to_number(record["id"], tf.int64), view])
        image = hard_view(upright(record["image"]), seed)
        name = tf.strings.join([record["id"], tf.strings.as_string(view)], ".")
        return record | {"image": tf.io.encode_png(image[..., :1]), "id": name}

    return indexed(VIEWS * split.num_examples, example, views_per_image=VIEWS)


@functools.cache
def _training_digits() -> np.ndarray:
    """Returns them as training sees them, (1293, 32, 32, 1) uint8."""
    with tf.init_scope():  # a map of tf.data may be what asks for them
        split, upright = digits().splits["train"], whole(SIZE).evaluate
        images = [upright(split.parse(i)["image"])[..., :1] for i in range(split.num_examples)]
        return tf.stack(images).numpy()
