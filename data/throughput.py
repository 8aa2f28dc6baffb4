"""How fast the input is, stage by stage, and what another one needs to do the same work.

A round makes some images and returns how many; who calls it decides on which cores, and takes the
time. No round leaves anything running behind it.
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from data.autoaugment import auto_augment
from data.order import Order
from data.pipeline import Pipeline
from data.preprocess import Preprocessing, crops, distorted_box

# A round begins, and may be read on after the clock has started.
Round = Iterator[int]

_RECIPES = {
    "crop, bicubic, flip": {},
    "antialiased": {"resize_method": "bicubic", "antialias": True},
    "with AutoAugment": {"augmentations": (auto_augment,)},
}

# In a round: until as much is under way as will be when the clock stops, and behind that.
_WARM_UP, _BATCHES = 4, 8
_SEED = 0


def stages(pipeline: Pipeline, split: str, batch_size: int) -> dict[str, Callable[[], Round]]:
    """Returns rounds of the pipeline's first stage, its first two, and so on, by the last's name.

    Args:
        pipeline: to measure.
        split: to train on.
        batch_size: of its batches.
    """
    names = ["read", *pipeline.preprocessing.stages]
    cut = {name: _up_to(pipeline, place) for place, name in enumerate(names)} | {"batch": pipeline}
    return {name: _rounds(part, split, batch_size) for name, part in cut.items()}


def recipes(pipeline: Pipeline, split: str, batch_size: int) -> dict[str, Callable[[], Round]]:
    """Returns rounds of the usual crops of training, on the pipeline's own images, by name."""
    size = pipeline.image_spec(split).shape[0]
    ours = {
        name: dataclasses.replace(pipeline, preprocessing=crops(size, **arguments), mixing=None)
        for name, arguments in _RECIPES.items()
    }
    return {name: _rounds(each, split, batch_size) for name, each in ours.items()}


def _up_to(pipeline: Pipeline, count: int) -> Pipeline:
    """Returns the pipeline with its first stages only, and without their results' memory."""
    first = dict(itertools.islice(pipeline.preprocessing.stages.items(), count))
    # One value of it: the whole would be copied into a batch, its size alone not even computed.
    first["forget"] = lambda image, seed: tf.reshape(image, [-1])[:1]
    preprocessing = Preprocessing(first, pipeline.preprocessing.evaluate)
    return dataclasses.replace(pipeline, preprocessing=preprocessing, mixing=None)


def _rounds(pipeline: Pipeline, split: str, batch_size: int) -> Callable[[], Round]:
    batches = pipeline.train_batches(split, batch_size=batch_size, seed=_SEED)

    def images() -> Round:
        iterator = iter(batches)
        for _ in range(_WARM_UP):
            next(iterator)
        yield 0  # the clock starts here
        for _ in range(_BATCHES):
            next(iterator)
            yield batch_size

    return images


def inputs(pipeline: Pipeline, split: str, batch_size: int) -> dict[str, Any]:
    """Returns what ``data.pil`` needs to make as many of the same crops in a round.

    Args:
        pipeline, split, batch_size: that are measured.
    """
    size, records = pipeline.image_spec(split).shape[0], pipeline.source.splits[split]
    payloads = Order(records, batch_size, _SEED).batches(0, 0, 1).take(_BATCHES)
    encoded = [records.parse(p)["image"].numpy() for batch, _ in payloads for p in batch]
    return {
        "encoded": encoded,
        "boxes": [_box(image, seed, size) for seed, image in enumerate(encoded)],
        "flips": np.random.default_rng(_SEED).random(len(encoded)) < 0.5,
        "size": size,
    }


def _box(encoded: bytes, seed: int, size: int) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom, as PIL counts."""
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
    box = distorted_box(tf.constant([height, width]), tf.constant([seed, 0]), size)
    top, left, height, width = box.numpy().tolist()
    return left, top, left + width, top + height
