"""Tries everything that an experiment would do, in little: without its data, and without a trace."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from condconv.cost import count_cost
from condconv.engine import backends
from condconv.engine.backends import Run
from condconv.engine.checkpoints import Checkpoints, Notes
from condconv.engine.errors import RunError, blaming_the_config, in_one_line
from condconv.engine.evaluation import in_order
from condconv.engine.experiment import Data, Experiment, build_data, check_batches_divide
from condconv.engine.restore import initialize
from condconv.engine.tasks import Batch

_STEPS = 2


def dry_run(
    experiment: Experiment, batch_per_replica: int = 8, tpu: str | None = None
) -> dict[str, str | int | float]:
    """Builds an experiment on made-up photographs, takes two steps, evaluates, saves and loads.

    Args:
        experiment: to try; nothing of it is written anywhere.
        batch_per_replica: examples of a step on each replica, whatever the config says.
        tpu: to try it on, see ``backends.Backend.connect``.

    Returns:
        What the whole run would be and take, by name.

    Raises:
        UsageError: if the config asks for what cannot be.
        RunError: if a step, the evaluation or the checkpoint fails.
    """
    backend = backends.choose()
    devices = backend.connect(experiment.devices, tpu)
    check_batches_divide(experiment, devices.replicas)
    batch_size = batch_per_replica * devices.replicas
    small = dataclasses.replace(
        experiment,
        batch_size=batch_size * experiment.accumulation_steps,
        eval_batch_size=batch_size,
    )
    data = build_data(experiment, *experiment.splits, stand_in=True)
    clock = experiment.clock(data.num_examples(experiment.train_split))
    with blaming_the_config():
        experiment.schedule(clock=clock)
    run = backend.build(small, devices, _Beginning(data, batch_size))
    initialize(run)
    with in_one_line(RunError, errors=devices.failures):
        seconds = _steps(run)
        _evaluate(run)
    cost = count_cost(run.model)
    rate = small.batch_size / seconds
    return {
        "network": run.model.name,
        "parameters": cost.parameters,
        "multiply-adds": cost.multiply_adds,
        "data": f"{data.name}, {clock.num_examples:,} examples to train on",
        "replicas": devices.replicas,
        "batch size": experiment.batch_size,
        "steps": clock.total_steps,
        "epochs": round(clock.total_steps * clock.batch_size / clock.num_examples, 2),
        "checkpoint MB": round(_checkpoint(run) / 1e6, 1),
        "images per second": round(rate, 2),
        "expected duration": _duration(clock.total_steps * clock.batch_size / rate),
    }


def _steps(run: Run) -> float:
    """Takes the steps; returns the seconds of the last one, when all has been compiled."""
    batches = run.batches(0)
    for step in range(_STEPS):
        start = time.monotonic()
        taken = run.steps(batches, step, run.schedule(np.arange(step, step + 1)))
        seconds = time.monotonic() - start
        if taken.bad is not None:
            raise RunError(f"the loss or its gradient is not finite in step {step}")
    return seconds


def _evaluate(run: Run) -> None:
    split = run.experiment.selection_split or run.experiment.eval_split
    with run.averaged():
        in_order(run.evaluator(split), run.data, split)


def _checkpoint(run: Run) -> int:
    """Writes a checkpoint, reads and restores it; returns its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(epath.Path(folder))
        checkpoints.save(_STEPS, run.state(), Notes())
        loaded = checkpoints.load(_STEPS)
        run.restore(loaded.state, loaded.name)
        return sum(path.stat().length for path in epath.Path(folder).glob("checkpoints/*/*"))


class _Beginning:
    """Some data of which only the first batch of each split is evaluated."""

    def __init__(self, data: Data, batch_size: int):
        self._data, self._batch_size = data, batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def num_examples(self, split: str) -> int:
        """Returns how many of them there are."""
        return min(self._batch_size, self._data.num_examples(split))

    def eval_batches(self, split: str, **arguments: Any) -> Iterator[Batch]:
        """Returns the first batch."""
        return itertools.islice(self._data.eval_batches(split, **arguments), 1)


def _duration(seconds: float) -> str:
    days, hours = divmod(seconds / 3600, 24)
    if days:
        return f"{int(days)} days {hours:.0f} h, at this rate"
    return f"{hours:.1f} h, at this rate" if hours >= 1 else f"{seconds:.0f} s, at this rate"
