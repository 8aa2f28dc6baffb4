"""Runs on TensorFlow, by ``tf.distribute``: the only TensorFlow in the engine."""

from condconv.engine.backends.tensorflow.run import build
from condconv.engine.backends.tensorflow.strategy import connect

__all__ = ["build", "connect"]
