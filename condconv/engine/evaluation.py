"""Evaluation that counts: each example once, whatever the batch and the number of devices."""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from condconv.engine import checkpoints, files
from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.errors import RunError, UsageError
from condconv.engine.experiment import (
    Data,
    Experiment,
    build_data,
    build_model,
    check_images_fit,
    failing_in_one_line,
)
from condconv.tools.network_file import NetworkFile, cost_of

WITHOUT_TRAINING = {
    "model": None,
    "optimizer": None,
    "schedule": None,
    "duration": "1 steps",
    "batch_size": 100,
}
"""What an experiment has for all that ``evaluate_file`` needs nothing of."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network said of each example of a split, by its index.

    Attributes:
        label: (N,) the right class, or (N, classes) bool where several can be right.
        answer: (N,) the class that scored highest; -1 for an image that cannot be read.
        rank: (N,) how many classes scored higher than the best right one; 0 where it was right.
        loss: (N,) unsmoothed cross-entropy.
        scored: (N,) whether any class is known to be right; the others do not count.
    """

    label: np.ndarray
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

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what ``predictions.npz`` holds: a row for each example that counts, in order.

        ``index`` (N,) int64, its place in the split; ``label``; ``predicted`` (N,) int64;
        ``correct`` (N,) bool, whose mean is ``top1``; ``rank`` (N,) int64, below 5 where it counts
        for ``top5``; ``loss`` (N,) float32.
        """
        return {
            "index": np.flatnonzero(self.scored),
            "label": self.label[self.scored],
            "predicted": self.answer[self.scored].astype(np.int64),
            "correct": self.rank[self.scored] < 1,
            "rank": self.rank[self.scored].astype(np.int64),
            "loss": self.loss[self.scored],
        }

    def write(self, path: epath.Path) -> None:
        """Writes ``arrays`` as an ``.npz`` file, whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays())
        files.write_bytes(path, content.getvalue())


class Evaluator:
    """Evaluates a model on splits of a data set; its step is compiled once."""

    def __init__(
        self, model: keras.Model, data: Data, batch_size: int, strategy: tf.distribute.Strategy
    ):
        self._data, self._strategy = data, strategy
        self._batch_size = batch_size
        allowed = _allowed(data)

        def judge(batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
            return _judge(model(batch["image"], training=False), batch, allowed)

        @tf.function
        def step(batch: dict[str, tf.Tensor]) -> Any:
            columns = strategy.run(judge, args=(batch,))
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
        return _in_order(map(self._step, batches), self._data, split)


def _allowed(data: Data) -> np.ndarray:
    """Returns which classes may be answered, (num_classes,) bool."""
    if data.answers is None:
        return np.ones(data.num_classes, bool)
    return np.isin(np.arange(data.num_classes), data.answers)


def _judge(
    logits: tf.Tensor, batch: dict[str, tf.Tensor], allowed: np.ndarray
) -> tuple[tf.Tensor, ...]:
    """Returns index, label, answer, rank, loss and whether to count them, of each example.

    An image that cannot be read is answered wrongly, as if all classes were equally likely.
    """
    logits = tf.where(allowed, tf.cast(logits, tf.float32), -np.inf)
    right = label = batch["label"]
    if right.shape.rank == 1:
        right = tf.one_hot(right, len(allowed), on_value=True, off_value=False)
    else:
        label = tf.cast(label, tf.int32)  # workers exchange numbers only
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
        label,
        tf.where(readable, tf.argmax(logits, axis=-1), -1),
        tf.where(readable, rank, len(allowed)),
        tf.where(readable, loss, math.log(np.sum(allowed))),
        tf.cast(tf.reduce_any(right, axis=-1), tf.int32),
    )


def _in_order(judged: Iterable[Sequence[tf.Tensor]], data: Data, split: str) -> Predictions:
    """Puts what was judged batch by batch into the order of the split."""
    parts = [_on_host(columns) for columns in judged]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    index, *values = (column[columns[0] >= 0] for column in columns)
    expected = data.num_examples(split)
    if not np.array_equal(np.sort(index), np.arange(expected)):
        raise RunError(
            f"evaluation of {split!r} saw {len(index)} examples, {len(np.unique(index))} of "
            f"them different, instead of each of {expected} once"
        )
    return Predictions(*(value[np.argsort(index)] for value in values))


def _on_host(columns: Sequence[tf.Tensor]) -> tuple[np.ndarray, ...]:
    index, label, answer, rank, loss, scored = (column.numpy() for column in columns)
    label = label if label.ndim == 1 else label.astype(bool)
    return index, label, answer, rank, loss, scored.astype(bool)


def evaluate_run(
    experiment: Experiment, workdir: epath.Path, checkpoint: str = "last", ema: bool | None = None
) -> dict[str, Any]:
    """Evaluates a trained network on ``Experiment.eval_split``.

    What it says of each example goes to ``predictions.npz`` in the workdir (``Predictions.arrays``)
    and the result to ``eval.json``, in this order; of several workers, one writes.

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
        UsageError: if there is no such checkpoint, it does not fit, or the workdir cannot be
            written to.
        RunError: if not every example was seen exactly once.
    """
    found = checkpoints.Checkpoints(workdir).resolve(checkpoint)
    values, weights = found.weights(ema)
    strategy = devices.strategy(experiment.devices)
    if writes := devices.is_chief(strategy):
        files.make_writable(workdir, "--workdir")
    data = build_data(experiment, experiment.eval_split)
    with strategy.scope():
        model = build_model(experiment, data.num_classes)
    check_images_fit(model, data, experiment.eval_split)
    variables = checkpoints.named_variables(model)
    checkpoints.fit(values, variables, f"the checkpoint of step {found.step}")
    with failing_in_one_line():
        evaluator = Evaluator(model, data, _batch_size(experiment), strategy)
        predictions = evaluator(experiment.eval_split)
    result = _result(predictions, data, experiment.eval_split, cost_of(model))
    result |= {"step": found.step, "weights": weights}
    if writes:
        predictions.write(workdir / "predictions.npz")
        files.write_json(workdir / "eval.json", result)
    return result


def evaluate_file(network: NetworkFile, experiment: Experiment) -> dict[str, Any]:
    """Evaluates a network in a file, through its own runtime, on ``Experiment.eval_split``.

    Args:
        network: from ``network_file.open_file``.
        experiment: of which only the data counts, its split and its batch size.

    Returns:
        The same as ``evaluate_run``; parameters, multiply-adds and MACs are None where the file
        does not tell, ``step`` is None, and ``weights`` is "file".

    Raises:
        UsageError: if the data's images or classes are not those of the network.
        RunError: if the file does not run, or not every example was seen exactly once.
    """
    split = experiment.eval_split
    data = build_data(experiment, split)
    check_images_fit(network, data, split)
    if network.num_classes != data.num_classes:
        raise UsageError(
            f"{network.name} tells {network.num_classes} classes apart and {data.name} has "
            f"{data.num_classes}: name the data that it was trained on"
        )
    batches = data.eval_batches(split, batch_size=_batch_size(experiment))
    allowed = _allowed(data)
    with failing_in_one_line():
        judged = (_judge(_logits(network, batch), batch, allowed) for batch in batches)
        predictions = _in_order(judged, data, split)
    cost = network.cost(batches.element_spec["image"].shape[1])
    return _result(predictions, data, split, cost) | {"step": None, "weights": "file"}


def _batch_size(experiment: Experiment) -> int:
    return experiment.eval_batch_size or experiment.batch_size


def _logits(network: NetworkFile, batch: dict[str, tf.Tensor]) -> tf.Tensor:
    return tf.constant(network(batch["image"].numpy().astype(np.float32)))


def _result(
    predictions: Predictions, data: Data, split: str, cost: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **predictions.summary(data.num_classes),
        **cost,
        "dataset": data.name,
        "split": split,
    }
