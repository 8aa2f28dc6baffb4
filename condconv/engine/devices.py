"""Where a run computes, and in which precision."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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


def distribute(
    strategy: tf.distribute.Strategy,
    batch_size: int,
    batches: Callable[[int, int, int], tf.data.Dataset],
) -> Any:
    """Returns batches divided among the replicas.

    Args:
        strategy: that has them.
        batch_size: of all replicas together.
        batches: batch size of a worker, its number and how many there are, to its batches.
    """

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # A global batch is split by worker first, then by replica of the worker.
        workers = context.num_input_pipelines
        whole = batches(batch_size // workers, context.input_pipeline_id, workers)
        if context.num_replicas_in_sync == workers:
            return whole
        return whole.rebatch(batch_size // context.num_replicas_in_sync, drop_remainder=True)

    return strategy.distribute_datasets_from_function(of_worker)


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Builds layers under a Keras dtype policy."""
    outer = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(outer)
