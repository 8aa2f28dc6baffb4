"""Where a run computes, and in which precision.

TPUs and several GPUs follow TensorFlow's guide to distributed training; neither has been run here.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from condconv.engine.errors import RunError, UsageError


def strategy(devices: str, tpu: str | None = None) -> tf.distribute.Strategy:
    """Returns the strategy for ``Experiment.devices``: "auto" or "cpu:N".

    "auto" takes several workers if TF_CONFIG names them, and mirrors the network over all local
    GPUs if there are several. "cpu:N" mirrors it over N parts of the CPU, which shows on any
    machine what several devices would compute.

    Args:
        devices: what the config asks for.
        tpu: "local", an address such as "grpc://10.0.0.2:8470", or the name of a TPU; instead.

    Raises:
        UsageError: for any other text; for a TF_CONFIG or a TPU that cannot be used; or once
            TensorFlow has divided the CPU otherwise.
    """
    if tpu is not None:
        return _tpu_strategy(tpu)
    several_workers = len(_workers()) > 1
    if devices == "auto":
        if several_workers:
            return tf.distribute.MultiWorkerMirroredStrategy()
        several = len(tf.config.list_physical_devices("GPU")) > 1
        return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
    kind, _, count = devices.partition(":")
    if kind != "cpu" or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"Experiment.devices takes 'auto' or 'cpu:N', not {devices!r}")
    if several_workers:
        raise UsageError(
            f"Experiment.devices={devices!r} is for one process, and TF_CONFIG names several "
            "workers: take 'auto', or unset TF_CONFIG"
        )
    if int(count) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(_logical_cpus(int(count)))


def workers(strategy: tf.distribute.Strategy) -> int:
    """Returns how many processes compute together."""
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return len(_workers()) if several else 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process is the one of its workers that writes and tells."""
    if workers(strategy) == 1:
        return True
    resolver = strategy.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)


def _workers() -> list[str]:
    """Returns the addresses of all workers that TF_CONFIG names; none without it.

    Raises:
        UsageError: if it is not what TensorFlow's guide says.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return []
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config.get("task", {})
        addresses = [a for job in ("chief", "worker") for a in cluster.get(job, ())]
        if len(addresses) > 1:
            cluster[task["type"]][int(task["index"])]  # this one is among them
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UsageError(
            'TF_CONFIG takes {"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", '
            f'"index": 0}}}}, not {text!r}'
        ) from None
    return addresses


def _tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    if not tpu:
        raise UsageError("--tpu takes 'local', an address grpc://… or the name of a TPU")
    if tpu != "local" and "://" not in tpu:
        _wait_for(tpu)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        first, *_ = str(error).strip().split("\n")
        raise UsageError(f"--tpu={tpu} cannot be used: {first}") from error
    return tf.distribute.TPUStrategy(resolver)


def _wait_for(tpu: str) -> None:
    """Waits until a named TPU is healthy."""
    try:
        import cloud_tpu_client
    except ImportError as error:
        raise UsageError(
            f"--tpu={tpu} is a name, which takes cloud-tpu-client: install the extra 'tpu', or "
            "give 'local' or an address grpc://…"
        ) from error
    try:
        cloud_tpu_client.Client(tpu).wait_for_healthy()
    except Exception as error:  # of the network, of Google's libraries, of the TPU
        first, *_ = str(error).strip().split("\n")
        raise UsageError(f"--tpu={tpu} is not healthy or not there: {first}") from error


def agreed(strategy: tf.distribute.Strategy, value: int, what: str) -> int:
    """Returns ``value`` if all workers have the same.

    Raises:
        RunError: if not; ``what`` says what differs.
    """
    if workers(strategy) == 1:
        return value

    def everybodys(own: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.all_gather(own[None], axis=0)

    found = strategy.run(tf.function(everybodys), args=(tf.constant(value, tf.int64),))
    values = set(strategy.experimental_local_results(found)[0].numpy().tolist())
    if len(values) > 1:
        raise RunError(f"the workers differ in {what}: {sorted(values)}; give all the same workdir")
    return value


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
