"""How sure a result is: means with intervals, and paired differences with p-values.

Everything rests on Student's t: over seeds because there are few of them, over images because the
mean over hundreds of images is nearly normal whatever an image contributes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        count: values it is the mean of.
        mean: of them.
        deviation: their standard deviation (of a sample: over count − 1); None of one value.
        low, high: the 95 % interval of the mean; None of one value, which tells nothing of spread.
    """

    count: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A mean of differences within pairs.

    Attributes:
        p_value: two-sided, of a mean at least this far from 0 if there were no difference; None of
            one pair.
    """

    p_value: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean, deviation and interval of independent values.

    Raises:
        ValueError: if there are none.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("needs one value at least")
    mean = float(np.mean(values))
    if values.size == 1:
        return Estimate(1, mean, None, None, None)
    deviation = float(np.std(values, ddof=1))
    half = _t_quantile(values.size) * deviation / math.sqrt(values.size)
    return Estimate(values.size, mean, deviation, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns ``values`` minus ``baseline``, pair by pair, with the p-value of the paired t-test.

    Differences that are all the same leave no doubt: p is 0, or 1 if they are 0.

    Raises:
        ValueError: if there are no pairs, or a value has no partner.
    """
    differences = np.subtract(*_same_length(values, baseline))
    found = estimate(differences)
    if found.deviation is None:
        p_value = None
    elif np.ptp(differences) == 0:
        p_value = 0.0 if differences[0] else 1.0
    else:
        t = found.mean / (found.deviation / math.sqrt(found.count))
        p_value = float(2 * special.stdtr(found.count - 1, -abs(t)))
    return Difference(**dataclasses.asdict(found), p_value=p_value)


def difference_by_image(
    correct: Sequence[Sequence[bool]], baseline: Sequence[Sequence[bool]], views: int = 1
) -> Difference:
    """Returns the difference in accuracy between some runs and others on the same images.

    It says what to expect of other images with these very runs; what other seeds would do is the
    matter of ``paired_difference`` over seeds.

    Args:
        correct: (runs, N) whether a run was right on example i.
        baseline: the same of the runs to compare with, (other runs, N).
        views: consecutive examples that show the same image, N = views · images. They are no
            independent evidence, so each image counts once, by the mean over its views.

    Raises:
        ValueError: if the examples are not the same number, or not whole images.
    """
    ours, theirs = _same_length(*(np.mean(each, axis=0) for each in (correct, baseline)))
    if ours.size % views:
        raise ValueError(f"{ours.size} examples are not images of {views} views each")
    by_image = [np.mean(each.reshape(-1, views), axis=1) for each in (ours, theirs)]
    return paired_difference(*by_image)


def _same_length(
    values: Sequence[float], baseline: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise ValueError(
            f"pairs need as many values on both sides, not {values.size} and {baseline.size}"
        )
    return values, baseline


def _t_quantile(count: int) -> float:
    return float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))
