"""Where a run computes: TensorFlow's distribution strategies.

TPUs and several GPUs follow TensorFlow's guide to distributed training; neither has been run here.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from condconv.engine.backends import Evaluator
from condconv.engine.backends.tensorflow import evaluator
from condconv.engine.errors import RunError, UsageError, in_one_line
from condconv.engine.tasks import Batch, Data, Task


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a strategy; see ``backends.Devices``."""

    strategy: tf.distribute.Strategy

    failures = (tf.errors.OpError,)

    @property
    def replicas(self) -> int:
        """How many parts each batch is divided into."""
        return self.strategy.num_replicas_in_sync

    @property
    def workers(self) -> int:
        """How many processes compute together."""
        several = isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy)
        return len(_workers()) if several else 1

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one of its workers that writes and tells."""
        if self.workers == 1:
            return True
        resolver = self.strategy.cluster_resolver
        has_chief = "chief" in resolver.cluster_spec().jobs
        return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)

    @property
    def names(self) -> list[str]:
        """Of the devices, for people."""
        return [device.name for device in tf.config.list_logical_devices()]

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which networks for these devices are built."""
        return self.strategy.scope()

    def agreed(self, value: int, what: str) -> int:
        """Returns ``value`` if all workers have the same; else raises a RunError."""
        if self.workers == 1:
            return value

        def everybodys(own: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_gather(own[None], axis=0)

        found = self.strategy.run(tf.function(everybodys), args=(tf.constant(value, tf.int64),))
        values = set(self.strategy.experimental_local_results(found)[0].numpy().tolist())
        if len(values) > 1:
            raise RunError(
                f"the workers differ in {what}: {sorted(values)}; give all the same workdir"
            )
        return value

    def evaluator(self, model: keras.Model, task: Task, data: Data, batch_size: int) -> Evaluator:
        """Returns what judges a model on splits of some data."""

        def batches(split: str) -> Any:
            return self.distribute(batch_size, functools.partial(_shard, data, split))

        return evaluator.build(self.strategy, model, task, batches)

    def distribute(
        self, batch_size: int, batches: Callable[[int, int, int], Iterable[Batch]]
    ) -> Any:
        """Returns batches divided among the replicas.

        Args:
            batch_size: of all replicas together.
            batches: batch size of a worker, its number and how many there are, to its batches.
        """

        def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            # A global batch is split by worker first, then by replica of the worker.
            workers = context.num_input_pipelines
            whole = _dataset(batches(batch_size // workers, context.input_pipeline_id, workers))
            if context.num_replicas_in_sync == workers:
                return whole
            return whole.rebatch(batch_size // context.num_replicas_in_sync, drop_remainder=True)

        return self.strategy.distribute_datasets_from_function(of_worker)


def _shard(data: Data, split: str, batch_size: int, shard: int, num_shards: int) -> Iterable[Batch]:
    return data.eval_batches(split, batch_size=batch_size, shard=shard, num_shards=num_shards)


def _dataset(batches: Iterable[Batch]) -> tf.data.Dataset:
    """Returns batches as a dataset; of arrays, all have to be as large as the first."""
    if isinstance(batches, tf.data.Dataset):
        return batches
    first, rest = itertools.tee(iter(batches))
    like = {name: np.asarray(column) for name, column in next(first).items()}
    signature = {name: tf.TensorSpec(a.shape, a.dtype) for name, a in like.items()}
    return tf.data.Dataset.from_generator(lambda: rest, output_signature=signature)


def connect(devices: str, tpu: str | None = None) -> Devices:
    """Returns the devices for ``Experiment.devices``: "auto" or "cpu:N".

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
        return Devices(_tpu_strategy(tpu))
    return Devices(_strategy(devices))


def _strategy(devices: str) -> tf.distribute.Strategy:
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
    with in_one_line(UsageError, f"--tpu={tpu} cannot be used"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu)
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
    with in_one_line(UsageError, f"--tpu={tpu} is not healthy or not there"):
        cloud_tpu_client.Client(tpu).wait_for_healthy()


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
