"""The training loop, on tf.distribute: make a step, run k of them, evaluate, save, go on.

Keras' ``fit`` cannot do several workers, several steps in a call under a strategy, or a seed for
each step and replica, so the loop is our own.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from condconv.engine import checkpoints, config, devices, files, telemetry
from condconv.engine.errors import RunError, UsageError
from condconv.engine.evaluation import Evaluator, Predictions
from condconv.engine.experiment import (
    Data,
    Experiment,
    blaming_the_config,
    build_data,
    build_model,
    check_images_fit,
    failing_in_one_line,
)
from condconv.engine.optimization import (
    Clock,
    MovingAverage,
    cross_entropy,
    decayed_variables,
    half_squared_norm,
    likeliest,
)
from condconv.stochastic import seed_scope

_DROPOUT = 1  # what a seed is folded with, so that no two uses of it draw alike


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
    """

    experiment: Experiment
    data: Data
    strategy: tf.distribute.Strategy
    clock: Clock
    schedule: keras.optimizers.schedules.LearningRateSchedule
    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    average: MovingAverage | None

    def variables(self) -> dict[str, Any]:
        """Returns all that a checkpoint holds, by name."""
        weights = checkpoints.named_variables(self.model)
        named = {f"model/{path}": variable for path, variable in weights.items()}
        for variable in self.optimizer.variables:
            named[f"optimizer/{variable.path}"] = variable
        if self.average:
            averages = zip(weights, self.average.averages, strict=True)
            named |= {f"average/{path}": average for path, average in averages}
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


def build(experiment: Experiment) -> Run:
    """Builds everything that a run needs, and writes nothing.

    Raises:
        UsageError: if the config asks for what cannot be.
    """
    strategy = devices.strategy(experiment.devices)
    replicas = strategy.num_replicas_in_sync
    for name in ("batch_size", "eval_batch_size"):
        size = getattr(experiment, name)
        if size is not None and size % replicas:
            raise UsageError(
                f"Experiment.{name}={size} cannot be divided among {replicas} replicas: "
                f"take a multiple of {replicas}"
            )
    splits = (experiment.train_split, experiment.selection_split, experiment.eval_split)
    data = build_data(experiment, *filter(None, splits))
    clock = experiment.clock(data.num_examples(experiment.train_split))
    keras.utils.set_random_seed(experiment.seed)
    with strategy.scope():
        model = build_model(experiment, data.num_classes)
        check_images_fit(model, data, experiment.train_split)
        with blaming_the_config():
            data.train_batches(
                experiment.train_split,
                batch_size=experiment.batch_size,
                seed=experiment.seed,
                start=0,
                shard=0,
                num_shards=1,
            )
        with blaming_the_config():
            schedule = experiment.schedule(clock=clock)
            optimizer = experiment.optimizer(learning_rate=schedule)
        optimizer.build(model.trainable_variables)
        average = None
        if experiment.ema_decay:
            weights = list(checkpoints.named_variables(model).values())
            average = MovingAverage(weights, experiment.ema_decay)
    return Run(experiment, data, strategy, clock, schedule, model, optimizer, average)


def train(experiment: Experiment, workdir: epath.Path) -> int:
    """Trains from the last checkpoint in ``workdir``, or from the start, to the end.

    Args:
        experiment: as gin's config in force describes it.
        workdir: of the run; made if it is not there.

    Returns:
        The exit code: 0, or 128 + signal if one stopped the run, its state saved.

    Raises:
        UsageError: before the first step, if the config or the workdir do not allow a run.
        RunError: after it.
    """
    _check_same_experiment(workdir)
    run = build(experiment)
    files.make_writable(workdir, "--workdir")
    kept = checkpoints.Checkpoints(workdir, experiment.keep_checkpoints)
    start = _restore(run, kept)
    config.save(workdir)
    config.save_operative(workdir)
    files.write_json(workdir / "environment.json", telemetry.environment(experiment.seed))
    if start >= run.clock.total_steps:
        print(f"{workdir} is already trained to step {start}", file=sys.stderr)
        return 0
    with (
        telemetry.Telemetry(workdir, run.clock.total_steps, experiment.batch_size, start) as told,
        _signals() as caught,
        failing_in_one_line(),
    ):
        _loop(run, kept, told, start, caught)
    if caught:
        print(f"stopped and saved; the same command goes on from {workdir}", file=sys.stderr)
        return 128 + caught[0]
    return 0


def _check_same_experiment(workdir: epath.Path) -> None:
    path = workdir / "config.gin"
    if path.exists() and (differences := config.differences(path.read_text())):
        raise UsageError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differences)}. "
            "Name another workdir, or remove this one"
        )


def _restore(run: Run, kept: checkpoints.Checkpoints) -> int:
    """Returns the step to go on from."""
    last = kept.load_last()
    if last is None:
        return 0
    step, state = last
    checkpoints.fit(state, run.variables(), f"the checkpoint of step {step}")
    return step


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that the loop can save; a second one acts as ever."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for each, before in handlers.items():
            signal.signal(each, before)

    handlers = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


def _loop(
    run: Run,
    kept: checkpoints.Checkpoints,
    told: telemetry.Telemetry,
    step: int,
    caught: list[int],
) -> None:
    experiment, total = run.experiment, run.clock.total_steps
    periods = {
        name: run.clock.period(getattr(experiment, name), f"Experiment.{name}")
        for name in ("log_every", "evaluate_every", "checkpoint_every")
    }
    run_steps, batches = make_steps(run), iter(train_batches(run, step))
    evaluator, window = _evaluator(run), _Window(run, step)
    while step < total and not caught:
        until_due = min(period - step % period for period in periods.values())
        count = min(until_due, experiment.steps_per_call, total - step)
        window.add(run_steps(batches, step, count))
        step += count
        due = {n for n, period in periods.items() if step % period == 0 or step == total}
        if "log_every" in due:
            told.record(step, window.close(step, kept.steps()))
        with window.paused():
            best = None
            if "evaluate_every" in due:
                best = _evaluate(run, evaluator, told, kept, step)
            if "checkpoint_every" in due or best is not None or caught:
                kept.save(step, {n: np.asarray(v.numpy()) for n, v in run.variables().items()})
            if best is not None:
                kept.mark_best(step, best)


def _evaluator(run: Run) -> Callable[[str], Predictions]:
    batch_size = run.experiment.eval_batch_size or run.experiment.batch_size
    return Evaluator(run.model, run.data, batch_size, run.strategy)


def _evaluate(
    run: Run,
    evaluator: Callable[[str], Predictions],
    told: telemetry.Telemetry,
    kept: checkpoints.Checkpoints,
    step: int,
) -> float | None:
    """Evaluates and tells; returns the score if it is the best so far.

    Without a split to select by, the reported one is evaluated to be seen, and chooses nothing.
    """
    selection = run.experiment.selection_split
    split, prefix = (selection, "minival") if selection else (run.experiment.eval_split, "val")
    with run.averaged():
        result = evaluator(split).summary(run.data.num_classes)
    told.record(step, {f"{prefix}_{name}": value for name, value in result.items()}, notable=True)
    best = kept.best()
    better = selection and (best is None or best[0] > step or result["top1"] > best[1])
    return result["top1"] if better else None


class _Window:
    """What happened since the last line of the log."""

    def __init__(self, run: Run, step: int):
        self._run = run
        self._open(step)

    def _open(self, step: int) -> None:
        self._start, self._began = step, time.monotonic()
        self._sums: dict[str, float] = {}

    def add(self, sums: dict[str, tf.Tensor]) -> None:
        """Adds what some steps returned."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps time that is spent on other things out of the throughput."""
        paused = time.monotonic()
        yield
        self._began += time.monotonic() - paused

    def close(self, step: int, checkpoint_steps: list[int]) -> dict[str, float]:
        """Returns what to log at ``step``, and begins anew.

        Raises:
            RunError: if a loss is no longer a finite number.
        """
        batch_size, clock = self._run.experiment.batch_size, self._run.clock
        rate = float(self._run.schedule(step))
        examples = self._sums.pop("examples")
        means = {f"train_{name}": value / examples for name, value in self._sums.items()}
        if not all(np.isfinite(value) for value in means.values()):
            saved = checkpoint_steps[-1] if checkpoint_steps else "none"
            raise RunError(
                f"the loss is not finite (step {step}, learning rate {rate:.4g}); "
                f"last checkpoint: {saved}"
            )
        seconds = time.monotonic() - self._began
        values = {
            "epoch": step * batch_size / clock.num_examples,
            **means,
            "learning_rate": rate,
            "images_per_second": (step - self._start) * batch_size / seconds,
        }
        self._open(step)
        return values


def train_batches(run: Run, start: int) -> Any:
    """Returns the distributed training batches from step ``start`` on."""
    experiment = run.experiment

    def batches(batch_size: int, shard: int, num_shards: int) -> tf.data.Dataset:
        return run.data.train_batches(
            experiment.train_split,
            batch_size=batch_size,
            seed=experiment.seed,
            start=start,
            shard=shard,
            num_shards=num_shards,
        )

    return devices.distribute(run.strategy, experiment.batch_size, batches)


def make_steps(run: Run) -> Callable[[Any, int, int], dict[str, tf.Tensor]]:
    """Returns a compiled function that runs k training steps.

    It takes an iterator over the distributed batches, the first step and k, and returns sums over
    all examples of the steps: "examples", "loss" (unsmoothed cross-entropy), "top1", "objective".
    """

    @tf.function
    def run_steps(batches: Any, first: tf.Tensor, count: tf.Tensor) -> dict[str, tf.Tensor]:
        sums = dict.fromkeys(("examples", "loss", "top1", "objective"), tf.constant(0.0))
        for offset in tf.range(count):
            step = first + offset
            parts = run.strategy.run(_step, args=(run, next(batches), step))
            if run.average:
                run.average.update(step + 1)
            sums = {name: sums[name] + _total(run.strategy, parts[name]) for name in sums}
        return sums

    return lambda batches, first, count: run_steps(
        batches, tf.constant(first, tf.int64), tf.constant(count, tf.int64)
    )


def _total(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)


def _step(run: Run, batch: dict[str, tf.Tensor], step: tf.Tensor) -> dict[str, tf.Tensor]:
    """One training step of one replica; returns sums over its examples."""
    experiment, model = run.experiment, run.model
    replicas = run.strategy.num_replicas_in_sync
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    seed = tf.random.experimental.stateless_fold_in([experiment.seed, _DROPOUT], step)
    seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(replica, tf.int64))
    with tf.GradientTape() as tape, seed_scope(seed):
        logits = tf.cast(model(batch["image"], training=True), tf.float32)
        errors = cross_entropy(batch["label"], logits, experiment.label_smoothing)
        # Gradients are summed over the replicas, so each contributes its share of the whole.
        objective = tf.reduce_sum(errors) / experiment.batch_size
        if experiment.weight_decay:
            decay = half_squared_norm(decayed_variables(model))
            objective += experiment.weight_decay * decay / replicas
        objective += sum(model.losses) / replicas
    gradients = tape.gradient(objective, model.trainable_variables)
    run.optimizer.apply(gradients, model.trainable_variables)
    hits = tf.equal(tf.argmax(logits, axis=-1), likeliest(batch["label"]))
    return {
        "examples": tf.cast(tf.size(errors), tf.float32),
        "loss": tf.reduce_sum(cross_entropy(batch["label"], logits)),
        "top1": tf.reduce_sum(tf.cast(hits, tf.float32)),
        "objective": objective * experiment.batch_size,
    }
