"""Durations and learning rates of the official recipes.

A learning rate is one formula in numpy's float32, computed on the host and handed to whichever
engine takes the step. Source: tensorflow/tpu, models/official/efficientnet (utils.py, main.py).
"""

import dataclasses
import math
import re
from collections.abc import Callable

import gin
import numpy as np

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


def check_range(name: str, value: float, fits: bool, allowed: str) -> None:
    """Raises a UsageError for an argument ``name`` whose value does not fit what is allowed."""
    if not fits:
        raise UsageError(f"{name} takes {allowed}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate by step: a linear rise from zero, then a decay.

    Attributes:
        peak: learning rate that the decay is a share of.
        warmup_steps: of the rise.
        decayed: steps (N,) to the share of the peak that is left, which has been counting from the
            first step on; float32 both.
    """

    peak: float
    warmup_steps: int
    decayed: Callable[[np.ndarray], np.ndarray]

    def __call__(self, step: int | np.ndarray) -> np.ndarray:
        """Returns the learning rate of a step, or of each of several, float32."""
        step = np.asarray(step, np.float32)
        rising = step / np.float32(max(self.warmup_steps, 1))
        return np.float32(self.peak) * np.where(
            step < self.warmup_steps, rising, self.decayed(step)
        )


def _schedule(
    name: str,
    clock: Clock,
    base_learning_rate: float,
    warmup: Duration,
    decayed: Callable[[np.ndarray], np.ndarray],
) -> Schedule:
    """Returns a schedule whose peak grows with the batch, as officially."""
    fits = base_learning_rate >= 0
    check_range(f"{name}.base_learning_rate", base_learning_rate, fits, "a number of at least 0")
    peak = base_learning_rate * clock.batch_size / 256
    return Schedule(peak, int(clock.steps(warmup, f"{name}.warmup")), decayed)


@gin.register(denylist=["clock"])
def exponential(
    clock: Clock,
    base_learning_rate: float = 0.016,
    warmup: Duration = "5 epochs",
    every: Duration = "2.4 epochs",
    factor: float = 0.97,
) -> Schedule:
    """Warm-up, then a staircase: the schedule of EfficientNet and MnasNet.

    Args:
        clock: turns durations into steps.
        base_learning_rate: for 256 examples in a step; the peak grows with the batch.
        warmup: duration of the linear rise from zero.
        every: duration of a stair.
        factor: of the learning rate from one stair to the next.
    """
    steps = clock.steps(every, "exponential.every")
    check_range("exponential.every", every, steps > 0, "a duration above 0")
    check_range("exponential.factor", factor, 0 < factor <= 1, "a factor above 0 and up to 1")

    def decayed(step: np.ndarray) -> np.ndarray:
        return np.power(np.float32(factor), np.floor(step / np.float32(steps)))

    return _schedule("exponential", clock, base_learning_rate, warmup, decayed)


@gin.register(denylist=["clock"])
def cosine(
    clock: Clock, base_learning_rate: float = 0.1, warmup: Duration = "5 epochs"
) -> Schedule:
    """Warm-up, then half a cosine down to zero at the end of the run.

    Args:
        clock: turns durations into steps.
        base_learning_rate: for 256 examples in a step; the peak grows with the batch.
        warmup: duration of the linear rise from zero.
    """

    def decayed(step: np.ndarray) -> np.ndarray:
        return np.float32(0.5) * (1 + np.cos(step * np.float32(math.pi / clock.total_steps)))

    return _schedule("cosine", clock, base_learning_rate, warmup, decayed)


@gin.register(denylist=["clock"])
def constant(
    clock: Clock, base_learning_rate: float = 0.1, warmup: Duration = "5 epochs"
) -> Schedule:
    """Warm-up, then the same to the end; arguments as those of ``cosine``."""
    return _schedule("constant", clock, base_learning_rate, warmup, np.ones_like)


@gin.register(denylist=["clock"])
def polynomial(
    clock: Clock,
    base_learning_rate: float = 0.1,
    warmup: Duration = "5 epochs",
    end_learning_rate: float = 0.1,
    power: float = 2.0,
) -> Schedule:
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
    schedule = _schedule("polynomial", clock, base_learning_rate, warmup, np.ones_like)
    end = np.float32(end_learning_rate / schedule.peak)
    steps = np.float32(clock.total_steps - schedule.warmup_steps + 1)

    def decayed(step: np.ndarray) -> np.ndarray:
        left = 1 - np.clip(step - schedule.warmup_steps, np.float32(1), steps) / steps
        return (1 - end) * left ** np.float32(power) + end

    return dataclasses.replace(schedule, decayed=decayed)
