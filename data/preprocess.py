"""From an encoded image to the square that a network sees, as the official recipes cut it.

Sources: tensorflow/tpu, models/official/efficientnet/preprocessing.py; that of mnasnet differs in
the resize, and in a padding of 32 whatever the size.
"""

import tensorflow as tf

RESIZES = ("legacy_bicubic", "legacy_bilinear", "bicubic", "bilinear")

Box = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]  # top, left, height, width, in pixels

_CENTRE_SHARE = 0.875  # of the shorter side that evaluation looks at


def image_size(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns height and width of an encoded image, without decoding a JPEG for it."""
    shape = tf.cond(
        tf.image.is_jpeg(encoded),
        lambda: tf.image.extract_jpeg_shape(encoded),
        lambda: tf.shape(tf.io.decode_image(encoded, channels=3, expand_animations=False)),
    )
    return shape[0], shape[1]


def centre_box(height: tf.Tensor, width: tf.Tensor, size: int, padding: int | None = None) -> Box:
    """Returns the central square of evaluation.

    Args:
        height, width: of the image.
        size: to which the square will be resized.
        padding: pixels around it at that size; the official share of 0.875 if None, which is 32
            at 224.
    """
    if padding is None:
        padding = round(size * (1 / _CENTRE_SHARE - 1))
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.cast(tf.constant(size / (size + padding), tf.float32) * shorter, tf.int32)
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def distorted_box(
    height: tf.Tensor,
    width: tf.Tensor,
    seed: tf.Tensor,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Returns a random crop of training (Szegedy et al., arXiv:1409.4842).

    Args:
        height, width: of the image.
        seed: (2,) integer; decides everything.
        size: to which the crop will be resized.
        area: smallest and largest share of the image.
        aspect_ratio: smallest and largest width over height.

    Returns:
        A box that ten attempts of TensorFlow's sampler found, or else the central square.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.stack([height, width, 3]),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=aspect_ratio,
        area_range=area,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    drawn = (begin[0], begin[1], extent[0], extent[1])
    failed = (extent[0] == height) & (extent[1] == width)
    centre = centre_box(height, width, size)
    return tuple(tf.where(failed, c, d) for c, d in zip(centre, drawn, strict=True))


def decode_box(encoded: tf.Tensor, box: Box) -> tf.Tensor:
    """Decodes part of an image, without the rest of it where it is a JPEG.

    Returns:
        (height, width, 3) uint8.
    """
    top, left, height, width = box

    def slice_of_all() -> tf.Tensor:
        whole = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return whole[top : top + height, left : left + width]

    image = tf.cond(
        tf.image.is_jpeg(encoded),
        lambda: tf.image.decode_and_crop_jpeg(encoded, tf.stack(box), channels=3),
        slice_of_all,
    )
    return tf.ensure_shape(image, (None, None, 3))


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
    if method not in RESIZES:
        raise ValueError(f"resize takes one of {', '.join(RESIZES)}, not {method!r}")
    if not method.startswith("legacy_"):
        resized = tf.image.resize(image, (size, size), method, antialias=antialias)
        return tf.cast(resized, tf.float32)
    if antialias:
        raise ValueError(f"resize {method!r} has no antialias: take 'bicubic' or 'bilinear'")
    legacy = tf.raw_ops.ResizeBicubic if method == "legacy_bicubic" else tf.raw_ops.ResizeBilinear
    return legacy(images=image[None], size=(size, size), half_pixel_centers=False)[0]
