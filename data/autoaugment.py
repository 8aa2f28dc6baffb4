"""AutoAugment and RandAugment for ``tf.data``, stateless, on uint8 images.

The sixteen operations and policy v0 are those of tensorflow/tpu, models/official/efficientnet
(autoaugment.py), made for Cubuk et al., arXiv:1805.09501 and arXiv:1909.13719. That port had
defects, and the published accuracies were reached with them. So there are two variants:

- "published" keeps them: contrast fades towards the constant H·W/256 instead of the mean grey;
  solarize with a threshold of 256 wraps around and inverts the whole image; posterize to 0 bits
  keeps 1; posterize to more than 8 bits keeps 1 as well.
- "corrected" fades towards the mean grey, leaves an image alone that is solarized from 256 on, and
  keeps all of an image that is posterized to 8 bits or more, and nothing of one to 0 bits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import gin
import numpy as np
import tensorflow as tf

from data.arguments import check
from data.augment import projected

VARIANTS = ("published", "corrected")

_FILL = 128
_CENTRE = 100  # what a seed is folded with for the centre of a cutout
_GREY = np.float32([0.2989, 0.5870, 0.1140])  # of red, green and blue
_SMOOTH = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / np.float32(13)


def invert(image: tf.Tensor) -> tf.Tensor:
    """Returns the negative of (H, W, 3) uint8."""
    return 255 - image


def solarize(image: tf.Tensor, threshold: tf.Tensor, variant: str = "published") -> tf.Tensor:
    """Inverts all values of at least ``threshold``."""
    threshold = tf.cast(threshold, tf.int32)
    if variant == "published":
        threshold = threshold % 256  # it was cast to uint8
    last = tf.cast(tf.clip_by_value(threshold - 1, 0, 255), tf.uint8)  # that may stay
    inverted = tf.cast(image > last, tf.uint8) | tf.cast(threshold < 1, tf.uint8)
    return image ^ inverted * 255


def solarize_add(image: tf.Tensor, addition: tf.Tensor) -> tf.Tensor:
    """Adds to all values below 128, up to 255."""
    addition = tf.cast(tf.clip_by_value(tf.cast(addition, tf.int32), 0, 255), tf.uint8)
    room = tf.minimum(addition, 255 - image)
    return image + room * tf.cast(image < 128, tf.uint8)


def posterize(image: tf.Tensor, bits: tf.Tensor, variant: str = "published") -> tf.Tensor:
    """Keeps the highest ``bits`` of each value."""
    bits = tf.cast(bits, tf.int32)
    if variant == "published":
        shift = tf.where((bits < 1) | (bits > 8), 7, 8 - bits)
    else:
        shift = 8 - tf.clip_by_value(bits, 0, 8)
    mask = tf.bitwise.left_shift(255, shift) % 256
    return image & tf.cast(mask, tf.uint8)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel from its darkest and brightest value to 0 and 255."""
    channels = []
    for channel in tf.unstack(image, axis=-1):
        low = tf.cast(tf.reduce_min(channel), tf.float32)
        high = tf.cast(tf.reduce_max(channel), tf.float32)
        flat = low == high
        scale = tf.where(flat, 1.0, 255 / tf.maximum(high - low, 1))
        stretched = tf.cast(channel, tf.float32) * scale - tf.where(flat, 0.0, low * scale)
        channels.append(tf.clip_by_value(stretched, 0, 255))
    return tf.cast(tf.stack(channels, axis=-1), tf.uint8)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes the values of each channel about equally frequent, as PIL does."""
    places = tf.reshape(tf.cast(image, tf.int32), [-1]) + _channel_offsets(image)
    counts = tf.raw_ops.Bincount(arr=places, size=768, weights=tf.constant([], tf.int32))
    counts = tf.reshape(counts, (3, 256))
    last = tf.reduce_max(tf.where(counts > 0, tf.range(256), -1), axis=1)
    step = (tf.reduce_sum(counts, axis=1) - tf.gather(counts, last, batch_dims=1)) // 255
    below = tf.cumsum(counts, axis=1, exclusive=True)
    table = (below + step[:, None] // 2) // tf.maximum(step, 1)[:, None]
    table = tf.where(step[:, None] > 0, tf.clip_by_value(table, 0, 255), tf.range(256))
    looked_up = tf.gather_nd(tf.reshape(tf.cast(table, tf.uint8), [-1]), places[:, None])
    return tf.reshape(looked_up, tf.shape(image))


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Fades towards grey (0) or away from it (above 1)."""
    return _blend(_grey(image), image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor, variant: str = "published") -> tf.Tensor:
    """Fades towards one grey (0) or away from it (above 1)."""
    if variant == "published":
        pixels = tf.cast(tf.size(image) // 3, tf.float32)
        grey = tf.minimum(pixels / 256, 255)
    else:
        grey = tf.reduce_mean(_grey(image))
    return _blend(tf.floor(grey), image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Fades towards black (0) or away from it (above 1)."""
    return _blend(tf.constant(0.0), image, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Fades towards a smoothed image (0) or away from it (above 1); the border stays."""
    pixels = tf.cast(image, tf.float32)
    height, width = tf.unstack(tf.shape(image)[:2] - 2)
    # One after the other, as the official port's convolution did: another order rounds otherwise.
    smooth = tf.constant(0.0)
    for (row, column), weight in np.ndenumerate(_SMOOTH):
        smooth += pixels[row : row + height, column : column + width] * weight
    smooth = tf.cast(tf.clip_by_value(smooth, 0, 255), tf.uint8)
    inside = tf.pad(tf.ones_like(smooth), ((1, 1), (1, 1), (0, 0))) > 0
    smooth = tf.where(inside, tf.pad(smooth, ((1, 1), (1, 1), (0, 0))), image)
    return _blend(tf.cast(smooth, tf.float32), image, factor)


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """Turns about the centre."""
    angle = tf.cast(degrees, tf.float32) * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32) - 1)
    x = (width - (cos * width - sin * height)) / 2
    y = (height - (sin * width + cos * height)) / 2
    return _transform(image, (cos, -sin, x, sin, cos, y))


def shear_x(image: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """Shifts each row by ``slope`` times its distance from the top."""
    return _transform(image, (1.0, slope, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """Shifts each column by ``slope`` times its distance from the left."""
    return _transform(image, (1.0, 0.0, 0.0, slope, 1.0, 0.0))


def translate_x(image: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """Shifts to the left."""
    return _transform(image, (1.0, 0.0, pixels, 0.0, 1.0, 0.0))


def translate_y(image: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """Shifts up."""
    return _transform(image, (1.0, 0.0, 0.0, 0.0, 1.0, pixels))


def cutout(image: tf.Tensor, half: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greys a square of 2·half, clipped at the border, about a random centre."""
    size = tf.shape(image)[:2]
    draw = tf.random.stateless_uniform([2], seed)
    centre = tf.cast(draw * tf.cast(size, tf.float32), tf.int32)
    half = tf.cast(half, tf.int32)
    rows, columns = (
        (tf.range(size[axis]) >= centre[axis] - half) & (tf.range(size[axis]) < centre[axis] + half)
        for axis in (0, 1)
    )
    inside = rows[:, None, None] & columns[None, :, None]
    return tf.where(inside, tf.constant(_FILL, tf.uint8), image)


# What follows is written for speed: on a CPU, TensorFlow takes ten times as long to broadcast over
# three channels, to select or to look up as it takes for plain arithmetic on whole images.


def _channel_offsets(image: tf.Tensor) -> tf.Tensor:
    """Returns 256 times the channel of each value of an image, flat."""
    pixels = image.shape[:2].num_elements()
    if pixels is None:
        return tf.tile(tf.range(3) * 256, [tf.size(image) // 3])
    return tf.constant(np.tile(np.arange(3, dtype=np.int32) * 256, pixels))


def _grey(image: tf.Tensor) -> tf.Tensor:
    """Returns ``tf.image.rgb_to_grayscale`` in each channel, as float32."""
    shares = tf.reshape(tf.cast(image, tf.float32) * (1 / 255), (-1, 3))
    grey = tf.matmul(shares, tf.constant(np.repeat(_GREY[:, None], 3, axis=1)))
    return tf.reshape(tf.floor(grey * 255.5), tf.shape(image))


def _blend(degenerate: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Returns degenerate + factor · (image − degenerate), cut off to uint8.

    Args:
        degenerate: whole numbers as float32, of the image's shape or one for all.
    """
    blended = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    blended = tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)
    return tf.cond(tf.equal(factor, 1.0), lambda: image, lambda: blended)


def _transform(image: tf.Tensor, rows: tuple) -> tf.Tensor:
    return projected(image[None], rows, "NEAREST", _FILL)[0]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and what a level of 0 to 10 means to it.

    Attributes:
        apply: (image, value) to image; (image, value, seed) for cutout.
        scale: value at level 10.
        offset: value at level 0.
        whole: whether the value is rounded down to an integer.
        signed: whether the value is negated half of the time.
        variants: whether ``apply`` takes ``variant``.
    """

    apply: Callable[..., tf.Tensor]
    scale: float = 0.0
    offset: float = 0.0
    whole: bool = False
    signed: bool = False
    variants: bool = False


_Enhancement = functools.partial(Operation, scale=1.8, offset=0.1)
_Geometric = functools.partial(Operation, signed=True)

# In the order in which RandAugment draws from them.
OPERATIONS = {
    "AutoContrast": Operation(lambda image, value: autocontrast(image)),
    "Equalize": Operation(lambda image, value: equalize(image)),
    "Invert": Operation(lambda image, value: invert(image)),
    "Rotate": _Geometric(rotate, scale=30.0),
    "Posterize": Operation(posterize, scale=4.0, whole=True, variants=True),
    "Solarize": Operation(solarize, scale=256.0, whole=True, variants=True),
    "Color": _Enhancement(color),
    "Contrast": _Enhancement(contrast, variants=True),
    "Brightness": _Enhancement(brightness),
    "Sharpness": _Enhancement(sharpness),
    "ShearX": _Geometric(shear_x, scale=0.3),
    "ShearY": _Geometric(shear_y, scale=0.3),
    "TranslateX": _Geometric(translate_x),
    "TranslateY": _Geometric(translate_y),
    "Cutout": Operation(cutout, whole=True),
    "SolarizeAdd": Operation(solarize_add, scale=110.0, whole=True),
}

# Pixels at level 10 of the operations whose reach depends on the algorithm: AutoAugment's and
# RandAugment's.
_REACH = {"TranslateX": (250.0, 100.0), "TranslateY": (250.0, 100.0), "Cutout": (100.0, 40.0)}

# Sub-policies of two operations, each with its probability and level.
POLICY_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


@gin.register(denylist=["image", "seed"])
def auto_augment(image: tf.Tensor, seed: tf.Tensor, variant: str = "published") -> tf.Tensor:
    """Applies one of the 25 sub-policies of ImageNet policy v0, drawn evenly.

    Args:
        image: (H, W, 3) uint8.
        seed: (2,) integer; decides everything.
        variant: "published" or "corrected".

    Returns:
        (H, W, 3) uint8.
    """
    _check_variant(variant)
    # All draws at once: one call of the generator costs as much as posterizing.
    longest = max(len(sub_policy) for sub_policy in POLICY_V0)
    chosen, *draws = tf.unstack(tf.random.stateless_uniform([1 + 2 * longest], seed))
    choice = tf.cast(chosen * len(POLICY_V0), tf.int32)

    def sub_policy(index: int) -> tf.Tensor:
        changed = image
        for place, (name, probability, level) in enumerate(POLICY_V0[index]):
            occurs, sign = draws[2 * place : 2 * place + 2]
            arguments = (name, changed, level, sign, seed, variant)
            change = functools.partial(_apply, *arguments, algorithm=0)
            unchanged = functools.partial(tf.identity, changed)
            changed = tf.cond(occurs + probability >= 1, change, unchanged)
        return changed

    branches = [functools.partial(sub_policy, index) for index in range(len(POLICY_V0))]
    return tf.ensure_shape(tf.switch_case(choice, branches), image.shape)


@gin.register(denylist=["image", "seed"])
def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    layers: int = 2,
    magnitude: float = 10.0,
    variant: str = "published",
) -> tf.Tensor:
    """Applies ``layers`` of the sixteen operations, each drawn evenly, at one magnitude.

    Args:
        image: (H, W, 3) uint8.
        seed: (2,) integer; decides everything.
        layers: operations in a row.
        magnitude: level of all of them, 0 to 10, or more to go beyond AutoAugment's range.
        variant: "published" or "corrected".

    Returns:
        (H, W, 3) uint8.
    """
    _check_variant(variant)
    changed = image
    draws = tf.unstack(tf.random.stateless_uniform([layers, 2], seed))
    for layer, (chosen, sign) in enumerate(map(tf.unstack, draws)):
        key = tf.random.experimental.stateless_fold_in(seed, layer)
        choice = tf.cast(chosen * len(OPERATIONS), tf.int32)
        branches = [
            functools.partial(_apply, name, changed, magnitude, sign, key, variant, algorithm=1)
            for name in OPERATIONS
        ]
        changed = tf.ensure_shape(tf.switch_case(choice, branches), image.shape)
    return changed


def _check_variant(variant: str) -> None:
    check("", ("variant", variant, variant in VARIANTS, f"one of {', '.join(VARIANTS)}"))


def _apply(
    name: str,
    image: tf.Tensor,
    level: float,
    sign: tf.Tensor,
    seed: tf.Tensor,
    variant: str,
    algorithm: int,
) -> tf.Tensor:
    """Applies an operation at a level; below ½, ``sign`` negates the value where it has a sign."""
    operation = OPERATIONS[name]
    scale = _REACH[name][algorithm] if name in _REACH else operation.scale
    value = operation.offset + scale * level / 10
    value = float(int(value)) if operation.whole else value
    if operation.signed:
        value = tf.where(sign < 0.5, -value, value)
    if operation.apply is cutout:
        return cutout(image, value, tf.random.experimental.stateless_fold_in(seed, _CENTRE))
    extra = {"variant": variant} if operation.variants else {}
    return operation.apply(image, value, **extra)
