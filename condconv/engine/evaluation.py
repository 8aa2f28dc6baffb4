"""Evaluation that counts: each example once, whatever the batch and the number of devices."""

import dataclasses
import math
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
    failing_in_one_line,
)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network said of each example of a split, by its index.

    Attributes:
        answer: (N,) the class that scored highest.
        rank: (N,) how many classes scored higher than the best right one; 0 where it was right.
        loss: (N,) unsmoothed cross-entropy.
        scored: (N,) whether any class is known to be right; the others do not count.
    """

    answer: np.ndarray
    rank: np.ndarray
    loss: np.ndarray
    scored: np.ndarray

    def summary(self, num_answers: int) -> dict[str, float | int]:
        """Returns ``top1``, ``top5`` (of at most ``num_answers``), ``loss`` and ``images``."""
        rank, loss = self.rank[self.scored], self.loss[self.scored]
        return {
            "top1": float(np.mean(rank < 1)),
            "top5": float(np.mean(rank < min(5, num_answers))),
            "loss": float(np.mean(loss, dtype=np.float64)),
            "images": len(rank),
        }


class Evaluator:
    """Evaluates a model on splits of a data set; its step is compiled once."""

    def __init__(
        self, model: keras.Model, data: Data, batch_size: int, strategy: tf.distribute.Strategy
    ):
        self._data, self._strategy = data, strategy
        self._batch_size = batch_size
        allowed = np.ones(data.num_classes, bool)
        if data.answers is not None:
            allowed = np.isin(np.arange(data.num_classes), data.answers)

        @tf.function
        def step(batch: dict[str, tf.Tensor]) -> Any:
            columns = strategy.run(_judge, args=(model, batch, allowed))
            return [strategy.gather(column, axis=0) for column in columns]

        self._step = step

    def __call__(self, split: str) -> Predictions:
        """Returns what the model says of ``split``.

        Raises:
            RunError: if not every example was seen exactly once.
        """
        batches = devices.distribute(
            self._strategy,
            self._batch_size,
            lambda size, shard, shards: self._data.eval_batches(
                split, batch_size=size, shard=shard, num_shards=shards
            ),
        )
        parts = [[column.numpy() for column in self._step(batch)] for batch in batches]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        index, *values = (column[columns[0] >= 0] for column in columns)
        expected = self._data.num_examples(split)
        if not np.array_equal(np.sort(index), np.arange(expected)):
            raise RunError(
                f"evaluation of {split!r} saw {len(index)} examples, {len(np.unique(index))} of "
                f"them different, instead of each of {expected} once"
            )
        answer, rank, loss, scored = (value[np.argsort(index)] for value in values)
        return Predictions(answer, rank, loss, scored.astype(bool))


def _judge(
    model: keras.Model, batch: dict[str, tf.Tensor], allowed: np.ndarray
) -> tuple[tf.Tensor, ...]:
    """Returns index, answer, rank, loss and whether to count them, of each example of a batch.

    An image that cannot be read is answered wrongly, as if all classes were equally likely.
    """
    logits = tf.cast(model(batch["image"], training=False), tf.float32)
    logits = tf.where(allowed, logits, -np.inf)
    right = batch["label"]
    if right.shape.rank == 1:
        right = tf.one_hot(right, len(allowed), on_value=True, off_value=False)
    of_right = tf.where(right, logits, -np.inf)
    own = tf.reduce_max(of_right, axis=-1, keepdims=True)
    # A class of the same score counts as higher if it comes first, as in a sorted list; a logit
    # that is no number beats none, so a broken network scores as wrong.
    first = tf.range(len(allowed), dtype=tf.int64) < tf.argmax(of_right, axis=-1)[:, None]
    undefined = tf.math.is_nan(logits) | tf.math.is_nan(own)
    higher = (logits > own) | (first & (logits == own)) | undefined
    rank = tf.reduce_sum(tf.cast(higher, tf.int32), axis=-1)
    loss = tf.reduce_logsumexp(logits, axis=-1) - tf.reduce_logsumexp(of_right, axis=-1)
    readable = batch["readable"]
    return (
        batch["index"],
        tf.where(readable, tf.argmax(logits, axis=-1), -1),
        tf.where(readable, rank, len(allowed)),
        tf.where(readable, loss, math.log(np.sum(allowed))),
        tf.cast(tf.reduce_any(right, axis=-1), tf.int32),  # workers exchange numbers only
    )


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
    found = checkpoints.Checkpoints(workdir).resolve(checkpoint)
    step, state = found.step, found.state
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
    with failing_in_one_line():
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
