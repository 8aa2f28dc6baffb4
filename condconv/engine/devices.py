"""Where a run computes, and in which precision."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from condconv.engine.errors import UsageError


def strategy(devices: str) -> tf.distribute.Strategy:
    """Returns the strategy for ``Experiment.devices``: "auto" or "cpu:N".

    "auto" mirrors the network over all local GPUs if there are several. "cpu:N" mirrors it over
    N parts of the CPU, which shows on any machine what several devices would compute.

    Raises:
        UsageError: for any other text, or once TensorFlow has divided the CPU otherwise.
    """
    if devices == "auto":
        several = len(tf.config.list_physical_devices("GPU")) > 1
        return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
    kind, _, count = devices.partition(":")
    if kind != "cpu" or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"Experiment.devices takes 'auto' or 'cpu:N', not {devices!r}")
    if int(count) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(_logical_cpus(int(count)))


def _logical_cpus(count: int) -> list[str]:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError(
                f"Experiment.devices='cpu:{count}' has to be set before TensorFlow starts: "
                f"only {len(tf.config.list_logical_devices('CPU'))} are there"
            ) from None
    return [f"CPU:{index}" for index in range(count)]


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Builds layers under a Keras dtype policy."""
    outer = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(outer)
