"""Which example comes when: a pure function of seed, epoch and step.

Training. An epoch puts the parts of a split (its files, or its single examples) into an order of
its own and cuts this sequence into lanes of equal length; each batch takes the same number of
examples from each lane. So a host that needs some places of the batch opens the files of their
lanes only, and what a batch holds does not depend on the number of hosts. A lane reads several
places of its stretch in turn, and shuffles blocks of records, so that neighbours in a file do not
stay neighbours. A step is found by arithmetic: of what came before it in its epoch, only the head
of one file per stream is read, and nothing is decoded. What does not fill a batch at the end of an
epoch is left out: other examples each time, since the order differs.

(Of single examples the whole epoch is shuffled at once. ``tf.random.experimental.index_shuffle``
would do without the array, but its permutations are far from uniform.)
"""

import dataclasses
import functools

import tensorflow as tf

from data.source import Split

_ORDER = 2  # what a seed is folded with, so that no two uses of it draw alike
_LANES, _STREAMS = 8, 8  # at most, of a batch and of a lane
_SHUFFLED_RECORDS = 2048  # held in memory, over all streams

_fold = tf.random.experimental.stateless_fold_in


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of training on a split.

    Attributes:
        split: to read.
        batch_size: examples in a step, over all hosts.
        seed: of the order.
    """

    split: Split
    batch_size: int
    seed: int

    @property
    def passes(self) -> int:
        """Passes over the split in an epoch: 1, or as many as a batch needs."""
        return -(-self.batch_size // self.split.num_examples)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.passes * self.split.num_examples // self.batch_size

    @property
    def lanes(self) -> int:
        """Into how many equal runs of places a batch is divided."""
        if not self.split.sequential:
            return 1
        parts = len(self.split.lengths)
        fits = (n for n in range(1, _LANES + 1) if self.batch_size % n == 0 and n <= parts)
        return max(fits)

    @property
    def streams(self) -> int:
        """How many places a lane reads from in turn."""
        if not self.split.sequential:
            return 1
        return min(_STREAMS, len(self.split.lengths) // self.lanes)

    def passed_over(self, step: int) -> int:
        """Returns how many records, at most, are read for nothing to begin at ``step``."""
        if not self.split.sequential or not step % self.steps:
            return 0
        return int(self.split.lengths.max()) * self.lanes * self.streams

    def batches(self, start: int, shard: int, num_shards: int) -> tf.data.Dataset:
        """Returns one shard of each batch from step ``start`` on, without end.

        Returns:
            Dataset of (payload, index), each (batch_size / num_shards,).
        """
        width = self.batch_size // self.lanes
        first, behind = (self.batch_size * s // num_shards for s in (shard, shard + 1))
        first_lane, behind_lane = first // width, -(-behind // width)
        read = behind_lane - first_lane
        own = slice(first - first_lane * width, behind - first_lane * width)
        return (
            tf.data.Dataset.range(first_lane, behind_lane)
            .interleave(
                functools.partial(self._lane, start),
                cycle_length=read,
                block_length=width,
                num_parallel_calls=read,
                deterministic=True,
            )
            .batch(read * width, drop_remainder=True)
            .map(lambda *columns: tuple(column[own] for column in columns))
        )

    def _lane(self, start: int, lane: tf.Tensor) -> tf.data.Dataset:
        first_epoch, step = divmod(start, self.steps)
        width = self.batch_size // self.lanes

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            read = tf.where(number == first_epoch, tf.constant(step * width, tf.int64), 0)
            return self._stretch(number, lane * self.steps * width, self.steps * width, read)

        return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch)

    def _stretch(
        self, epoch: tf.Tensor, first: tf.Tensor, length: int, read: tf.Tensor
    ) -> tf.data.Dataset:
        """Returns ``length`` examples of an epoch from ``first`` on, without the first ``read``."""
        parts, key = self._parts(epoch)
        turns = tf.range(self.streams, dtype=tf.int64)
        lengths = (length - turns + self.streams - 1) // self.streams
        firsts = first + tf.cumsum(lengths, exclusive=True)
        done = (read - turns + self.streams - 1) // self.streams

        def stream(place: tf.Tensor) -> tf.data.Dataset:
            turn = (read + place) % self.streams
            return self._stream(parts, key, firsts[turn], lengths[turn], done[turn])

        if self.streams == 1:
            return stream(tf.constant(0, tf.int64))
        return tf.data.Dataset.range(self.streams).interleave(stream, cycle_length=self.streams)

    def _stream(
        self, parts: tf.Tensor, key: tf.Tensor, first: tf.Tensor, length: tf.Tensor, done: tf.Tensor
    ) -> tf.data.Dataset:
        """Returns ``length`` examples from ``first`` on without the first ``done``, shuffled."""
        behind = first + length
        if not self.split.sequential:
            return self.split.read(_segments(self.split, parts, first + done, behind))
        block = _SHUFFLED_RECORDS // (self.lanes * self.streams)
        begin = first + done // block * block

        def shuffle(number: tf.Tensor, columns: tuple[tf.Tensor, ...]) -> tf.data.Dataset:
            places = tf.range(tf.size(columns[0]))
            shuffled = tf.random.experimental.stateless_shuffle(
                places, _fold(key, begin + number * block)
            )
            return tf.data.Dataset.from_tensor_slices(
                tuple(tf.gather(column, shuffled) for column in columns)
            )

        records = self.split.read(_segments(self.split, parts, begin, behind))
        return records.batch(block).enumerate().flat_map(shuffle).skip(done % block)

    def _parts(self, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the parts in their order in an epoch, and the epoch's key."""
        parts = tf.range(len(self.split.lengths), dtype=tf.int64)
        keys = [
            _fold([self.seed, _ORDER], epoch * self.passes + number)
            for number in range(self.passes)
        ]
        shuffled = [tf.random.experimental.stateless_shuffle(parts, key) for key in keys]
        return tf.concat(shuffled, axis=0), keys[0]


def in_order(split: Split, shard: int, num_shards: int, batch_size: int) -> tf.data.Dataset:
    """Returns a shard's examples, each once, filled up to whole batches with index -1.

    All shards have the same number of batches.

    Returns:
        Dataset of (payload, index), each (batch_size,).
    """
    share = -(-split.num_examples // (batch_size * num_shards)) * batch_size
    first, behind = (min(s * share, split.num_examples) for s in (shard, shard + 1))
    parts = tf.range(len(split.lengths), dtype=tf.int64)
    streams = _STREAMS if split.sequential else 1
    cuts = tf.constant([first + (behind - first) * s // streams for s in range(streams + 1)])

    def stream(number: tf.Tensor) -> tf.data.Dataset:
        return split.read(_segments(split, parts, cuts[number], cuts[number + 1]))

    examples = tf.data.Dataset.range(streams).interleave(
        stream, cycle_length=streams, num_parallel_calls=streams, deterministic=True
    )
    one = split.read(_segments(split, parts, 0, 1))
    filling = one.repeat(share - (behind - first)).map(
        lambda payload, index: (payload, tf.constant(-1, tf.int64))
    )
    return examples.concatenate(filling).batch(batch_size, drop_remainder=True)


def _segments(
    split: Split, parts: tf.Tensor, first: tf.Tensor, behind: tf.Tensor
) -> tf.data.Dataset:
    """Returns what to read for the examples from ``first`` to ``behind``, not included.

    Args:
        split: to read.
        parts: in the order in which their examples are counted.
        first, behind: places in this order.

    Returns:
        Dataset of (part, first example in it, count).
    """
    lengths = tf.gather(tf.constant(split.lengths), parts)
    ends = tf.cumsum(lengths)
    starts = ends - lengths
    skips = tf.maximum(tf.cast(first, tf.int64) - starts, 0)
    counts = tf.minimum(ends, tf.cast(behind, tf.int64)) - starts - skips
    return tf.data.Dataset.from_tensor_slices(
        tuple(tf.boolean_mask(column, counts > 0) for column in (parts, skips, counts))
    )
