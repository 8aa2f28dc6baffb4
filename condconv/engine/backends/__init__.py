"""Where a run computes: what the engine asks of a framework, and the choice of one."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import keras
import numpy as np

from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment
from condconv.engine.schedules import Clock, Schedule
from condconv.engine.tasks import Columns, Data, Task

Arrays = Mapping[str, np.ndarray]

_BACKENDS = {"tensorflow": "condconv.engine.backends.tensorflow"}

Evaluator = Callable[[str], Iterable[Columns]]
"""A split to what the task says of each of its examples, batch by batch, with their ``index``."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """What some steps came to.

    Attributes:
        sums: over all examples, "examples", "objective" and what the task tells; over the steps,
            "steps", "gradient_norm" and "seconds_waited" for input.
        bad: the first step whose loss or gradient was not finite, or None.
        stop: whether any worker asked to stop.
    """

    sums: dict[str, float]
    bad: int | None
    stop: bool


class Devices(Protocol):
    """What a run computes on.

    Attributes:
        replicas: parts that each batch is divided into.
        workers: processes that compute together.
        is_chief: whether this is the one of them that writes and tells.
        names: of the devices, for people.
        failures: errors that say that a device, a worker or the input failed.
    """

    replicas: int
    workers: int
    is_chief: bool
    names: list[str]
    failures: tuple[type[Exception], ...]

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which networks for these devices are built."""

    def agreed(self, value: int, what: str) -> int:
        """Returns ``value`` if all workers have the same.

        Raises:
            RunError: if not; ``what`` says what differs.
        """

    def evaluator(self, model: keras.Model, task: Task, data: Data, batch_size: int) -> Evaluator:
        """Returns what judges a model on splits of some data; its step is compiled once."""


class Run(Protocol):
    """An experiment that has been built and can be stepped.

    Attributes:
        experiment: what was asked for.
        data, task: its own.
        devices: where it computes.
        clock: turns durations into steps.
        schedule: learning rate by step.
        model: the network.
        evaluator: judges the weights that the model has.
        loss_scale: the factor of float16's loss, or None.
    """

    experiment: Experiment
    data: Data
    task: Task
    devices: Devices
    clock: Clock
    schedule: Schedule
    model: keras.Model
    evaluator: Evaluator
    loss_scale: float | None

    def batches(self, start: int) -> Iterator[Any]:
        """Returns the training batches from step ``start`` of the data on."""

    def steps(
        self, batches: Iterator[Any], first: int, rates: np.ndarray, skipped: int, stop: bool
    ) -> Steps:
        """Runs a step for each learning rate.

        Args:
            batches: from ``batches``.
            first: step to begin with.
            rates: (N,) float32, the learning rates of the steps.
            skipped: by how many steps the data is ahead; seeds follow the data.
            stop: whether this worker asks all to stop.
        """

    def is_waiting(self) -> bool:
        """Returns whether the step under way is waiting for its batch."""

    def averaged(self) -> contextlib.AbstractContextManager[bool]:
        """Lets the model compute with the averages of its weights; gives whether there are any."""

    def state(self) -> dict[str, np.ndarray]:
        """Returns all that a checkpoint holds, by name: "model/…", "optimizer/…", "average/…"."""

    def restore(self, state: Arrays, what: str) -> None:
        """Takes over a state.

        Raises:
            UsageError: if it is one of another network or optimizer; ``what`` says whose it is.
        """


class Backend(Protocol):
    """A framework that runs compute on."""

    def connect(self, devices: str, tpu: str | None = None) -> Devices:
        """Returns the devices for ``Experiment.devices``.

        Args:
            devices: "auto" or "cpu:N".
            tpu: "local", an address such as "grpc://10.0.0.2:8470", or the name of a TPU; instead.

        Raises:
            UsageError: for any other text, or what is not there.
        """

    def build(
        self, experiment: Experiment, devices: Devices | None = None, data: Data | None = None
    ) -> Run:
        """Builds everything that a run needs, and writes nothing.

        Args:
            experiment: to build.
            devices: where to compute; by default as the experiment says.
            data: to train on; by default the experiment's.

        Raises:
            UsageError: if the config asks for what cannot be.
        """

    def prepare(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Has an optimizer of ours step in one operation, where the framework has it."""


def choose() -> Backend:
    """Returns the engine on Keras' own backend.

    Raises:
        UsageError: if there is none on that.
    """
    if (name := keras.backend.backend()) not in _BACKENDS:
        raise UsageError(
            f"experiments run on Keras' TensorFlow backend, not on {name}: leave KERAS_BACKEND "
            "out, or set it to tensorflow"
        )
    return importlib.import_module(_BACKENDS[name])
