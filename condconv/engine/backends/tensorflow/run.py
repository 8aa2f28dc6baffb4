"""An experiment that has been built: network, optimizer, averages, and all of their state."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from condconv.engine import checkpoints
from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.errors import UsageError
from condconv.engine.experiment import (
    Data,
    Experiment,
    blaming_the_config,
    build_data,
    build_model,
    check_images_fit,
)
from condconv.engine.optimization import LossScale, MovingAverage
from condconv.engine.schedules import Clock


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment that has been built and can be stepped.

    Attributes:
        experiment: what was asked for.
        data: its data.
        strategy: where it computes.
        clock: turns durations into steps.
        schedule: learning rate by step.
        model, optimizer: built under the strategy.
        average: of the weights, or None.
        loss_scale: of float16, or None.
    """

    experiment: Experiment
    data: Data
    strategy: tf.distribute.Strategy
    clock: Clock
    schedule: keras.optimizers.schedules.LearningRateSchedule
    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    average: MovingAverage | None
    loss_scale: LossScale | None

    def state(self) -> checkpoints.Arrays:
        """Returns all that a checkpoint holds, by name."""
        return {name: np.asarray(v.numpy()) for name, v in self._variables().items()}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes over the state of a checkpoint.

        Raises:
            UsageError: if it is one of another network or optimizer.
        """
        what = f"the checkpoint of step {checkpoint.step}"
        checkpoints.fit(checkpoint.state, self._variables(), what)

    def initialize(self) -> None:
        """Takes over what ``Experiment.init_from`` names, and says what does not fit.

        A classifier of another size is made anew.

        Raises:
            UsageError: if there is no such file, or nothing of it fits.
        """
        path = self.experiment.init_from
        if not path:
            return
        values, variables = checkpoints.weights_of(path), checkpoints.named_variables(self.model)
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        taken = [n for n in variables if n in values and values[n].shape == shapes[n]]
        if not taken:
            raise UsageError(f"Experiment.init_from={path!r} has no variable of {self.model.name}")
        for name in taken:
            variables[name].assign(values[name])
        if self.average:
            self.average.restart()
        print(f"{path}: {len(taken)} of {len(variables)} variables taken", file=sys.stderr)
        for what, names in (("made anew", variables), ("not taken", values)):
            if left := sorted(set(names) - set(taken)):
                print(f"  {what}: {', '.join(left)}", file=sys.stderr)

    def _variables(self) -> dict[str, Any]:
        weights = checkpoints.named_variables(self.model)
        named = {f"model/{path}": variable for path, variable in weights.items()}
        for variable in self.optimizer.variables:
            named[f"optimizer/{variable.path}"] = variable
        if self.average:
            averages = zip(weights, self.average.averages, strict=True)
            named |= {f"average/{path}": average for path, average in averages}
        if self.loss_scale:
            named |= {f"loss_scale/{n}": v for n, v in self.loss_scale.variables.items()}
        return named

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Lets the model compute with the averages of its weights, if there are any."""
        if not self.average:
            yield
            return
        own = [variable.numpy() for variable in self.average.variables]
        for variable, average in zip(self.average.variables, self.average.averages, strict=True):
            variable.assign(average.numpy())
        try:
            yield
        finally:
            for variable, value in zip(self.average.variables, own, strict=True):
                variable.assign(value)


def build(
    experiment: Experiment,
    strategy: tf.distribute.Strategy | None = None,
    stand_in: bool = False,
) -> Run:
    """Builds everything that a run needs, and writes nothing.

    Args:
        experiment: to build.
        strategy: where to compute; by default as the experiment says.
        stand_in: whether made-up photographs take the place of the data.

    Raises:
        UsageError: if the config asks for what cannot be.
    """
    strategy = strategy or devices.strategy(experiment.devices)
    check_batches_divide(experiment, strategy.num_replicas_in_sync)
    splits = (experiment.train_split, experiment.selection_split, experiment.eval_split)
    data = build_data(experiment, *filter(None, splits), stand_in=stand_in)
    clock = experiment.clock(data.num_examples(experiment.train_split))
    keras.utils.set_random_seed(experiment.seed)
    with strategy.scope():
        model = build_model(experiment, data.num_classes)
        check_images_fit(model, data, experiment.train_split)
        _synchronize(model, experiment.synchronized_batch_norm)
        with blaming_the_config():
            schedule = experiment.schedule(clock=clock)
            optimizer = experiment.optimizer(learning_rate=schedule)
        optimizer.build(model.trainable_variables)
        average = None
        if experiment.ema_decay:
            weights = list(checkpoints.named_variables(model).values())
            average = MovingAverage(weights, experiment.ema_decay)
        loss_scale = LossScale() if experiment.precision == "mixed_float16" else None
    run = Run(experiment, data, strategy, clock, schedule, model, optimizer, average, loss_scale)
    _check_input(run)
    return run


def check_batches_divide(experiment: Experiment, replicas: int) -> None:
    """Raises a UsageError if a batch cannot be divided among replicas and accumulated parts."""
    parts = {"batch_size": replicas * experiment.accumulation_steps, "eval_batch_size": replicas}
    for name, count in parts.items():
        size = getattr(experiment, name)
        if size is not None and size % count:
            raise UsageError(
                f"Experiment.{name}={size} cannot be divided among {replicas} replicas, "
                f"{count // replicas} times each: take a multiple of {count}"
            )
    if experiment.xla and experiment.synchronized_batch_norm and replicas > 1:
        raise UsageError(
            "Experiment.xla=True compiles a replica by itself, and cannot synchronise its batch "
            f"normalisation with {replicas - 1} others: set one of the two to False"
        )


def _synchronize(model: keras.Model, synchronized: bool) -> None:
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = synchronized


def _check_input(run: Run) -> None:
    """Makes the training batches' graph, so that a config they refuse is refused now."""
    experiment = run.experiment
    with blaming_the_config():
        run.data.train_batches(
            experiment.train_split,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            start=0,
            shard=0,
            num_shards=1,
        )
