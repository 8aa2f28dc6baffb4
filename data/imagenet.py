"""ImageNet and the data sets that test its networks elsewhere, as TFDS prepares them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
import tensorflow as tf

from data.arguments import check
from data.class_names import imagenet_class_names, imagenet_subset
from data.ilsvrc2012 import IMAGES
from data.records import parser, prepared, sizes, splits, tfds_dataset
from data.source import Source, Split
from data.stand_in import photographs

V2_VARIANTS = ("matched-frequency", "threshold-0.7", "topimages")

_CLASSES = 1000
_SOME_CLASSES = 200  # of ImageNet-A and -R


@gin.register(denylist=["stand_in"])
def imagenet2012(
    data_dir: str | None = None, minival_percent: int = 1, stand_in: bool = False
) -> Source:
    """ILSVRC2012 with the splits "train", "minival" and "validation".

    Args:
        data_dir: where ``scripts/prepare_imagenet.py`` put it; TFDS' own default if None.
        minival_percent: the last of "train" that are held out as "minival", never trained on; if
            0, "train" is all of it and there is no "minival".
        stand_in: whether to return made-up photographs, as many and of the same classes, without
            looking for the data; so it is with all factories here.
    """
    if stand_in:
        return _made_up("imagenet2012", sizes(IMAGES, minival_percent))
    return _prepared("imagenet2012", data_dir, minival_percent)


@gin.register(denylist=["stand_in"])
def imagenet_v2(
    variant: str = "matched-frequency", data_dir: str | None = None, stand_in: bool = False
) -> Source:
    """ImageNetV2 (Recht et al., arXiv:1902.10811): 10,000 new images, the split "test".

    Args:
        variant: "matched-frequency", "threshold-0.7" or "topimages".
        data_dir: where TFDS prepared it.
        stand_in: see ``imagenet2012``.
    """
    allowed = f"one of {', '.join(V2_VARIANTS)}"
    check("imagenet_v2.", ("variant", variant, variant in V2_VARIANTS, allowed))
    return _test_set(f"imagenet_v2/{variant}", data_dir, stand_in, 10_000)


@gin.register(denylist=["stand_in"])
def imagenet_sketch(data_dir: str | None = None, stand_in: bool = False) -> Source:
    """ImageNet-Sketch (Wang et al., arXiv:1905.13549): 50,889 drawings, the split "test"."""
    return _test_set("imagenet_sketch", data_dir, stand_in, 50_889)


@gin.register(denylist=["stand_in"])
def imagenet_a(data_dir: str | None = None, stand_in: bool = False) -> Source:
    """ImageNet-A (Hendrycks et al., arXiv:1907.07174): 7,500 hard photographs, the split "test".

    Answers are chosen from its 200 classes.
    """
    return _test_set("imagenet_a", data_dir, stand_in, 7_500, imagenet_subset("A"))


@gin.register(denylist=["stand_in"])
def imagenet_r(data_dir: str | None = None, stand_in: bool = False) -> Source:
    """ImageNet-R (Hendrycks et al., arXiv:2006.16241): 30,000 renditions, the split "test".

    Answers are chosen from its 200 classes.
    """
    return _test_set("imagenet_r", data_dir, stand_in, 30_000, imagenet_subset("R"))


@gin.register(denylist=["stand_in"])
def imagenet2012_real(data_dir: str | None = None, stand_in: bool = False) -> Source:
    """ImageNet's validation images with "ReaL" labels (Beyer et al., arXiv:2006.07159).

    An image has any number of right classes; those without one are not scored.
    """
    if stand_in:
        images = {"validation": IMAGES["validation"]}
        return _made_up("imagenet2012_real", images, several=images)
    builder = prepared("imagenet2012_real", data_dir)

    def label(record: dict[str, tf.Tensor]) -> tf.Tensor:
        right = tf.one_hot(record["real_label"], _CLASSES, on_value=True, off_value=False)
        return tf.reduce_any(right, axis=0)

    parse = parser(builder, "image", label)
    return Source("imagenet2012_real", _CLASSES, splits(builder, parse), imagenet_class_names())


def _test_set(
    name: str, data_dir: str | None, stand_in: bool, size: int, answers: Sequence[int] | None = None
) -> Source:
    """Returns a data set with the split "test" alone; ``answers`` if not all classes occur."""
    if stand_in:
        return _made_up(name.split("/")[0], {"test": size}, answers=answers)
    source = _prepared(name, data_dir)
    return _among_its_own(source) if answers else source


def _made_up(name: str, images: Mapping[str, int], **more: Any) -> Source:
    return photographs(name, _CLASSES, images, class_names=imagenet_class_names(), **more)


def _prepared(name: str, data_dir: str | None, minival_percent: int = 0) -> Source:
    found = tfds_dataset(name, data_dir, minival_percent)
    return Source(found.name, _CLASSES, found.splits, imagenet_class_names())


def _among_its_own(source: Source) -> Source:
    """Restricts the answers to the classes that occur.

    Raises:
        ValueError: if these are not 200, so that a part of the data cannot pass for the whole.
    """
    (split,) = source.splits.values()
    labels = _labels(split)
    if len(labels) != _SOME_CLASSES:
        raise ValueError(
            f"{source.name} has {_SOME_CLASSES} classes, but {len(labels)} occur in what is "
            "prepared: prepare all of it"
        )
    return dataclasses.replace(source, answers=labels)


def _labels(split: Split) -> list[int]:
    parts = np.arange(len(split.lengths))
    segments = tf.data.Dataset.from_tensor_slices((parts, 0 * parts, split.lengths))
    labels = split.read(segments).map(
        lambda payload, index: split.parse(payload)["label"], num_parallel_calls=tf.data.AUTOTUNE
    )
    return sorted({int(label) for label in labels.as_numpy_iterator()})
