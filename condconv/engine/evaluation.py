"""Evaluation that counts: each example once, whatever the batch and the number of devices."""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import keras
import numpy as np
from etils import epath

from condconv.cost import count_cost
from condconv.engine import backends, files
from condconv.engine.errors import RunError, UsageError, in_one_line
from condconv.engine.experiment import (
    Data,
    Experiment,
    as_numpy,
    build_data,
    build_task,
    check_images_fit,
)
from condconv.engine.restore import restore
from condconv.engine.tasks import Columns, Task

WITHOUT_TRAINING = {
    "model": None,
    "optimizer": None,
    "schedule": None,
    "duration": "1 steps",
    "batch_size": 100,
}
"""What an experiment has for all that ``evaluate_file`` needs nothing of."""

COST = ("parameters", "multiply_adds", "macs")


class Network(Protocol):
    """A network in a file, which its own runtime computes."""

    name: str
    num_classes: int
    input_shape: tuple[int | None, ...]
    __call__: Callable[[np.ndarray], np.ndarray]

    def cost(self, image_size: int) -> Mapping[str, int | None]:
        """Returns the cost for one image; None where the file does not tell."""


def in_order(batches: Iterable[Columns], data: Data, split: str) -> Columns:
    """Puts what was judged batch by batch into the order of a split.

    Args:
        batches: columns with ``index``, which is negative where a batch was only filled up.
        data: that has the split.
        split: that was judged.

    Raises:
        RunError: if not every example was seen exactly once.
    """
    parts = list(batches)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    counted = columns["index"] >= 0
    columns = {name: column[counted] for name, column in columns.items()}
    index, expected = columns.pop("index"), data.num_examples(split)
    if not np.array_equal(np.sort(index), np.arange(expected)):
        raise RunError(
            f"evaluation of {split!r} saw {len(index)} examples, {len(np.unique(index))} of "
            f"them different, instead of each of {expected} once"
        )
    order = np.argsort(index)
    return {name: column[order] for name, column in columns.items()}


def evaluate_run(
    experiment: Experiment, workdir: epath.Path, checkpoint: str = "last", ema: bool | None = None
) -> dict[str, Any]:
    """Evaluates a trained network on ``Experiment.eval_split``.

    What it says of each example goes to ``predictions.npz`` in the workdir
    (``Task.predictions``) and the result to ``eval.json``, in this order; of several workers, one
    writes.

    Args:
        experiment: the run's own, from ``config.load_run``.
        workdir: of the run.
        checkpoint: "last", "best", a step or the path of a checkpoint.
        ema: whether to use the averages of the weights; if None, wherever there are any.

    Returns:
        The task's summary (for classification, shares ``top1`` and ``top5``, ``loss``, the mean
        unsmoothed cross-entropy, and ``images``), ``parameters``, ``multiply_adds``, ``macs``,
        ``dataset``, ``split``, ``step``, ``weights`` ("ema" or "raw").

    Raises:
        UsageError: if there is no such checkpoint, it does not fit, or the workdir cannot be
            written to.
        RunError: if not every example was seen exactly once.
    """
    devices = backends.choose().connect(experiment.devices)
    found = restore(experiment, workdir, checkpoint, ema, scope=devices.scope())
    if devices.is_chief:
        files.make_writable(workdir, "--workdir")
    split, data, model = experiment.eval_split, found.data, found.model
    check_images_fit(model, data, split)
    task = build_task(experiment, data)
    evaluator = devices.evaluator(model, task, data, _batch_size(experiment))
    with in_one_line(RunError, errors=devices.failures):
        columns = in_order(evaluator(split), data, split)
    result = _result(task, columns, cost_of(model), data, split)
    result |= {"step": found.step, "weights": found.weights}
    if devices.is_chief:
        _write_predictions(task.predictions(columns), workdir / "predictions.npz")
        files.write_json(workdir / "eval.json", result)
    return result


def evaluate_file(network: Network, experiment: Experiment) -> dict[str, Any]:
    """Evaluates a network in a file, through its own runtime, on ``Experiment.eval_split``.

    Args:
        network: as ``tools.network_file`` opens it.
        experiment: of which only the data and the task count, its split and its batch size.

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
    task = build_task(experiment, data)

    def judge(batch: dict[str, np.ndarray]) -> Columns:
        outputs = network(batch["image"].astype(np.float32))
        return task.judge(outputs, batch) | {"index": batch["index"]}

    with in_one_line(RunError, errors=files.path_errors()):
        batches = as_numpy(data.eval_batches(split, batch_size=_batch_size(experiment)))
        columns = in_order(map(judge, batches), data, split)
    cost = network.cost(data.image_spec(split).shape[0])
    return _result(task, columns, cost, data, split) | {"step": None, "weights": "file"}


def cost_of(model: keras.Model, image_size: int | None = None) -> dict[str, int]:
    """Returns ``parameters``, ``multiply_adds`` and ``macs`` of a network for one image."""
    cost = count_cost(model, image_size=image_size)
    return {key: getattr(cost, key) for key in COST}


def _batch_size(experiment: Experiment) -> int:
    return experiment.eval_batch_size or experiment.batch_size


def _result(
    task: Task, columns: Columns, cost: Mapping[str, Any], data: Data, split: str
) -> dict[str, Any]:
    return {**task.summary(columns), **cost, "dataset": data.name, "split": split}


def _write_predictions(predictions: Columns, path: epath.Path) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **predictions)
    files.write_bytes(path, content.getvalue())
