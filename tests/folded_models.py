"""Models to fold, and how far two models are apart."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from condconv import CondConv2D
from condconv.normalization import BatchNormalization

Array = np.ndarray


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).normal(0.2, 1.0, shape).astype("float32")


def pixels(batch: int) -> Array:
    """Smooth images, which a network that shrinks them to a few positions can tell apart."""
    coarse = np.random.default_rng(0).integers(0, 256, (batch, 4, 4, 3), np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


def disturb(model: keras.Model) -> keras.Model:
    """Gives batch normalisations and biases weights unlike those that they start with."""
    random = np.random.default_rng(0)
    for variable in model.variables:
        old = ops.convert_to_numpy(variable).astype("float64")
        if variable.path.endswith(("/gamma", "/moving_variance")):
            variable.assign(random.uniform(0.5, 1.5, old.shape))
        elif variable.path.endswith(("/beta", "/bias", "/moving_mean")):
            variable.assign(old + random.normal(0.0, 0.3, old.shape))
    return model


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def outputs(model: keras.Model, *inputs: Array) -> list[Array]:
    results = keras.tree.flatten(model(inputs[0] if len(inputs) == 1 else list(inputs)))
    return [ops.convert_to_numpy(result).astype("float64") for result in results]


def difference(folded: keras.Model, model: keras.Model, *inputs: Array) -> float:
    """The largest difference in any output, in parts of the largest number."""
    pairs = list(zip(outputs(folded, *inputs), outputs(model, *inputs), strict=True))
    assert all(np.isfinite(a).all() and a.std() > 1e-3 * np.abs(a).max() for a, _ in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def left(model: keras.Model) -> list[str]:
    """The names of all batch normalisations, those of models in the model too."""
    norms = keras.layers.BatchNormalization
    return [layer.name for layer in model._flatten_layers() if isinstance(layer, norms)]


def functional(stack: Callable[[Any], Any], shape: tuple = (9, 8, 4)) -> keras.Model:
    inputs = keras.Input(shape)
    return disturb(keras.Model(inputs, stack(inputs)))


def chain(*stack: keras.Layer) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        for layer in stack:
            x = layer(x)
        return x

    return apply


def block(name: str) -> keras.Sequential:
    parts = [CondConv2D(4, 3, 2, padding="same", name="conv"), BatchNormalization(name="bn")]
    return keras.Sequential([keras.Input((9, 8, 4)), *parts, layers.ReLU(name="relu")], name=name)
