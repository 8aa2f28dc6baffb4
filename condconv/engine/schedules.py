"""Durations and learning rates of the official recipes.

Source: tensorflow/tpu, models/official/efficientnet (utils.py, main.py).
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
        check_range(
            f"{name}.base_learning_rate", base_learning_rate, base_learning_rate >= 0, allowed
        )
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
        check_range("exponential.every", every, self.every > 0, "a duration above 0")
        check_range("exponential.factor", factor, 0 < factor <= 1, "a factor above 0 and up to 1")

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


def check_range(name: str, value: float, fits: bool, allowed: str) -> None:
    """Raises a UsageError for an argument ``name`` whose value does not fit what is allowed."""
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
    check_range(
        "polynomial.base_learning_rate", base_learning_rate, base_learning_rate > 0, "more than 0"
    )
    arguments = (base_learning_rate, warmup, "polynomial")
    return _Polynomial(clock, end_learning_rate, power, *arguments)
