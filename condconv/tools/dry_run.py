"""All that a run does, in little and without its data: to try before days are spent on it."""

import dataclasses
import tempfile
import time
from typing import Any

import tensorflow as tf
from etils import epath

from condconv.cost import count_cost
from condconv.engine import checkpoints
from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.backends.tensorflow.run import Run, build, check_batches_divide
from condconv.engine.backends.tensorflow.step import Stepper, train_batches
from condconv.engine.errors import RunError
from condconv.engine.evaluation import Evaluator
from condconv.engine.experiment import (
    Data,
    Experiment,
    blaming_the_config,
    failing_in_one_line,
)

_STEPS = 2


def dry_run(
    experiment: Experiment, batch_per_replica: int = 8, tpu: str | None = None
) -> dict[str, str | int | float]:
    """Builds an experiment on made-up photographs, takes two steps, evaluates, saves and loads.

    Args:
        experiment: to try; nothing of it is written anywhere.
        batch_per_replica: examples of a step on each replica, whatever the config says.
        tpu: to try it on, see ``devices.strategy``.

    Returns:
        What the whole run would be and take, by name.

    Raises:
        UsageError: if the config asks for what cannot be.
        RunError: if a step, the evaluation or the checkpoint fails.
    """
    strategy = devices.strategy(experiment.devices, tpu)
    replicas = strategy.num_replicas_in_sync
    check_batches_divide(experiment, replicas)
    batch_size = batch_per_replica * replicas
    small = dataclasses.replace(
        experiment,
        batch_size=batch_size * experiment.accumulation_steps,
        eval_batch_size=batch_size,
    )
    run = build(small, strategy, stand_in=True)
    run.initialize()
    clock = experiment.clock(run.data.num_examples(experiment.train_split))
    with blaming_the_config():
        experiment.schedule(clock=clock)
    with failing_in_one_line():
        seconds = _steps(run)
        _evaluate(run)
    cost = count_cost(run.model)
    rate = small.batch_size / seconds
    return {
        "network": run.model.name,
        "parameters": cost.parameters,
        "multiply-adds": cost.multiply_adds,
        "data": f"{run.data.name}, {clock.num_examples:,} examples to train on",
        "replicas": replicas,
        "batch size": experiment.batch_size,
        "steps": clock.total_steps,
        "epochs": round(clock.total_steps * clock.batch_size / clock.num_examples, 2),
        "checkpoint MB": round(_checkpoint(run) / 1e6, 1),
        "images per second": round(rate, 2),
        "expected duration": _duration(clock.total_steps * clock.batch_size / rate),
    }


def _steps(run: Run) -> float:
    """Takes the steps; returns the seconds of the last one, when all has been compiled."""
    batches, stepper = iter(train_batches(run, 0)), Stepper(run)
    for step in range(_STEPS):
        start = time.monotonic()
        taken = stepper(batches, step, 1)
        seconds = time.monotonic() - start
        if taken.bad is not None:
            raise RunError(f"the loss or its gradient is not finite in step {step}")
    return seconds


def _evaluate(run: Run) -> None:
    batch_size = run.experiment.eval_batch_size
    beginning = _Beginning(run.data, batch_size)
    split = run.experiment.selection_split or run.experiment.eval_split
    with run.averaged():
        Evaluator(run.model, beginning, batch_size, run.strategy)(split)


def _checkpoint(run: Run) -> int:
    """Writes a checkpoint, reads and restores it; returns its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        kept = checkpoints.Checkpoints(epath.Path(folder))
        kept.save(_STEPS, run.state(), checkpoints.Notes())
        run.restore(kept.load(_STEPS))
        return sum(path.stat().length for path in epath.Path(folder).glob("checkpoints/*/*"))


class _Beginning:
    """The first examples of each split of some data."""

    def __init__(self, data: Data, count: int):
        self.name, self.num_classes, self.answers = data.name, data.num_classes, data.answers
        self._data, self._count = data, count

    def num_examples(self, split: str) -> int:
        return min(self._count, self._data.num_examples(split))

    def eval_batches(self, split: str, **arguments: Any) -> tf.data.Dataset:
        return self._data.eval_batches(split, **arguments).take(1)


def _duration(seconds: float) -> str:
    days, hours = divmod(seconds / 3600, 24)
    if days:
        return f"{int(days)} days {hours:.0f} h, at this rate"
    return f"{hours:.1f} h, at this rate" if hours >= 1 else f"{seconds:.0f} s, at this rate"
