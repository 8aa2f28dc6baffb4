"""Runs on TensorFlow, by ``tf.distribute``: the only TensorFlow in the engine."""

from condconv.engine.backends.tensorflow.run import build
from condconv.engine.backends.tensorflow.strategy import connect
from condconv.engine.backends.tensorflow.updates import prepare

__all__ = ["build", "connect", "prepare"]
