"""Handwritten digits: the 1,797 scans that ship inside scikit-learn, so nothing is downloaded.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
1998, CC BY 4.0), reduced to 8×8 pixels of 17 levels.
"""

import functools

import gin
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

from data.augment import shift_and_rotate
from data.pipeline import Pipeline, Split

_TEST_DIGITS = 360
_SELECTION_DIGITS = 144  # a tenth of the others


@gin.register
def digits(image_size: int = 32, max_shift: float = 0.1, max_degrees: float = 10.0) -> Pipeline:
    """Ten classes, in the splits "train" (1,293), "minival" (144) and "test" (360).

    The splits are stratified by class and always the same.

    Args:
        image_size: height and width to which the scans are scaled up.
        max_shift: share of the size by which a training image moves at most.
        max_degrees: by which a training image turns at most.

    Raises:
        ValueError: if the size is below that of the scans, or a bound is negative.
    """
    if image_size < 8:
        raise ValueError(f"digits: image_size takes at least 8, the scans' size, not {image_size}")
    if max_shift < 0 or max_degrees < 0:
        raise ValueError(
            "digits: max_shift and max_degrees take no negative number, "
            f"not {max_shift} and {max_degrees}"
        )
    images, labels = _scans(image_size)
    return Pipeline(
        name="digits",
        num_classes=10,
        splits={name: _split(images[i], labels[i]) for name, i in _indices().items()},
        augment=functools.partial(shift_and_rotate, max_shift=max_shift, max_degrees=max_degrees),
    )


def _scans(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    scans = load_digits()
    images = tf.image.resize(
        scans.images[..., None] * (255 / 16), (image_size, image_size), "bicubic"
    )
    images = np.clip(np.round(images.numpy()), 0, 255).astype(np.uint8)
    return images, scans.target.astype(np.int64)


def _indices() -> dict[str, np.ndarray]:
    labels = load_digits().target
    rest, test = _stratified(np.arange(len(labels)), labels, _TEST_DIGITS)
    train, minival = _stratified(rest, labels[rest], _SELECTION_DIGITS)
    return {"train": train, "minival": minival, "test": test}


def _stratified(indices: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=size, random_state=0)
    return [np.sort(indices[part]) for part in next(splitter.split(indices, labels))]


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        image = tf.repeat(tf.gather(images, index), 3, axis=-1)
        return {
            "image": tf.ensure_shape(image, (*images.shape[1:3], 3)),
            "label": tf.gather(labels, index),
        }

    return Split(len(labels), read)
