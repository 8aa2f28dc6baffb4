"""Durations, learning rates, optimizers, loss and moving average of the official recipes.

Sources: tensorflow/tpu, models/official/efficientnet (utils.py, main.py). Its optimizers are those
of TensorFlow 1, whose steps differ from Keras'.
"""

import dataclasses
import math
import re
from typing import Any

import gin
import keras
import tensorflow as tf

from condconv.engine.errors import UsageError

Duration = str

_UNITS = ("steps", "epochs", "examples", "percent")
_DURATION = re.compile(rf"([0-9.]+(?:e[0-9]+)?) ({'|'.join(_UNITS)})")


def check_duration(duration: Duration, name: str) -> tuple[float, str]:
    """Returns amount and unit of a duration such as "2.4 epochs".

    Raises:
        UsageError: if it is not one; ``name`` says whose it was.
    """
    match = _DURATION.fullmatch(duration)
    try:
        amount, unit = float(match[1]), match[2]
    except (TypeError, ValueError):
        amount, unit = math.inf, ""
    if not math.isfinite(amount):
        raise UsageError(
            f"{name} takes a number and one of {', '.join(_UNITS)}, such as '5 epochs', "
            f"not {duration!r}"
        )
    return amount, unit


@dataclasses.dataclass(frozen=True)
class Clock:
    """Turns durations into steps.

    Attributes:
        batch_size: examples in a step.
        num_examples: examples in an epoch.
        total_steps: steps in the run; "percent" are of these.
    """

    batch_size: int
    num_examples: int
    total_steps: int

    def steps(self, duration: Duration, name: str = "duration") -> float:
        """Returns ``duration`` in steps, with its fraction."""
        amount, unit = check_duration(duration, name)
        if unit == "percent" and not self.total_steps:
            raise UsageError(f"{name} is what percentages are of: give it in another unit")
        return (
            amount
            * {
                "steps": 1.0,
                "epochs": self.num_examples / self.batch_size,
                "examples": 1 / self.batch_size,
                "percent": self.total_steps / 100,
            }[unit]
        )

    def period(self, duration: Duration, name: str) -> int:
        """Returns ``duration`` in whole steps, one at least."""
        return max(1, round(self.steps(duration, name)))


class _WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Linear from zero; then the decay, which has been counting from the first step on."""

    def __init__(self, clock: Clock, base_learning_rate: float, warmup: Duration, name: str):
        allowed = "a number of at least 0"
        _check(f"{name}.base_learning_rate", base_learning_rate, base_learning_rate >= 0, allowed)
        self.peak = base_learning_rate * clock.batch_size / 256
        self.warmup_steps = int(clock.steps(warmup, f"{name}.warmup"))

    def decayed(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the share of the peak that is left at ``step``."""
        raise NotImplementedError

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        rising = step / max(self.warmup_steps, 1)
        return self.peak * tf.where(step < self.warmup_steps, rising, self.decayed(step))


class _Exponential(_WarmUp):
    def __init__(self, clock: Clock, every: Duration, factor: float, *arguments: Any):
        super().__init__(clock, *arguments)
        self.every, self.factor = clock.steps(every, "exponential.every"), factor
        _check("exponential.every", every, self.every > 0, "a duration above 0")
        _check("exponential.factor", factor, 0 < factor <= 1, "a factor above 0 and up to 1")

    def decayed(self, step: tf.Tensor) -> tf.Tensor:
        return tf.pow(self.factor, tf.floor(step / self.every))


class _Cosine(_WarmUp):
    def __init__(self, clock: Clock, *arguments: Any):
        super().__init__(clock, *arguments)
        self.total_steps = clock.total_steps

    def decayed(self, step: tf.Tensor) -> tf.Tensor:
        return 0.5 * (1 + tf.cos(step * (math.pi / self.total_steps)))


class _Constant(_WarmUp):
    def decayed(self, step: tf.Tensor) -> tf.Tensor:
        return tf.ones_like(step)


class _Polynomial(_WarmUp):
    def __init__(self, clock: Clock, end: float, power: float, *arguments: Any):
        super().__init__(clock, *arguments)
        self.end, self.power = end / self.peak, power
        self.decay_steps = clock.total_steps - self.warmup_steps + 1

    def decayed(self, step: tf.Tensor) -> tf.Tensor:
        done = tf.clip_by_value(step - self.warmup_steps, 1.0, self.decay_steps)
        return (1 - self.end) * (1 - done / self.decay_steps) ** self.power + self.end


def _check(name: str, value: float, fits: bool, allowed: str) -> None:
    if not fits:
        raise UsageError(f"{name} takes {allowed}, not {value!r}")


@gin.register(denylist=["clock"])
def exponential(
    clock: Clock,
    base_learning_rate: float = 0.016,
    warmup: Duration = "5 epochs",
    every: Duration = "2.4 epochs",
    factor: float = 0.97,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Warm-up, then a staircase: the schedule of EfficientNet and MnasNet.

    Args:
        clock: turns durations into steps.
        base_learning_rate: for 256 examples in a step; the peak grows with the batch.
        warmup: duration of the linear rise from zero.
        every: duration of a stair.
        factor: of the learning rate from one stair to the next.
    """
    return _Exponential(clock, every, factor, base_learning_rate, warmup, "exponential")


@gin.register(denylist=["clock"])
def cosine(
    clock: Clock, base_learning_rate: float = 0.1, warmup: Duration = "5 epochs"
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Warm-up, then half a cosine down to zero at the end of the run.

    Args:
        clock: turns durations into steps.
        base_learning_rate: for 256 examples in a step; the peak grows with the batch.
        warmup: duration of the linear rise from zero.
    """
    return _Cosine(clock, base_learning_rate, warmup, "cosine")


@gin.register(denylist=["clock"])
def constant(
    clock: Clock, base_learning_rate: float = 0.1, warmup: Duration = "5 epochs"
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Warm-up, then the same to the end; arguments as those of ``cosine``."""
    return _Constant(clock, base_learning_rate, warmup, "constant")


@gin.register(denylist=["clock"])
def polynomial(
    clock: Clock,
    base_learning_rate: float = 0.1,
    warmup: Duration = "5 epochs",
    end_learning_rate: float = 0.1,
    power: float = 2.0,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Warm-up, then down to a last learning rate: the official schedule for large batches.

    Args:
        clock: turns durations into steps.
        base_learning_rate: for 256 examples in a step; the peak grows with the batch.
        warmup: duration of the linear rise from zero.
        end_learning_rate: at the end of the run, whatever the batch.
        power: of the share of the decay that is left.
    """
    _check(
        "polynomial.base_learning_rate", base_learning_rate, base_learning_rate > 0, "more than 0"
    )
    arguments = (base_learning_rate, warmup, "polynomial")
    return _Polynomial(clock, end_learning_rate, power, *arguments)


class _Optimizer(keras.optimizers.Optimizer):
    """An optimizer of TensorFlow 1: the buffers of each variable, and its operation for one step.

    That passes over memory once, where the same in single operations takes twice as long.
    """

    buffers: dict[str, str] = {}  # initializer by name

    def __init__(self, learning_rate: Any, momentum: float, name: str):
        _check(f"{name}.momentum", momentum, 0 <= momentum < 1, "a share from 0 to below 1")
        super().__init__(learning_rate=learning_rate, name=name)
        self.momentum = momentum

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes the buffers."""
        if self.built:
            return
        super().build(variables)
        for buffer, initializer in self.buffers.items():
            made = [
                self.add_variable_from_reference(v, name=buffer, initializer=initializer)
                for v in variables
            ]
            setattr(self, buffer, made)

    def buffer(self, name: str, variable: Any) -> tf.Tensor:
        """Returns the handle of a variable's buffer, on this replica."""
        return getattr(self, name)[self._get_variable_index(variable)].value.handle

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Leaves gradients as they are: the training step has summed them over the replicas."""
        return grads_and_vars


class _Momentum(_Optimizer):
    buffers = {"momentums": "zeros"}

    def __init__(self, learning_rate: Any, momentum: float, nesterov: bool):
        super().__init__(learning_rate, momentum, "momentum")
        self.nesterov = nesterov

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=self.buffer("momentums", variable),
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient,
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )


class _RMSProp(_Optimizer):
    buffers = {"mean_squares": "ones", "momentums": "zeros"}

    def __init__(self, learning_rate: Any, momentum: float, decay: float, epsilon: float):
        super().__init__(learning_rate, momentum, "rmsprop")
        _check("rmsprop.decay", decay, 0 <= decay < 1, "a share from 0 to below 1")
        _check("rmsprop.epsilon", epsilon, epsilon > 0, "a number above 0")
        self.decay, self.epsilon = decay, epsilon

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self.buffer("mean_squares", variable),
            mom=self.buffer("momentums", variable),
            lr=tf.cast(learning_rate, variable.dtype),
            rho=self.decay,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


@gin.register(denylist=["learning_rate"])
def momentum(
    learning_rate: Any, momentum: float = 0.9, nesterov: bool = False
) -> keras.optimizers.Optimizer:
    """Gradient descent with momentum: m ← μm + g, w ← w − lr·m (Nesterov: g + μm for m).

    Keras' own multiplies the learning rate into the buffer, which differs as soon as it changes.
    """
    return _Momentum(learning_rate, momentum, nesterov)


@gin.register(denylist=["learning_rate"])
def rmsprop(
    learning_rate: Any, decay: float = 0.9, momentum: float = 0.9, epsilon: float = 1e-3
) -> keras.optimizers.Optimizer:
    """TensorFlow 1's RMSProp: mean square from one on, epsilon inside the root.

    s ← ρs + (1−ρ)g², m ← μm + lr·g/√(s+ε), w ← w − m. Keras' own starts the mean square at zero.
    """
    return _RMSProp(learning_rate, momentum, decay, epsilon)


def apply_summed(
    optimizer: keras.optimizers.Optimizer, gradients: list[tf.Tensor], model: keras.Model
) -> None:
    """Applies gradients that are already summed over the replicas, within each of them."""
    if not isinstance(optimizer, _Optimizer):  # Keras' own sum them (again)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        gradients = [gradient / replicas for gradient in gradients]
    optimizer.apply(gradients, model.trainable_variables)


class LossScale:
    """The factor that keeps float16's gradients from vanishing (arXiv:1710.03740, section 3.2).

    It is halved at a gradient that is not finite, whose step is left out, and doubled after 2,000
    steps in a row without one.
    """

    def __init__(self, initial: float = 2.0**15, patience: int = 2000):
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        scale = tf.Variable(initial, trainable=False, aggregation=first, name="scale")
        good = tf.Variable(0, trainable=False, dtype=tf.int64, aggregation=first, name="good_steps")
        self.variables = {"scale": scale, "good_steps": good}
        self._patience = patience

    def read(self) -> tf.Tensor:
        """Returns the factor, a float32 scalar."""
        return tf.convert_to_tensor(self.variables["scale"])

    def is_least(self) -> tf.Tensor:
        """Returns whether the factor cannot be made smaller, so that it is not what overflows."""
        return self.read() <= 1.0

    def update(self, finite: tf.Tensor) -> None:
        """Takes note of a step; outside of any replica."""
        scale, good = self.read(), tf.convert_to_tensor(self.variables["good_steps"]) + 1
        grown = tf.where(good >= self._patience, scale * 2, scale)
        self.variables["scale"].assign(tf.where(finite, grown, tf.maximum(scale / 2, 1.0)))
        self.variables["good_steps"].assign(
            tf.where(finite & (good < self._patience), good, tf.zeros_like(good))
        )


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Returns the cross-entropy of each example, (B,).

    Args:
        labels: (B,) classes, or (B, classes) probabilities.
        logits: (B, classes).
        smoothing: share of each label that is spread evenly over all classes.
    """
    classes = logits.shape[-1]
    if labels.shape.rank == 1:
        labels = tf.one_hot(labels, classes)
    labels = tf.cast(labels, logits.dtype) * (1 - smoothing) + smoothing / classes
    return tf.nn.softmax_cross_entropy_with_logits(labels, logits)


def likeliest(labels: tf.Tensor) -> tf.Tensor:
    """Returns the class of each label, (B,) int64; of mixed ones (B, classes) the largest share."""
    return tf.cast(labels, tf.int64) if labels.shape.rank == 1 else tf.argmax(labels, axis=-1)


def decayed_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what weight decay acts on: all trainable variables but those of batch norm.

    So biases, experts and routings decay too, as officially.
    """
    exempt = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.trainable_variables
    }
    return [v for v in model.trainable_variables if id(v) not in exempt]


def half_squared_norm(variables: list[keras.Variable]) -> tf.Tensor:
    """Returns ½·Σ‖v‖²."""
    return tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v)) for v in variables])


class MovingAverage:
    """The average of weights and batch-norm statistics that evaluation uses.

    a ← a − (1−d)(a − w) after each step, with d = min(decay, (1+n)/(10+n)) for the n-th step: the
    warm-up of the decay lets a short run forget its initial weights. Keras' own average covers
    neither the statistics nor the warm-up.
    """

    def __init__(self, variables: list[keras.Variable], decay: float):
        self.decay = decay
        self.variables = variables
        self.averages = [tf.Variable(v.value, trainable=False, name="average") for v in variables]
        self._strategy = tf.distribute.get_strategy()

    def restart(self) -> None:
        """Makes the averages what the variables are; outside of any replica."""
        for average, variable in zip(self.averages, self.variables, strict=True):
            average.assign(variable.numpy())

    def update(self, steps_done: tf.Tensor) -> None:
        """Moves the averages towards the variables; outside of any replica."""
        done = tf.cast(steps_done, tf.float32)
        rate = 1 - tf.minimum(self.decay, (1 + done) / (10 + done))

        def move(average: tf.Variable, variable: tf.Tensor) -> None:
            average.assign_sub(tf.cast(rate, average.dtype) * (average - variable))

        for average, variable in zip(self.averages, self.variables, strict=True):
            self._strategy.extended.update(average, move, args=(variable.value,))
