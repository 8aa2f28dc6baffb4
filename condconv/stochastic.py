"""Layers that draw random numbers in training, in a way that a resumed run can repeat.

Inside :func:`seed_scope` every draw is a function of the scope's seed and the layer's name. The
training step opens a scope with a seed made of (seed, step, replica): no state to save, and no
mask shared by two replicas. Outside a scope, as in a user's own ``fit``, a layer draws from a
Keras ``SeedGenerator`` as Keras' own layers do.
"""

import contextlib
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

Tensor = Any

_scope = threading.local()  # MirroredStrategy traces its replicas in threads of their own


@contextlib.contextmanager
def seed_scope(seed: Tensor) -> Iterator[None]:
    """Makes the layers of this module draw from ``seed``, an integer tensor of shape (2,)."""
    outer = getattr(_scope, "seed", None)
    _scope.seed = seed
    try:
        yield
    finally:
        _scope.seed = outer


class _FixedSeed(keras.random.SeedGenerator):
    """Hands one given seed to ``keras.random``, which takes no tensor as a seed."""

    def __init__(self, seed: Tensor):
        self._seed = seed

    def next(self, ordered: bool = True) -> Tensor:
        return self._seed


class _Stochastic(keras.layers.Layer):
    """A layer that multiplies by a random mask in training."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator()

    def _seed(self) -> keras.random.SeedGenerator:
        seed = getattr(_scope, "seed", None)
        if seed is None:
            return self.seed_generator
        own = zlib.crc32(self.name.encode()) & 0x7FFFFFFF
        seed = ops.cast(seed, "uint32")
        return _FixedSeed(ops.stack([seed[0], seed[1] ^ ops.cast(own, "uint32")]))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns ``input_shape``."""
        return input_shape


@keras.saving.register_keras_serializable(package="condconv")
class Dropout(_Stochastic):
    """Sets a share ``rate`` of the inputs to zero in training and scales up the rest."""

    def __init__(self, rate: float, **kwargs: Any):
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout takes a rate of at least 0 and below 1. Received: {rate}")
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Drops elements of ``inputs`` (any shape) if ``training``."""
        if not training or not self.rate:
            return inputs
        return keras.random.dropout(inputs, self.rate, seed=self._seed())

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(package="condconv")
class StochasticDepth(_Stochastic):
    """Drops a whole residual branch for an example in training, and scales up the survivors.

    Args:
        survival: the probability with which a branch is kept (Huang et al., arXiv:1603.09382).
    """

    def __init__(self, survival: float, **kwargs: Any):
        if not 0 < survival <= 1:
            raise ValueError(
                f"StochasticDepth takes a survival above 0 and at most 1. Received: {survival}"
            )
        super().__init__(**kwargs)
        self.survival = survival

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Drops examples of ``inputs`` (B, …) if ``training``."""
        if not training or self.survival == 1:
            return inputs
        one_an_example = (ops.shape(inputs)[0], *(1,) * (len(inputs.shape) - 1))
        return keras.random.dropout(
            inputs, 1 - self.survival, noise_shape=one_an_example, seed=self._seed()
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "survival": self.survival}
