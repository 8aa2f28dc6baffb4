"""One training step, on any number of replicas, and the compiled loop over several of them.

The loss of k replicas is the loss of one with k times the batch: gradients are summed once, in the
step, and are the same on every replica before they are clipped and applied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.backends.tensorflow.run import Run
from condconv.engine.optimization import (
    apply_summed,
    cross_entropy,
    decayed_variables,
    half_squared_norm,
    likeliest,
)
from condconv.stochastic import seed_scope

Tensors = dict[str, tf.Tensor]

_DROPOUT = 1  # what a seed is folded with, so that no two uses of it draw alike
_SUMS = ("examples", "loss", "top1", "objective")  # over the examples of a step
_GOOD = -1  # where no step was bad


@dataclasses.dataclass(frozen=True)
class Steps:
    """What some steps came to.

    Attributes:
        sums: over all examples, "examples", "loss" (unsmoothed cross-entropy), "top1" and
            "objective"; over the steps, "steps", "gradient_norm" and "seconds_waited" for input.
        bad: the first step whose loss or gradient was not finite, or None.
        stop: whether any worker asked to stop.
    """

    sums: dict[str, float]
    bad: int | None
    stop: bool


def train_batches(run: Run, start: int) -> Any:
    """Returns the distributed training batches from step ``start`` of the data on."""
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


class Stepper:
    """Runs training steps, several in one call of a compiled function.

    Attributes:
        waiting: whether the step under way is waiting for its batch.
    """

    def __init__(self, run: Run):
        self.waiting = tf.Variable(False, trainable=False)
        self._run = run
        self._call = tf.function(self._steps)

    def __call__(
        self, batches: Any, first: int, count: int, skipped: int = 0, stop: bool = False
    ) -> Steps:
        """Runs ``count`` steps.

        Args:
            batches: iterator over the distributed batches.
            first: step to begin with.
            count: of steps.
            skipped: by how many steps the data is ahead; seeds follow the data.
            stop: whether this worker asks all to stop.
        """
        sums, bad, stop = self._call(
            batches,
            tf.constant(first, tf.int64),
            tf.constant(count, tf.int64),
            tf.constant(skipped, tf.int64),
            tf.constant(float(stop)),
        )
        bad = int(bad)
        values = {name: float(value) for name, value in sums.items()}
        return Steps(values, None if bad == _GOOD else bad, bool(stop > 0))

    def _steps(
        self,
        batches: Any,
        first: tf.Tensor,
        count: tf.Tensor,
        skipped: tf.Tensor,
        stop: tf.Tensor,
    ) -> tuple[Tensors, tf.Tensor, tf.Tensor]:
        run, zero = self._run, tf.zeros([], _precise(self._run))
        sums = dict.fromkeys((*_SUMS, "steps", "gradient_norm"), zero)
        waited, bad, stops = tf.zeros([], tf.float64), tf.constant(_GOOD, tf.int64), stop * 0
        for offset in tf.range(count):
            step = first + offset
            batch, seconds = self._next(batches, sums["objective"])
            parts = _one(run, batch, step + skipped, stop)
            if run.average:
                run.average.update(step + 1)
            waited += seconds
            stops += parts.pop("stop")
            worst = parts["loss"] + parts["gradient_norm"]
            is_bad = tf.logical_not(tf.math.is_finite(worst)) & parts.pop("final")
            bad = tf.where((bad == _GOOD) & is_bad, step, bad)
            sums = {name: sums[name] + parts[name] for name in sums}
        return {**sums, "seconds_waited": waited}, bad, stops

    def _next(self, batches: Any, after: tf.Tensor) -> tuple[Any, tf.Tensor]:
        """Returns a batch and the seconds it took to come, once ``after`` was known."""
        with tf.control_dependencies([after]):
            asked = tf.timestamp()
            self.waiting.assign(True)
        with tf.control_dependencies([asked]):
            batch = next(batches)
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            self.waiting.assign(False)
            seconds = tf.timestamp() - asked
        with tf.control_dependencies([seconds]):  # or one core may look at the clock afterwards
            batch = tf.nest.map_structure(_held, batch, expand_composites=True)
        return batch, seconds


def _held(tensor: tf.Tensor) -> tf.Tensor:
    with tf.device(tensor.device):
        return tf.identity(tensor)


def _precise(run: Run) -> tf.DType:
    return tf.float64 if run.experiment.precision == "float64" else tf.float32


def _one(run: Run, batch: Any, data_step: tf.Tensor, stop: tf.Tensor) -> Tensors:
    """Runs a step on all replicas; returns the sums, and whether a bad one is beyond repair."""
    strategy = run.strategy
    if not run.loss_scale:
        parts = strategy.run(_whole_step, args=(run, batch, data_step, stop))
        return _totals(run, parts) | {"final": tf.constant(True)}
    parts, gradients = strategy.run(_gradient_step, args=(run, batch, data_step, stop))
    totals = _totals(run, parts)
    finite = tf.math.is_finite(totals["gradient_norm"])
    final = run.loss_scale.is_least() | tf.logical_not(tf.math.is_finite(totals["loss"]))

    def update() -> tf.Tensor:
        strategy.run(lambda given: apply_summed(run.optimizer, given, run.model), args=(gradients,))
        return totals["gradient_norm"]

    norm = tf.cond(finite, update, lambda: tf.zeros_like(totals["gradient_norm"]))
    run.loss_scale.update(finite)
    return totals | {
        "gradient_norm": tf.where(final, totals["gradient_norm"], norm),
        "final": final,
    }


def _totals(run: Run, parts: Tensors) -> Tensors:
    replicas = run.strategy.num_replicas_in_sync
    totals = {
        name: run.strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None)
        for name, part in parts.items()
    }
    return totals | {name: totals[name] / replicas for name in ("steps", "gradient_norm")}


def _whole_step(run: Run, batch: Tensors, data_step: tf.Tensor, stop: tf.Tensor) -> Tensors:
    parts, gradients = _gradient_step(run, batch, data_step, stop)
    apply_summed(run.optimizer, gradients, run.model)
    return parts


def _gradient_step(
    run: Run, batch: Tensors, data_step: tf.Tensor, stop: tf.Tensor
) -> tuple[Tensors, list[tf.Tensor]]:
    """Returns this replica's parts of the sums, and the gradients of all replicas together."""
    context = tf.distribute.get_replica_context()
    replica = tf.cast(context.replica_id_in_sync_group, tf.int64)
    seed = tf.random.experimental.stateless_fold_in([run.experiment.seed, _DROPOUT], data_step)
    seed = tf.random.experimental.stateless_fold_in(seed, replica)
    scale = run.loss_scale.read() if run.loss_scale else tf.ones([], _precise(run))
    parts, gradients = _accumulated(run, batch, seed, scale)
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    gradients = [gradient / tf.cast(scale, gradient.dtype) for gradient in gradients]
    norm = tf.linalg.global_norm(gradients)
    if run.experiment.clip_norm:
        gradients, _ = tf.clip_by_global_norm(gradients, run.experiment.clip_norm, use_norm=norm)
    _agree_on_statistics(run, context)
    parts |= {"gradient_norm": norm, "steps": tf.ones([], _precise(run))}
    return parts | {"stop": tf.identity(stop)}, gradients  # a tensor of this replica's own


def _accumulated(
    run: Run, batch: Tensors, seed: tf.Tensor, scale: tf.Tensor
) -> tuple[Tensors, list[tf.Tensor]]:
    """Returns sums and gradients over the parts of a batch, one part after the other."""
    count = run.experiment.accumulation_steps
    gradients_of = _compiled(run)
    if count == 1:
        return gradients_of(batch["image"], batch["label"], seed, scale)
    parts, gradients = {}, []
    split = (tf.split(batch[name], count) for name in ("image", "label"))
    for number, (image, label) in enumerate(zip(*split, strict=True)):
        own = tf.random.experimental.stateless_fold_in(seed, number)
        if gradients:  # not before what went before, or all parts would be in memory at once
            with tf.control_dependencies(gradients):
                image = tf.identity(image)
        more, new = gradients_of(image, label, own, scale)
        parts = {name: parts.get(name, 0.0) + value for name, value in more.items()}
        gradients = [a + b for a, b in zip(gradients, new, strict=True)] if gradients else new
    return parts, gradients


def _compiled(run: Run) -> Callable[..., tuple[Tensors, list[tf.Tensor]]]:
    def gradients_of(*tensors: tf.Tensor) -> tuple[Tensors, list[tf.Tensor]]:
        return _gradients(run, *tensors)

    return tf.function(gradients_of, jit_compile=True) if run.experiment.xla else gradients_of


def _gradients(
    run: Run, image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor, scale: tf.Tensor
) -> tuple[Tensors, list[tf.Tensor]]:
    """Returns sums over some examples of one replica, and their gradients times ``scale``."""
    experiment, model = run.experiment, run.model
    shares = run.strategy.num_replicas_in_sync * experiment.accumulation_steps
    with tf.GradientTape() as tape, seed_scope(seed):
        logits = tf.cast(model(image, training=True), _precise(run))
        errors = cross_entropy(label, logits, experiment.label_smoothing)
        # Gradients are summed over replicas and parts, so each contributes its share of the whole.
        objective = tf.reduce_sum(errors) / experiment.batch_size
        if experiment.weight_decay:
            decay = half_squared_norm(decayed_variables(model))
            objective += experiment.weight_decay * decay / shares
        objective += sum(model.losses) / shares
        scaled = objective * scale
    variables = [variable.value for variable in model.trainable_variables]
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(scaled, variables, unconnected_gradients=zero)
    hits = tf.equal(tf.argmax(logits, axis=-1), likeliest(label))
    sums = {
        "examples": tf.cast(tf.size(errors), logits.dtype),
        "loss": tf.reduce_sum(cross_entropy(label, logits)),
        "top1": tf.reduce_sum(tf.cast(hits, logits.dtype)),
        "objective": objective * experiment.batch_size,
    }
    return sums, gradients


def _agree_on_statistics(run: Run, context: tf.distribute.ReplicaContext) -> None:
    """Gives all replicas the mean of their batch-norm statistics.

    Those of one alone would be saved otherwise, and a resumed run would not be the same.
    """
    if run.strategy.num_replicas_in_sync == 1 or run.experiment.synchronized_batch_norm:
        return
    statistics = [
        variable
        for layer in run.model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]
    values = [tf.identity(variable.value) for variable in statistics]
    means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
    for variable, mean in zip(statistics, means, strict=True):
        variable.assign(mean)
