"""Made-up photographs: for trying a config, and for timing without a data set."""

from collections.abc import Sequence

import gin
import numpy as np
import tensorflow as tf

from data.arguments import check
from data.source import Example, Source, Split, indexed

_DISTINCT = 64  # images that are made; the examples repeat them
_QUALITY = 94  # of the JPEGs: 104 kB on average at 500×375, as ImageNet's


@gin.register
def synthetic(
    num_examples: int = 1280, num_classes: int = 1000, height: int = 375, width: int = 500
) -> Source:
    """JPEG photographs of nothing, with the splits "train", "minival" and "validation".

    Labels say nothing about the images.

    Args:
        num_examples: in "train"; the others have a tenth of it each.
        num_classes: of the labels.
        height, width: of the images, in pixels.

    Raises:
        ValueError: if an argument is below 1.
    """
    arguments = {"num_examples": num_examples, "num_classes": num_classes}
    for name, value in {**arguments, "height": height, "width": width}.items():
        check("synthetic.", (name, value, value >= 1, "at least 1"))
    images = [photograph(height, width, seed) for seed in range(_DISTINCT)]
    few = -(-num_examples // 10)
    sizes = {"train": num_examples, "minival": few, "validation": few}
    labels = range(num_classes)
    splits = {name: repeated(images, size, labels) for name, size in sizes.items()}
    return Source("synthetic", num_classes, splits)


def photograph(height: int, width: int, seed: int) -> bytes:
    """Returns a JPEG with the detail of a photograph: light and shade, texture and grain."""
    random = np.random.default_rng(seed)
    size = (height, width)
    light = tf.image.resize(random.uniform(0, 255, (12, 16, 3)), size, "bicubic").numpy()
    rough = random.normal(0, 25, (-(-height // 4), -(-width // 4), 3))
    texture = tf.image.resize(rough, size, "bilinear").numpy()
    grain = random.normal(0, 8, (*size, 3))
    pixels = np.clip(light + texture + grain, 0, 255).astype(np.uint8)
    return tf.io.encode_jpeg(pixels, quality=_QUALITY).numpy()


def repeated(
    encoded: Sequence[bytes], num_examples: int, labels: Sequence[int], depth: int | None = None
) -> Split:
    """Returns a split of images and labels in turn; labels as (depth,) bool where it is given."""
    images, labels = tf.constant(encoded), tf.constant(labels, tf.int64)

    def example(index: tf.Tensor) -> Example:
        label = labels[index % len(labels)]
        label = label if depth is None else tf.one_hot(label, depth, True, False)
        image = images[index % len(images)]
        return {"image": image, "label": label, "id": tf.strings.as_string(index)}

    return indexed(num_examples, example)
