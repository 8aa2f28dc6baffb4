"""Random changes to an image, each a pure function of the image and a seed."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence

import gin
import tensorflow as tf

from data.arguments import check

FILLS = ("noise", "constant")

# Mean and deviation of ImageNet's pixels, and the weights of red, green and blue in a grey
# (ITU-R BT.601). The first two are in grey levels of 0 to 255.
_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_GREY = (0.2989, 0.5870, 0.1140)

_ATTEMPTS = 10
_MOST = 1000  # of strengths and ratios, so that float32 does not overflow
_TWO_RATIOS = f"two above 0 and up to {_MOST}, rising"

_fold = tf.random.experimental.stateless_fold_in


@gin.register(denylist=["image", "seed"])
def shift_and_rotate(
    image: tf.Tensor, seed: tf.Tensor, max_shift: float = 0.1, max_degrees: float = 10.0
) -> tf.Tensor:
    """Moves and turns an image about its centre, filling with black.

    Args:
        image: (H, W, C) uint8.
        seed: (2,) integer.
        max_shift: share of height and width by which it moves at most, to either side.
        max_degrees: by which it turns at most, to either side.

    Returns:
        (H, W, C) uint8.

    Raises:
        ValueError: if a bound is negative.
    """
    if max_shift < 0 or max_degrees < 0:
        raise ValueError(
            "shift_and_rotate: max_shift and max_degrees take no negative number, "
            f"not {max_shift} and {max_degrees}"
        )
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    draw = tf.random.stateless_uniform([3], seed, -1, 1)
    angle = draw[0] * max_degrees * (math.pi / 180)
    shift = draw[1:] * max_shift * size
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = (size[0] - 1) / 2, (size[1] - 1) / 2
    # Where each output pixel comes from: turned about the centre, then moved.
    across = (cos, -sin, x - cos * x + sin * y + shift[1])
    down = (sin, cos, y - sin * x - cos * y + shift[0])
    moved = projected(tf.cast(image, tf.float32)[None], (*across, *down), "BILINEAR")[0]
    return _as_type(moved, tf.uint8)


def projected(
    images: tf.Tensor, rows: Sequence[tf.Tensor | float], interpolation: str, fill: float = 0.0
) -> tf.Tensor:
    """Looks up each output pixel (x, y) at (a·x + b·y + c, d·x + e·y + f).

    Args:
        images: (B, H, W, C).
        rows: a to f, scalars, or (B,) each.
        interpolation: "NEAREST" or "BILINEAR".
        fill: what there is outside of an image.
    """
    zero = tf.zeros_like(rows[0])
    transforms = tf.stack([tf.cast(value, tf.float32) for value in (*rows, zero, zero)], axis=-1)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.reshape(transforms, (-1, 8)),
        output_shape=tf.shape(images)[1:3],
        fill_value=fill,
        interpolation=interpolation,
        fill_mode="CONSTANT",
    )
    return tf.ensure_shape(moved, images.shape)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Swaps left and right, half of the time.

    Args:
        image: (H, W, 3) uint8 or float32, of any values.
        seed: (2,) integer; decides everything.

    Returns:
        The like of ``image``.

    Raises:
        ValueError: for an image of another shape or type.
    """
    image = _checked("random_flip", image)
    happens = tf.random.stateless_uniform([], seed) < 0.5
    return tf.cond(happens, lambda: tf.reverse(image, [1]), lambda: tf.identity(image))


@gin.register(denylist=["image", "seed"])
def random_erasing(
    image: tf.Tensor,
    seed: tf.Tensor,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect_ratio: tuple[float, float] = (0.3, 3.3),
    fill: str = "noise",
) -> tf.Tensor:
    """Blots out a rectangle (Zhong et al., arXiv:1708.04896), as timm 1.0 draws it.

    Of ten attempts, each with an area drawn evenly and an aspect ratio drawn evenly in its
    logarithm, the first counts that is both lower and narrower than the image. If there is none,
    the image stays.

    Args:
        image: (H, W, 3) uint8 or float32, 0–255.
        seed: (2,) integer; decides everything.
        probability: of erasing.
        area: smallest and largest share of the image.
        aspect_ratio: smallest and largest height over width.
        fill: "noise" draws each value from a normal distribution with ImageNet's mean and
            deviation, cut off at 0 and 255 where the image is uint8; "constant" is that mean.

    Returns:
        The like of ``image``.

    Raises:
        ValueError: for an image of another shape or type, or an argument out of range.
    """
    check(
        "random_erasing.",
        ("probability", probability, _within(probability, 0, 1), "a number from 0 to 1"),
        ("area", area, _rising(area, 1), "two shares above 0 and up to 1, rising"),
        ("aspect_ratio", aspect_ratio, _rising(aspect_ratio), _TWO_RATIOS),
        ("fill", fill, fill in FILLS, f"one of {', '.join(FILLS)}"),
    )
    image = _checked("random_erasing", image)
    happens = tf.random.stateless_uniform([], _fold(seed, 0)) < probability

    def erased() -> tf.Tensor:
        begin, extent = _rectangle(tf.shape(image)[:2], _fold(seed, 1), area, aspect_ratio)
        patch = _patch(extent, _fold(seed, 2), fill)
        return _pasted(image, _as_type(patch, image.dtype), begin)

    changed = tf.cond(happens, erased, lambda: tf.identity(image))
    return tf.ensure_shape(changed, image.shape)


def _rectangle(
    size: tf.Tensor, seed: tf.Tensor, area: tuple[float, float], aspect_ratio: tuple[float, float]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (top, left) and (height, width), the latter 0 if no attempt fits."""
    limit = tf.cast(size, tf.float32)
    share, stretch = tf.unstack(tf.random.stateless_uniform([2, _ATTEMPTS], _fold(seed, 0)))
    pixels = (area[0] + share * (area[1] - area[0])) * tf.reduce_prod(limit)
    least, most = (math.log(bound) for bound in aspect_ratio)
    aspect = tf.exp(least + stretch * (most - least))
    extents = tf.round(tf.sqrt(tf.stack([pixels * aspect, pixels / aspect], axis=1)))
    fits = tf.reduce_all(extents < limit, axis=1)
    first = tf.reduce_min(tf.where(fits, tf.range(_ATTEMPTS), _ATTEMPTS))
    extent = tf.pad(extents, ((0, 1), (0, 0)))[first]
    begin = tf.random.stateless_uniform([2], _fold(seed, 1)) * (limit - extent + 1)
    return tf.cast(begin, tf.int32), tf.cast(extent, tf.int32)


def _patch(extent: tf.Tensor, seed: tf.Tensor, fill: str) -> tf.Tensor:
    shape = tf.concat([extent, [3]], 0)
    if fill == "constant":
        return tf.broadcast_to(_MEAN, shape)
    return _MEAN + _DEVIATION * tf.random.stateless_normal(shape, seed)


def _pasted(image: tf.Tensor, patch: tf.Tensor, begin: tf.Tensor) -> tf.Tensor:
    begin = tf.pad(begin, [[0, 1]])
    paddings = tf.stack([begin, tf.shape(image) - begin - tf.shape(patch)], axis=1)
    inside = tf.pad(tf.ones_like(patch, tf.bool), paddings)
    return tf.where(inside, tf.pad(patch, paddings), image)


@gin.register(denylist=["image", "seed"])
def color_jitter(
    image: tf.Tensor,
    seed: tf.Tensor,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue in a random order, as torchvision does.

    The first three fade towards black, the mean grey and each pixel's own grey (factor 0), or
    away from them (above 1). A factor is drawn evenly from 1 ± the strength, but never below 0.
    Each change is cut off at 0 and 255. One whose strength is 0 costs nothing, and leaves what is
    drawn for the others as it is.

    Args:
        image: (H, W, 3) uint8 or float32, 0–255.
        seed: (2,) integer; decides everything.
        brightness, contrast, saturation: strengths.
        hue: by which the colour circle turns at most, to either side, in whole turns.

    Returns:
        The like of ``image``; only uint8 is rounded, in the end.

    Raises:
        ValueError: for an image of another shape or type, or an argument out of range.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, value in strengths.items():
        allowed = f"a number from 0 to {_MOST}"
        check("color_jitter.", (name, value, _within(value, 0, _MOST), allowed))
    check("color_jitter.", ("hue", hue, _within(hue, 0, 0.5), "a number of turns from 0 to 0.5"))
    image = _checked("color_jitter", image)
    bounds = [(max(0.0, 1 - x), 1.0 + x) for x in strengths.values()]
    draws = tf.unstack(tf.random.stateless_uniform([4], _fold(seed, 0)))
    changes = [
        functools.partial(change, amount=low + draw * (high - low))
        for change, draw, (low, high) in zip(_CHANGES, draws, [*bounds, (-hue, hue)], strict=True)
        if low < high
    ]
    if not changes:
        return tf.identity(image)
    changed = _in_random_order(tf.cast(image, tf.float32), _fold(seed, 1), changes)
    return tf.ensure_shape(_as_type(changed, image.dtype), image.shape)


def _in_random_order(
    pixels: tf.Tensor, seed: tf.Tensor, changes: Sequence[Callable[[tf.Tensor], tf.Tensor]]
) -> tf.Tensor:
    order = tf.random.experimental.stateless_shuffle(tf.range(len(changes)), seed)
    for place in range(len(changes)):
        branches = [functools.partial(change, pixels) for change in changes]
        pixels = tf.clip_by_value(tf.switch_case(order[place], branches), 0, 255)
    return pixels


def _faded(pixels: tf.Tensor, towards: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    return towards + amount * (pixels - towards)


# Of brightness, contrast, saturation and hue.
_CHANGES: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = (
    lambda pixels, amount: pixels * amount,
    lambda pixels, amount: _faded(pixels, tf.reduce_mean(_grey(pixels)), amount),
    lambda pixels, amount: _faded(pixels, _grey(pixels), amount),
    lambda pixels, amount: tf.raw_ops.AdjustHue(images=pixels, delta=amount),
)


def _grey(pixels: tf.Tensor) -> tf.Tensor:
    """Returns (H, W, 1)."""
    return tf.reduce_sum(pixels * _GREY, axis=-1, keepdims=True)


def _as_type(pixels: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns float32 as it is, or rounded and cut off to uint8."""
    if dtype == tf.float32:
        return pixels
    return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), dtype)


def _checked(function: str, image: tf.Tensor) -> tf.Tensor:
    image = tf.convert_to_tensor(image)
    is_image = image.shape.is_compatible_with((None, None, 3))
    if not is_image or image.dtype not in (tf.uint8, tf.float32):
        raise ValueError(
            f"{function} takes an image (height, width, 3) uint8 or float32, "
            f"not {image.shape} {image.dtype.name}"
        )
    return image


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, numbers.Real) and low <= value <= high


def _rising(pair: object, most: float = _MOST) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(_within(value, 0, most) for value in pair) and 0 < pair[0] <= pair[1]
