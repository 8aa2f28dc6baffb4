"""Handwritten digits: the 1,797 scans that ship inside scikit-learn, so nothing is downloaded.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
1998, CC BY 4.0), reduced to 8×8 pixels of 17 levels.
"""

import gin
import numpy as np
import tensorflow as tf

from data.source import Example, Source, Split, indexed

_TEST_DIGITS = 360
_SELECTION_DIGITS = 144  # a tenth of the others


@gin.register
def digits() -> Source:
    """Ten classes, in the splits "train" (1,293), "minival" (144) and "test" (360).

    The splits are stratified by class and always the same. Images are 8×8.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.round(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    encoded = np.array([tf.io.encode_png(image).numpy() for image in images], object)
    return Source(
        name="digits",
        num_classes=10,
        splits={
            name: _split(encoded, scans.target, i) for name, i in _indices(scans.target).items()
        },
        class_names=[str(name) for name in scans.target_names],
    )


def _indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    rest, test = _stratified(np.arange(len(labels)), labels, _TEST_DIGITS)
    train, minival = _stratified(rest, labels[rest], _SELECTION_DIGITS)
    return {"train": train, "minival": minival, "test": test}


def _stratified(indices: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(n_splits=1, test_size=size, random_state=0)
    return [np.sort(indices[part]) for part in next(splitter.split(indices, labels))]


def _split(encoded: np.ndarray, target: np.ndarray, indices: np.ndarray) -> Split:
    images, labels = tf.constant(list(encoded[indices])), tf.constant(target[indices], tf.int64)
    places = tf.constant(indices, tf.int64)

    def example(index: tf.Tensor) -> Example:
        return {
            "image": images[index],
            "label": labels[index],
            "id": tf.strings.as_string(places[index]),
        }

    return indexed(len(indices), example)
