"""Order, sharding, seeking and batching: the same for every source.

Order is a function of (seed, epoch) and position a function of the step, so a run resumes by
seeking. Augmentation is keyed by (seed, position), so it neither depends on the number of workers
nor needs any state. A global batch is a run of consecutive positions, of which each shard takes
its part: what a batch holds does not depend on the number of shards either.
"""

import dataclasses
from collections.abc import Callable, Mapping

import tensorflow as tf

Tensors = dict[str, tf.Tensor]

# What a seed is folded with, so that no two uses of it draw alike.
_AUGMENTATION, _ORDER = 0, 2


@dataclasses.dataclass(frozen=True)
class Split:
    """Some examples of a source, each reachable by its index.

    Attributes:
        num_examples: how many.
        read: an index, a scalar int64, to {"image": (H, W, 3) uint8, "label": int64}.
    """

    num_examples: int
    read: Callable[[tf.Tensor], Tensors]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of a data set.

    Attributes:
        name: of the data set.
        num_classes: of its labels.
        splits: by name.
        augment: image (H, W, 3) uint8 and seed (2,) int32 to image; in training only.
    """

    name: str
    num_classes: int
    splits: Mapping[str, Split]
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

    def num_examples(self, split: str) -> int:
        """Returns how many examples ``split`` has.

        Raises:
            ValueError: if there is no such split.
        """
        return self._split(split).num_examples

    def train_batches(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        shard: int = 0,
        num_shards: int = 1,
    ) -> tf.data.Dataset:
        """Returns batches without end: one epoch behind the other, each in an order of its own.

        Args:
            split: to read.
            batch_size: examples in a batch of this shard.
            seed: of order and augmentation.
            start: steps to skip, at no cost.
            shard: which part of each global batch, from 0.
            num_shards: parts of a global batch.

        Returns:
            Dataset of {"image": (batch_size, H, W, 3) uint8, "label": (batch_size,) int64}.
        """
        source = self._split(split)

        def example(position: tf.Tensor, index: tf.Tensor) -> Tensors:
            record = source.read(index)
            key = tf.random.experimental.stateless_fold_in([seed, _AUGMENTATION], position)
            return {"image": self.augment(record["image"], key), "label": record["label"]}

        return (
            _positions(source.num_examples, seed, start * batch_size * num_shards)
            .batch(batch_size, drop_remainder=True)
            .shard(num_shards, shard)
            .unbatch()
            .map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .batch(batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def eval_batches(self, split: str, *, batch_size: int) -> tf.data.Dataset:
        """Returns each example once, in order; the last batch is filled up with index -1.

        Returns:
            Dataset of {"image": (batch_size, H, W, 3) uint8, "label": (batch_size,) int64,
            "index": (batch_size,) int64}.
        """
        source = self._split(split)
        padded = -(-source.num_examples // batch_size) * batch_size

        def example(count: tf.Tensor) -> Tensors:
            record = source.read(tf.minimum(count, source.num_examples - 1))
            index = tf.where(count < source.num_examples, count, -1)
            return {"image": record["image"], "label": record["label"], "index": index}

        return (
            tf.data.Dataset.range(padded)
            .map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .batch(batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def _split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(
                f"{self.name} has no split {name!r}; it has {', '.join(sorted(self.splits))}"
            )
        return self.splits[name]


def _positions(num_examples: int, seed: int, start: int) -> tf.data.Dataset:
    """Returns (position, index) from position ``start`` on, without end.

    Each epoch is shuffled as a whole. (``tf.random.experimental.index_shuffle`` would do without
    the array, but its permutations are far from uniform.)
    """
    first, skipped = divmod(start, num_examples)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        key = tf.random.experimental.stateless_fold_in([seed, _ORDER], number)
        order = tf.random.experimental.stateless_shuffle(tf.range(num_examples, dtype="int64"), key)
        places = tf.range(num_examples, dtype="int64") + number * num_examples
        left = tf.where(number == first, tf.constant(skipped, tf.int64), 0)
        return tf.data.Dataset.from_tensor_slices((places[left:], order[left:]))

    return tf.data.Dataset.range(first, tf.int64.max).flat_map(epoch)
