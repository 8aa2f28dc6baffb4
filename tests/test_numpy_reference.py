"""The gradients that the layers are compared with are those of differences."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy_reference as reference
import pytest
from layer_cases import Array, numbers, to_numpy


@pytest.mark.parametrize("layer", ["conv2d", "depthwise_conv2d", "dense"])
def test_reference_gradients_equal_differences(layer: str):
    forward = getattr(reference, layer)
    if layer == "dense":
        shapes, geometry = [(2, 3, 4), (2, 3), (3, 4, 5), (3, 5)], ()
    else:
        last = (2, 5) if layer == "conv2d" else (2, 2)
        shapes = [(2, 5, 4, 2), (2, 3), (3, 3, 2, *last), (3, 5 if layer == "conv2d" else 4)]
        geometry = ((2, 1), "same", (1, 2))
    arguments = [to_numpy(numbers(*shape, seed=i)) for i, shape in enumerate(shapes)]
    gradient = to_numpy(numbers(*forward(*arguments, *geometry).shape, seed=9))
    check_by_differences(
        lambda *values: forward(*values, *geometry),
        arguments,
        getattr(reference, f"{layer}_backward")(*arguments, *geometry, gradient),
        gradient,
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 5)], ids=str)
def test_reference_routing_gradients_equal_differences(shape: tuple[int, ...], activation: str):
    arguments = [to_numpy(numbers(*s, seed=i)) for i, s in enumerate((shape, (5, 3), (3,)))]
    gradient = to_numpy(numbers(2, 3, seed=9))
    check_by_differences(
        lambda *values: reference.routing(*values, activation),
        arguments,
        reference.routing_backward(*arguments, activation, gradient),
        gradient,
    )


def check_by_differences(
    forward: Callable[..., Array],
    arguments: list[Array],
    gradients: Sequence[Array],
    gradient: Array,
) -> None:
    """Compares gradients along one random direction for each argument."""
    step = 1e-5
    for i, claimed in enumerate(gradients):
        direction = to_numpy(numbers(*arguments[i].shape, seed=20 + i))
        ends = []
        for sign in (1, -1):
            moved = [*arguments[:i], arguments[i] + sign * step * direction, *arguments[i + 1 :]]
            ends.append(np.sum(forward(*moved) * gradient))
        assert np.sum(claimed * direction) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7
        )
