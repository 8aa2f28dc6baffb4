"""Evaluation on any number of replicas: outputs are gathered, and judged on the host."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from condconv.engine.backends import Evaluator
from condconv.engine.tasks import Columns, Task

Tensors = dict[str, tf.Tensor]


def build(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    task: Task,
    batches: Callable[[str], Any],
) -> Evaluator:
    """Returns what judges a model on splits; its step is compiled once.

    Args:
        strategy: whose replicas compute.
        model: to judge.
        task: that judges.
        batches: a split to its distributed batches.
    """
    yes_or_no = set()  # names of columns, known once the step has been traced

    def outputs(batch: Tensors) -> tuple[Any, Tensors]:
        yes_or_no.update(name for name, column in batch.items() if column.dtype == tf.bool)
        found = model(batch["image"], training=False)
        found = tf.nest.map_structure(lambda x: tf.cast(x, tf.float32), found)
        return found, {name: _number(column) for name, column in batch.items() if name != "image"}

    @tf.function
    def gathered(batch: Any) -> Any:
        parts = strategy.run(outputs, args=(batch,))
        return tf.nest.map_structure(lambda part: strategy.gather(part, axis=0), parts)

    def judge(split: str) -> Iterator[Columns]:
        for batch in batches(split):
            found, rest = tf.nest.map_structure(np.asarray, gathered(batch))
            rest = {n: a.astype(bool) if n in yes_or_no else a for n, a in rest.items()}
            yield task.judge(found, rest) | {"index": rest["index"]}

    return judge


def _number(column: tf.Tensor) -> tf.Tensor:
    """Returns a column that workers can exchange, which are numbers only."""
    return tf.cast(column, tf.int32) if column.dtype == tf.bool else column
