"""One training step, on any number of replicas, and the loop over several of them, to be compiled.

The loss of k replicas is the loss of one with k times the batch: gradients are summed once, in the
step, and are the same on every replica before they are clipped and applied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from condconv.engine.backends.tensorflow import updates
from condconv.engine.backends.tensorflow.strategy import Devices
from condconv.engine.experiment import Experiment
from condconv.engine.optimization import HandedRate, batch_normalizations, decayed_variables
from condconv.engine.schedules import Clock, Schedule
from condconv.engine.tasks import Data, Task
from condconv.stochastic import seed_scope

Tensors = dict[str, tf.Tensor]

_DROPOUT = 1  # what a seed is folded with, so that no two uses of it draw alike
GOOD = -1  # where no step was bad


@dataclasses.dataclass(frozen=True)
class Built:
    """An experiment that has been built; see ``backends.Run``.

    Attributes:
        rate: what the optimizer learns at.
        average: of the weights, or None.
        scale: of float16's loss, or None.
        waiting: whether the step under way is waiting for its batch.
    """

    experiment: Experiment
    data: Data
    task: Task
    devices: Devices
    clock: Clock
    schedule: Schedule
    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    rate: HandedRate
    average: updates.MovingAverage | None
    scale: updates.LossScale | None
    waiting: tf.Variable

    @property
    def strategy(self) -> tf.distribute.Strategy:
        """Where it computes."""
        return self.devices.strategy

    @property
    def precise(self) -> tf.DType:
        """What losses and their sums are computed in."""
        return tf.float64 if self.experiment.precision == "float64" else tf.float32


def several(
    run: Built,
    batches: Any,
    first: tf.Tensor,
    rates: tf.Tensor,
    count: tf.Tensor,
    skipped: tf.Tensor,
    stop: tf.Tensor,
) -> tuple[Tensors, tf.Tensor, tf.Tensor]:
    """Takes ``count`` steps, one for each rate.

    Returns:
        Their sums, the first bad one or ``GOOD``, and how many workers asked to stop.
    """
    zero = tf.zeros([], run.precise)
    names = ("examples", "objective", *run.task.means, "steps", "gradient_norm")
    sums = dict.fromkeys(names, zero)
    waited, bad, stops = tf.zeros([], tf.float64), tf.constant(GOOD, tf.int64), stop * 0
    for offset in tf.range(count):
        step = first + tf.cast(offset, tf.int64)
        batch, seconds = _next(run, batches, sums["objective"])
        run.rate.value = rates[offset]
        parts, gradients = run.strategy.run(_on_replica, args=(run, batch, step + skipped, stop))
        totals, is_final = _scaled_back(run, _totals(run, parts), gradients)
        if run.average:
            run.average.update(step + 1)
        waited += seconds
        stops += totals.pop("stop")
        worst = totals["loss"] + totals["gradient_norm"]
        is_bad = tf.logical_not(tf.math.is_finite(worst)) & is_final
        bad = tf.where((bad == GOOD) & is_bad, step, bad)
        sums = {name: sums[name] + totals[name] for name in sums}
    return {**sums, "seconds_waited": waited}, bad, stops


def _next(run: Built, batches: Any, after: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Returns a batch and the seconds it took to come, once ``after`` was known."""
    with tf.control_dependencies([after]):
        asked = tf.timestamp()
        run.waiting.assign(True)
    with tf.control_dependencies([asked]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        run.waiting.assign(False)
        seconds = tf.timestamp() - asked
    with tf.control_dependencies([seconds]):  # or one core may look at the clock afterwards
        batch = tf.nest.map_structure(_in_place, batch, expand_composites=True)
    return batch, seconds


def _in_place(tensor: tf.Tensor) -> tf.Tensor:
    with tf.device(tensor.device):
        return tf.identity(tensor)


def _on_replica(
    run: Built, batch: Tensors, data_step: tf.Tensor, stop: tf.Tensor
) -> tuple[Tensors, list[tf.Tensor]]:
    """Takes a step on one replica; returns its parts of the sums.

    Where gradients are scaled, they are returned in place of being applied: whether they are all
    numbers is not known before all replicas are.
    """
    experiment, context = run.experiment, tf.distribute.get_replica_context()
    fold = tf.random.experimental.stateless_fold_in
    seed = fold([experiment.seed, _DROPOUT], data_step)
    seed = fold(seed, tf.cast(context.replica_id_in_sync_group, tf.int64))
    batches = _split(batch, experiment.accumulation_steps)
    divisor = _divisor(run, batches, context)
    scale = run.scale.read() if run.scale else tf.ones([], run.precise)
    part_of = _compiled(run)
    parts, gradients = {}, []
    for number, some in enumerate(batches):
        own = fold(seed, number) if len(batches) > 1 else seed
        if gradients:  # not before what went before, or all parts would be in memory at once
            with tf.control_dependencies(gradients):
                some = {**some, "image": tf.identity(some["image"])}
        more, new = part_of(some, own, divisor, scale)
        parts = {name: parts[name] + value if parts else value for name, value in more.items()}
        gradients = [a + b for a, b in zip(gradients, new, strict=True)] if gradients else new
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    gradients = [gradient / tf.cast(scale, gradient.dtype) for gradient in gradients]
    norm = tf.linalg.global_norm(gradients)
    if experiment.clip_norm:
        gradients, _ = tf.clip_by_global_norm(gradients, experiment.clip_norm, use_norm=norm)
    _agree_on_statistics(run, context)
    parts |= {"gradient_norm": norm, "steps": tf.ones([], run.precise)}
    parts |= {"stop": tf.identity(stop)}  # a tensor of this replica's own
    if run.scale:
        return parts, gradients
    updates.apply_summed(run.optimizer, gradients, run.model)
    return parts, []


def _split(batch: Tensors, count: int) -> list[Tensors]:
    """Returns the parts of a batch that are computed one after the other."""
    if count == 1:
        return [batch]
    columns = {name: tf.split(column, count) for name, column in batch.items()}
    return [{name: columns[name][number] for name in columns} for number in range(count)]


def _divisor(run: Built, batches: list[Tensors], context: tf.distribute.ReplicaContext) -> Any:
    """Returns what the loss of the whole batch is divided by, over replicas and parts."""
    if run.task.divisor is None:
        return run.experiment.batch_size
    shares = [run.task.divisor(batch) for batch in batches]
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.add_n(shares))


def _compiled(run: Built) -> Callable[..., tuple[Tensors, list[tf.Tensor]]]:
    part_of = functools.partial(_part, run)
    return tf.function(part_of, jit_compile=True) if run.experiment.xla else part_of


def _part(
    run: Built, batch: Tensors, seed: tf.Tensor, divisor: Any, scale: tf.Tensor
) -> tuple[Tensors, list[tf.Tensor]]:
    """Returns sums over some examples of one replica, and their gradients times ``scale``."""
    experiment, model = run.experiment, run.model
    shares = run.strategy.num_replicas_in_sync * experiment.accumulation_steps
    with tf.GradientTape() as tape, seed_scope(seed):
        outputs = model(batch["image"], training=True)
        outputs = tf.nest.map_structure(lambda x: tf.cast(x, run.precise), outputs)
        loss, sums = run.task.loss(outputs, batch)
        # Gradients are summed over replicas and parts, so each contributes its share of the whole.
        objective = loss / divisor
        if experiment.weight_decay:
            decay = updates.half_squared_norm(decayed_variables(model))
            objective += experiment.weight_decay * decay / shares
        objective += sum(model.losses) / shares
        scaled = objective * scale
    variables = [variable.value for variable in model.trainable_variables]
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(scaled, variables, unconnected_gradients=zero)
    examples = tf.cast(tf.shape(batch["image"])[0], run.precise)
    return {**sums, "examples": examples, "objective": objective * experiment.batch_size}, gradients


def _totals(run: Built, parts: Tensors) -> Tensors:
    totals = {
        name: run.strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None)
        for name, part in parts.items()
    }
    replicas = run.strategy.num_replicas_in_sync
    return totals | {name: totals[name] / replicas for name in ("steps", "gradient_norm")}


def _scaled_back(
    run: Built, totals: Tensors, gradients: list[tf.Tensor]
) -> tuple[Tensors, tf.Tensor]:
    """Applies gradients that were scaled, if they are numbers; else tries a smaller scale.

    Returns:
        The sums, and whether a bad step among them is beyond repair.
    """
    if not run.scale:
        return totals, tf.constant(True)
    norm = totals["gradient_norm"]
    finite = tf.math.is_finite(norm)
    final = run.scale.is_least() | tf.logical_not(tf.math.is_finite(totals["loss"]))

    def update() -> tf.Tensor:
        apply = lambda given: updates.apply_summed(run.optimizer, given, run.model)  # noqa: E731
        run.strategy.run(apply, args=(gradients,))
        return norm

    applied = tf.cond(finite, update, lambda: tf.zeros_like(norm))
    run.scale.update(finite)
    return totals | {"gradient_norm": tf.where(final, norm, applied)}, final


def _agree_on_statistics(run: Built, context: tf.distribute.ReplicaContext) -> None:
    """Gives all replicas the mean of their batch-norm statistics.

    Those of one alone would be saved otherwise, and a resumed run would not be the same.
    """
    apart = run.strategy.num_replicas_in_sync > 1 and not run.experiment.synchronized_batch_norm
    statistics = [
        variable
        for layer in batch_normalizations(run.model)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]
    if not (apart and statistics):
        return
    values = [tf.identity(variable.value) for variable in statistics]
    means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
    for variable, mean in zip(statistics, means, strict=True):
        variable.assign(mean)
