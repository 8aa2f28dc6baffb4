"""A run on TensorFlow: network, optimizer, averages, and all of their state."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from condconv.engine import checkpoints
from condconv.engine.backends import Arrays, Evaluator, Steps
from condconv.engine.backends.tensorflow import step, updates
from condconv.engine.backends.tensorflow.strategy import Devices, connect
from condconv.engine.errors import UsageError, blaming_the_config
from condconv.engine.experiment import (
    Experiment,
    build_data,
    build_model,
    build_task,
    check_batches_divide,
    check_images_fit,
)
from condconv.engine.optimization import HandedRate, batch_normalizations, build_optimizer
from condconv.engine.tasks import Data


class Run(step.Built):
    """An experiment that can be stepped; see ``backends.Run``."""

    def batches(self, start: int) -> Iterator[Any]:
        """Returns the distributed training batches from step ``start`` of the data on."""
        return iter(self.devices.distribute(self.experiment.batch_size, self._shard(start)))

    def _shard(self, start: int) -> Any:
        experiment = self.experiment

        def shard(batch_size: int, shard: int, num_shards: int) -> Any:
            return self.data.train_batches(
                experiment.train_split,
                batch_size=batch_size,
                seed=experiment.seed,
                start=start,
                shard=shard,
                num_shards=num_shards,
            )

        return shard

    def steps(
        self,
        batches: Iterator[Any],
        first: int,
        rates: np.ndarray,
        skipped: int = 0,
        stop: bool = False,
    ) -> Steps:
        """Runs a step for each learning rate, in one call of a compiled function."""
        padded = np.zeros(max(len(rates), self.experiment.steps_per_call), np.float32)
        padded[: len(rates)] = rates  # of one size, or each count of steps would be compiled
        sums, bad, stop = self._compiled(
            batches,
            tf.constant(first, tf.int64),
            tf.constant(padded),
            tf.constant(len(rates)),
            tf.constant(skipped, tf.int64),
            tf.constant(float(stop)),
        )
        values = {name: float(value) for name, value in sums.items()}
        return Steps(values, None if bad == step.GOOD else int(bad), bool(stop > 0))

    @functools.cached_property
    def _compiled(self) -> Any:
        return tf.function(functools.partial(step.several, self))

    def is_waiting(self) -> bool:
        """Returns whether the step under way is waiting for its batch."""
        return bool(self.waiting.numpy())

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """What judges the weights that the model has."""
        size = self.experiment.eval_batch_size or self.experiment.batch_size
        return self.devices.evaluator(self.model, self.task, self.data, size)

    @property
    def loss_scale(self) -> float | None:
        """The factor of float16's loss, or None."""
        return float(self.scale.read()) if self.scale else None

    def state(self) -> dict[str, np.ndarray]:
        """Returns all that a checkpoint holds, by name."""
        return {name: np.asarray(v.numpy()) for name, v in self._variables().items()}

    def restore(self, state: Arrays, what: str) -> None:
        """Takes over a state; raises a UsageError if it is one of another network or optimizer."""
        checkpoints.fit(state, self._variables(), what)

    def _variables(self) -> dict[str, Any]:
        weights = checkpoints.named_variables(self.model)
        named = {f"model/{path}": variable for path, variable in weights.items()}
        for variable in self.optimizer.variables:
            named[f"optimizer/{variable.path}"] = variable
        if self.average:
            averages = zip(weights, self.average.averages, strict=True)
            named |= {f"average/{path}": average for path, average in averages}
        if self.scale:
            named |= {f"loss_scale/{n}": v for n, v in self.scale.variables.items()}
        return named

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        """Lets the model compute with the averages of its weights; gives whether there are any."""
        if not self.average:
            yield False
            return
        own = [variable.numpy() for variable in self.average.variables]
        for variable, average in zip(self.average.variables, self.average.averages, strict=True):
            variable.assign(average.numpy())
        try:
            yield True
        finally:
            for variable, value in zip(self.average.variables, own, strict=True):
                variable.assign(value)


def build(experiment: Experiment, devices: Devices | None = None, data: Data | None = None) -> Run:
    """Builds everything that a run needs; see ``backends.Backend``."""
    devices = devices or connect(experiment.devices)
    _check_divisible(experiment, devices.replicas)
    data = data or build_data(experiment, *experiment.splits)
    clock = experiment.clock(data.num_examples(experiment.train_split))
    task = build_task(experiment, data)
    keras.utils.set_random_seed(experiment.seed)
    with devices.scope():
        model = build_model(experiment, data.num_classes)
        check_images_fit(model, data, experiment.train_split)
        for layer in batch_normalizations(model):
            layer.synchronized = experiment.synchronized_batch_norm
        rate = HandedRate()
        with blaming_the_config():
            schedule = experiment.schedule(clock=clock)
            optimizer = build_optimizer(experiment.optimizer, rate, model)
        updates.prepare(optimizer)
        average, scale = None, None
        if experiment.ema_decay:
            weights = list(checkpoints.named_variables(model).values())
            average = updates.MovingAverage(weights, experiment.ema_decay)
        if experiment.precision == "mixed_float16":
            scale = updates.LossScale()
    built = (model, optimizer, rate, average, scale, tf.Variable(False, trainable=False))
    run = Run(experiment, data, task, devices, clock, schedule, *built)
    with blaming_the_config():  # makes the training batches' graph, which may refuse the config
        run._shard(0)(experiment.batch_size, 0, 1)
    return run


def _check_divisible(experiment: Experiment, replicas: int) -> None:
    """Raises a UsageError if the work cannot be divided among replicas."""
    check_batches_divide(experiment, replicas)
    if experiment.xla and experiment.synchronized_batch_norm and replicas > 1:
        raise UsageError(
            "Experiment.xla=True compiles a replica by itself, and cannot synchronise its batch "
            f"normalisation with {replicas - 1} others: set one of the two to False"
        )
