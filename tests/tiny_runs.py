"""Runs so small that a step takes no time: their data, network and experiment."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from condconv import CondConv2D, CondDense
from condconv.engine import loop, optimization, schedules
from condconv.engine.backends import Run, Steps, tensorflow
from condconv.engine.checkpoints import Checkpoints
from condconv.engine.evaluation import in_order
from condconv.engine.experiment import Experiment
from condconv.engine.tasks import Columns
from condconv.engine.tasks.classification import classification
from condconv.normalization import BatchNormalization, PixelNormalization
from condconv.stochastic import Dropout, StochasticDepth
from data.pipeline import Pipeline
from data.preprocess import whole
from data.source import Source, Split, indexed

NUM_EXAMPLES = {"train": 40, "minival": 7, "test": 23}


def stripes(image_size: int = 6) -> Pipeline:
    """Images of noise with a bright row; the class is which."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in NUM_EXAMPLES.items():
        labels = np.arange(count) % 3
        images = rng.integers(0, 100, (count, image_size, image_size, 3), np.uint8)
        images[np.arange(count), labels] = 255
        splits[name] = encoded(images, labels)
    return Pipeline(Source("stripes", 3, splits), whole(image_size))


def encoded(images: np.ndarray, labels: np.ndarray) -> Split:
    pngs = tf.constant([tf.io.encode_png(image).numpy() for image in images], tf.string)
    classes = tf.constant(labels, tf.int64)
    return indexed(len(images), lambda i: {"image": pngs[i], "label": classes[i], "id": "a stripe"})


def network(num_classes: int, filters: int = 4) -> keras.Model:
    inputs = keras.Input((6, 6, 3))
    x = PixelNormalization((60,) * 3, (60,) * 3, name="normalization")(inputs)
    x = CondConv2D(filters, 3, 2, padding="same", use_bias=False, name="conv")(x)
    x = BatchNormalization(momentum=0.5, name="bn")(x)
    x = keras.layers.ReLU()(x)
    x = StochasticDepth(0.9, name="survival")(x)
    x = keras.layers.Flatten()(x)
    x = Dropout(0.2, name="dropout")(x)
    return keras.Model(inputs, CondDense(num_classes, 2, name="classifier")(x), name="tiny")


def experiment(**changes) -> Experiment:
    settings = {
        "model": network,
        "data": stripes,
        "optimizer": optimization.rmsprop,
        "schedule": lambda clock: schedules.cosine(clock, 0.5, "2 steps"),
        "duration": "20 steps",
        "batch_size": 8,
        "label_smoothing": 0.1,
        "weight_decay": 1e-3,
        "ema_decay": 0.9,
        "selection_split": "minival",
        "eval_split": "test",
        "log_every": "5 steps",
        "evaluate_every": "10 steps",
        "checkpoint_every": "10 steps",
        "steps_per_call": 3,
    }
    return Experiment(**settings | changes)


def state(workdir: epath.Path) -> dict[str, np.ndarray]:
    return Checkpoints(workdir).load_last().state


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def train_to_the_first_checkpoint(wanted: Experiment, workdir: epath.Path) -> None:
    class Stop(Exception):
        pass

    save = Checkpoints.save

    def save_and_stop(self, step, values, notes):
        save(self, step, values, notes)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Stop):
            loop.train(wanted, workdir)


def step(run: Run, number: int, batches: Iterator[Any] | None = None) -> Steps:
    """Takes one step of a run."""
    rates = run.schedule(np.arange(number, number + 1))
    return run.steps(batches or run.batches(number), number, rates)


def build(**changes: Any) -> Run:
    """Returns the run of an experiment."""
    return tensorflow.build(experiment(**changes))


def judged(model: keras.Model, data: Pipeline, batch_size: int, split: str = "test") -> Columns:
    """Returns what a model says of a split, in order."""
    evaluator = tensorflow.connect("auto").evaluator(model, classification(data), data, batch_size)
    return in_order(evaluator(split), data, split)
