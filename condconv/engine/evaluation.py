"""Evaluation that counts: each example once, whatever the batch and the number of devices."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from condconv.cost import count_cost
from condconv.engine import checkpoints, devices
from condconv.engine.errors import RunError, UsageError
from condconv.engine.experiment import (
    Data,
    Experiment,
    build_data,
    build_model,
    check_images_fit,
)
from condconv.engine.optimization import cross_entropy


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network said of each example of a split, by its index.

    Attributes:
        label: (N,) true classes.
        rank: (N,) how many classes scored higher than the true one; 0 where it was right.
        loss: (N,) unsmoothed cross-entropy.
    """

    label: np.ndarray
    rank: np.ndarray
    loss: np.ndarray

    def summary(self, num_classes: int) -> dict[str, float | int]:
        """Returns ``top1``, ``top5`` (of at most ``num_classes``), ``loss`` and ``images``."""
        return {
            "top1": float(np.mean(self.rank < 1)),
            "top5": float(np.mean(self.rank < min(5, num_classes))),
            "loss": float(np.mean(self.loss, dtype=np.float64)),
            "images": len(self.rank),
        }


class Evaluator:
    """Evaluates a model on splits of a data set; its step is compiled once."""

    def __init__(
        self, model: keras.Model, data: Data, batch_size: int, strategy: tf.distribute.Strategy
    ):
        self._data, self._strategy = data, strategy
        self._batch_size = batch_size

        @tf.function
        def step(batch: dict[str, tf.Tensor]) -> Any:
            return strategy.run(_judge, args=(model, batch))

        self._step = step

    def __call__(self, split: str) -> Predictions:
        """Returns what the model says of ``split``.

        Raises:
            RunError: if not every example was seen exactly once.
        """
        batches = self._strategy.experimental_distribute_dataset(
            self._data.eval_batches(split, batch_size=self._batch_size)
        )
        parts = [self._local(self._step(batch)) for batch in batches]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        index, *values = (column[columns[0] >= 0] for column in columns)
        expected = self._data.num_examples(split)
        if not np.array_equal(np.sort(index), np.arange(expected)):
            raise RunError(
                f"evaluation of {split!r} saw {len(index)} examples, {len(np.unique(index))} of "
                f"them different, instead of each of {expected} once"
            )
        order = np.argsort(index)
        return Predictions(*(value[order] for value in values))

    def _local(self, outputs: Any) -> list[np.ndarray]:
        """Returns the columns of one step, those of all replicas behind each other."""
        columns = (self._strategy.experimental_local_results(column) for column in outputs)
        return [np.concatenate([part.numpy() for part in column]) for column in columns]


def _judge(model: keras.Model, batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
    logits = tf.cast(model(batch["image"], training=False), tf.float32)
    labels = batch["label"]
    own = tf.gather(logits, labels, axis=1, batch_dims=1)[:, None]
    # A class of the same score counts as higher if it comes first, as in a sorted list; a logit
    # that is no number beats none, so a broken network scores as wrong.
    first = tf.range(logits.shape[-1], dtype=labels.dtype) < labels[:, None]
    undefined = tf.math.is_nan(logits) | tf.math.is_nan(own)
    higher = (logits > own) | (first & (logits == own)) | undefined
    rank = tf.reduce_sum(tf.cast(higher, tf.int32), axis=-1)
    return batch["index"], labels, rank, cross_entropy(labels, logits)


def evaluate_run(
    experiment: Experiment, workdir: epath.Path, checkpoint: str = "last", ema: bool | None = None
) -> dict[str, Any]:
    """Evaluates a trained network on ``Experiment.eval_split``.

    Args:
        experiment: the run's own, from ``config.load_run``.
        workdir: of the run.
        checkpoint: "last", "best", a step or the path of a checkpoint.
        ema: whether to use the averages of the weights; if None, wherever there are any.

    Returns:
        ``top1`` and ``top5`` (shares; top5 of at most as many classes as there are), ``loss``
        (mean unsmoothed cross-entropy), ``images``, ``parameters``, ``multiply_adds``, ``macs``,
        ``dataset``, ``split``, ``step``, ``weights`` ("ema" or "raw").

    Raises:
        UsageError: if there is no such checkpoint, or it does not fit.
        RunError: if not every example was seen exactly once.
    """
    step, state = checkpoints.Checkpoints(workdir).resolve(checkpoint)
    averaged = any(name.startswith("average/") for name in state)
    if ema and not averaged:
        raise UsageError(f"--ema: {workdir} has no averaged weights; its Experiment.ema_decay is 0")
    weights = "ema" if averaged and ema is not False else "raw"
    strategy = devices.strategy(experiment.devices)
    data = build_data(experiment, experiment.eval_split)
    with strategy.scope():
        model = build_model(experiment, data.num_classes)
    check_images_fit(model, data, experiment.eval_split)
    prefix = "average/" if weights == "ema" else "model/"
    values = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    variables = checkpoints.named_variables(model)
    checkpoints.fit(values, variables, f"the checkpoint of step {step}")
    batch_size = experiment.eval_batch_size or experiment.batch_size
    predictions = Evaluator(model, data, batch_size, strategy)(experiment.eval_split)
    cost = count_cost(model)
    return {
        **predictions.summary(data.num_classes),
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "macs": cost.macs,
        "dataset": data.name,
        "split": experiment.eval_split,
        "step": step,
        "weights": weights,
    }
