"""From an encoded image to the square that a network sees, as the official recipes cut it.

Sources: tensorflow/tpu, models/official/efficientnet/preprocessing.py; that of mnasnet differs in
the resize, and in a padding of 32 whatever the size.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import gin
import tensorflow as tf

from data.arguments import check
from data.augment import random_flip

RESIZES = ("legacy_bicubic", "legacy_bilinear", "bicubic", "bilinear")

Augmentation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

_CENTRE_SHARE = 0.875  # of the shorter side that evaluation looks at


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What turns an encoded image into the one that the network sees.

    Attributes:
        stages: of training, by name: each takes what the one before it returned, the first the
            encoded bytes, and a seed (2,) int32. The last returns (size, size, 3) uint8 or
            float32, 0–255.
        evaluate: encoded bytes to the same.
    """

    stages: Mapping[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]
    evaluate: Callable[[tf.Tensor], tf.Tensor]

    def train(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Runs all stages."""
        image = encoded
        for stage in self.stages.values():
            image = stage(image, seed)
        return image


@gin.register
def crops(
    image_size: int = 224,
    resize_method: str = "legacy_bicubic",
    antialias: bool = False,
    area: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    eval_padding: int | None = None,
    augmentations: Sequence[Augmentation] = (),
) -> Preprocessing:
    """The preprocessing of ImageNet: random crops and flips to train on, the centre to evaluate.

    Args:
        image_size: height and width of the result.
        resize_method, antialias: see ``resize``.
        area, aspect_ratio: bounds of the random crop; see ``distorted_box``.
        eval_padding: see ``centre_box``.
        augmentations: functions of an image (size, size, 3) uint8 and a seed, applied in turn.

    Returns:
        Images as float32; as uint8 where they are augmented, which the operations are made for.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_resize(resize_method, antialias)
    ratios_rise = 0 < aspect_ratio[0] <= aspect_ratio[1]
    padding_fits = eval_padding is None or eval_padding >= 0
    shares = "two shares above 0, rising, up to 1"
    check(
        "crops.",
        ("image_size", image_size, image_size >= 1, "at least 1 pixel"),
        ("area", area, 0 < area[0] <= area[1] <= 1, shares),
        ("aspect_ratio", aspect_ratio, ratios_rise, "two ratios, rising"),
        ("eval_padding", eval_padding, padding_fits, "pixels, or None"),
    )

    def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        def choose(extent: tf.Tensor) -> tf.Tensor:
            return distorted_box(extent, seed, image_size, area, aspect_ratio, eval_padding)

        return decode_crop(encoded, choose)

    def to_size(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        image = resize(image, image_size, resize_method, antialias)
        return random_flip(image, _branch(seed, 1))

    def evaluate(encoded: tf.Tensor) -> tf.Tensor:
        image = decode_crop(encoded, lambda extent: centre_box(extent, image_size, eval_padding))
        return resize(image, image_size, resize_method, antialias)

    stages = {"decode and crop": decode, "resize and flip": to_size}
    return Preprocessing(stages | _augmenting(augmentations), evaluate)


@gin.register
def whole(
    image_size: int = 32,
    resize_method: str = "bicubic",
    antialias: bool = False,
    augmentations: Sequence[Augmentation] = (),
) -> Preprocessing:
    """Whole images, made square: for small ones that need no cropping, such as digits.

    Args:
        image_size: height and width of the result.
        resize_method, antialias: see ``resize``.
        augmentations: functions of an image (size, size, 3) uint8 and a seed, applied in turn.

    Returns:
        Images as uint8.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_resize(resize_method, antialias)
    check("", ("image_size", image_size, image_size >= 1, "at least 1 pixel"))

    def evaluate(encoded: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return pixels(resize(image, image_size, resize_method, antialias))

    stages = {"decode and resize": lambda encoded, seed: evaluate(encoded)}
    return Preprocessing(stages | _augmenting(augmentations), evaluate)


def _branch(seed: tf.Tensor, use: int) -> tf.Tensor:
    """Returns a seed for one use of a seed: cheaper than folding, and as good, but only once."""
    return tf.add(seed, [use, 0])


def _augmenting(
    augmentations: Sequence[Augmentation],
) -> dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]:
    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        for place, augmentation in enumerate(augmentations):
            image = augmentation(pixels(image), _branch(seed, 2 + place))
        return image

    return {"augment": augment} if augmentations else {}


def pixels(image: tf.Tensor) -> tf.Tensor:
    """Returns an image as uint8, cut off as the official port does: clipped, then truncated."""
    if image.dtype == tf.uint8:
        return image
    return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)


def decode_crop(encoded: tf.Tensor, choose: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Decodes part of an image, without the rest of it where it is a JPEG.

    Args:
        encoded: bytes of a JPEG, PNG, GIF (its first frame) or BMP.
        choose: height and width, (2,) int32, to the box to decode: top, left, height and width,
            (4,) int32.

    Returns:
        (height, width, 3) uint8.
    """

    def of_jpeg() -> tf.Tensor:
        box = choose(tf.image.extract_jpeg_shape(encoded)[:2])
        return tf.image.decode_and_crop_jpeg(encoded, box, channels=3)

    def of_others() -> tf.Tensor:
        whole = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        top, left, height, width = tf.unstack(choose(tf.shape(whole)[:2]))
        return whole[top : top + height, left : left + width]

    image = tf.cond(tf.image.is_jpeg(encoded), of_jpeg, of_others)
    return tf.ensure_shape(image, (None, None, 3))


def centre_box(extent: tf.Tensor, size: int, padding: int | None = None) -> tf.Tensor:
    """Returns the central square of evaluation: top, left, height and width, (4,) int32.

    Args:
        extent: height and width of the image, (2,) int32.
        size: to which the square will be resized.
        padding: pixels around it at that size; the official share of 0.875 if None, which is 32
            at 224.
    """
    if padding is None:
        padding = round(size * (1 / _CENTRE_SHARE - 1))
    shorter = tf.cast(tf.reduce_min(extent), tf.float32)
    side = tf.cast(tf.constant(size / (size + padding), tf.float32) * shorter, tf.int32)
    return tf.concat([(extent - side + 1) // 2, [side, side]], axis=0)


def distorted_box(
    extent: tf.Tensor,
    seed: tf.Tensor,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    padding: int | None = None,
) -> tf.Tensor:
    """Returns a random crop of training (Szegedy et al., arXiv:1409.4842).

    Args:
        extent: height and width of the image, (2,) int32.
        seed: (2,) integer; decides everything.
        size: to which the crop will be resized.
        area: smallest and largest share of the image.
        aspect_ratio: smallest and largest width over height.
        padding: of the central square; see ``centre_box``.

    Returns:
        Top, left, height and width, (4,) int32: a box that ten attempts of TensorFlow's sampler
        found, or else the central square.
    """
    begin, shape, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([extent, [3]], axis=0),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=aspect_ratio,
        area_range=area,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.cond(
        tf.reduce_all(shape[:2] == extent),
        lambda: centre_box(extent, size, padding),
        lambda: tf.concat([begin[:2], shape[:2]], axis=0),
    )


def resize(
    image: tf.Tensor, size: int, method: str = "legacy_bicubic", antialias: bool = False
) -> tf.Tensor:
    """Resizes to a square.

    Args:
        image: (H, W, 3) uint8.
        size: of the result.
        method: "legacy_bicubic" is TensorFlow 1's (no half pixels, A = −0.75), which EfficientNet
            and ResNet were published with; "legacy_bilinear" is MnasNet's. "bicubic" (A = −0.5)
            and "bilinear" put pixels where everybody else does.
        antialias: whether to smooth when shrinking, as PIL does; not for the legacy methods.

    Returns:
        (size, size, 3) float32; bicubic values may lie outside of 0–255.

    Raises:
        ValueError: for an unknown method, or a legacy one with ``antialias``.
    """
    check_resize(method, antialias)
    if not method.startswith("legacy_"):
        resized = tf.image.resize(image, (size, size), method, antialias=antialias)
        return tf.cast(resized, tf.float32)
    legacy = tf.raw_ops.ResizeBicubic if method == "legacy_bicubic" else tf.raw_ops.ResizeBilinear
    return legacy(images=image[None], size=(size, size), half_pixel_centers=False)[0]


def check_resize(method: str, antialias: bool) -> None:
    """Raises a ValueError for what ``resize`` does not take."""
    check("", ("resize", method, method in RESIZES, f"one of {', '.join(RESIZES)}"))
    if antialias and method.startswith("legacy_"):
        raise ValueError(f"resize {method!r} has no antialias: take 'bicubic' or 'bilinear'")
