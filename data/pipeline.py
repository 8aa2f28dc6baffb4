"""From a source to batches: the same for every data set, in training and in evaluation.

Which example comes when is decided in ``data.order``. What happens to it depends on the seed and
its position, counted over the whole run, and on nothing else: not on the number of hosts or
workers, nor on the step at which the run began.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence

import gin
import tensorflow as tf

from data.arguments import check
from data.broken import Broken
from data.order import Order, in_order
from data.preprocess import Preprocessing
from data.source import Source, Split
from data.stand_in import instead_of

Tensors = dict[str, tf.Tensor]
Mixing = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

# Batches that wait for the network. tf.data's own choice, with two made at a time, was at most a
# tenth faster on two cores, at small batches, and held a dozen of them.
_AHEAD = 2

_AUGMENTATION = 0  # what a seed is folded with, so that no two uses of it draw alike

# Nothing here needs to be rewritten by autograph, which would bury what a bad argument raises.
_as_written = tf.autograph.experimental.do_not_convert

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What images are: shape (height, width, channels), None for what may be any, and dtype."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of a data set. What takes a split raises a ValueError if there is no such split.

    Attributes:
        source: of the examples.
        preprocessing: of their images.
        mixing: images (B, H, W, 3), labels (B, num_classes) float32 and a seed for each example
            (B, 2), to images and labels mixed; in training only.
        max_broken: images that training may skip, each replaced by another of its batch.
        broken_are_wrong: whether evaluation counts a broken image as wrong, instead of stopping.
    """

    source: Source
    preprocessing: Preprocessing
    mixing: Mixing | None = None
    max_broken: int = 0
    broken_are_wrong: bool = False

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.source.name

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.source.num_classes

    @property
    def answers(self) -> list[int] | None:
        """The classes that evaluation chooses from; None for all."""
        return None if self.source.answers is None else list(self.source.answers)

    @property
    def class_names(self) -> Sequence[str]:
        """Of all classes, or none."""
        return self.source.class_names

    def num_examples(self, split: str) -> int:
        """Returns how many examples ``split`` has."""
        return self._split(split).num_examples

    def image_spec(self, split: str) -> ImageSpec:
        """Returns what the images of ``split`` are, as evaluation sees them."""
        spec = self.eval_batches(split, batch_size=1).element_spec["image"]
        return ImageSpec(tuple(spec.shape[1:]), spec.dtype.name)

    def views_per_image(self, split: str) -> int:
        """Returns how many examples of ``split`` in a row show the same image; see ``Split``."""
        return self._split(split).views_per_image

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
            start: steps to skip; nothing of them is decoded.
            shard: which part of each global batch, from 0.
            num_shards: parts of a global batch.

        Returns:
            Dataset of {"image": (batch_size, H, W, 3) uint8 or float32, "label": (batch_size,)
            int64, or (batch_size, num_classes) float32 where they are mixed}.
        """
        records = self._split(split)
        order = Order(records, batch_size * num_shards, seed)
        if read := order.passed_over(start):
            epoch, step = divmod(start, order.steps)
            going_on = "%s: going on at step %d of %d in epoch %d, behind at most %d records"
            _LOG.warning(going_on, self.name, step, order.steps, epoch, read)
        broken = Broken(self.name, self.max_broken, "raise pipeline.max_broken")
        own, _ = tf.unstack(tf.random.experimental.stateless_fold_in([seed, _AUGMENTATION], 0))
        own = tf.cast(own, tf.int64)

        def example(payload: tf.Tensor, index: tf.Tensor, position: tf.Tensor) -> Tensors:
            record = records.parse(payload)
            key = tf.stack([own, position])
            image = self.preprocessing.train(record["image"], key)
            return {"image": image, "label": record["label"], "key": key}

        def instead(columns: tuple[tf.Tensor, ...], whole: tf.data.Dataset) -> tf.data.Dataset:
            found = broken.find(records.parse, example, columns)
            some = tf.debugging.Assert(
                ~tf.reduce_all(found), [f"{self.name}: every image of a batch is broken"]
            )
            with tf.control_dependencies([some]):
                return whole.repeat()

        def batch(step: tf.Tensor, columns: tuple[tf.Tensor, ...]) -> tf.data.Dataset:
            first = (step * num_shards + shard) * batch_size
            positions = first + tf.range(batch_size, dtype=tf.int64)
            return _batch((*columns, positions), example, instead)

        batches = order.batches(start, shard, num_shards).enumerate(start)
        return batches.flat_map(_as_written(batch)).map(_as_written(self._mixed)).prefetch(_AHEAD)

    def untouched(
        self, split: str, *, batch_size: int, seed: int, start: int = 0
    ) -> tf.data.Dataset:
        """Returns the same images as ``train_batches``, as evaluation would see them.

        Returns:
            Dataset of {"image", "label"}, one element for each image.
        """
        records = self._split(split)

        examples = Order(records, batch_size, seed).batches(start, 0, 1).unbatch()
        return examples.map(lambda payload, index: self._evaluated(records.parse(payload)))

    def eval_batches(
        self, split: str, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> tf.data.Dataset:
        """Returns each example once over all shards; filled up with index -1 to equal lengths.

        Args:
            split: to read.
            batch_size: examples in a batch of this shard.
            shard: which part of the split, from 0.
            num_shards: parts of the split.

        Returns:
            Dataset of {"image": (batch_size, H, W, 3) uint8 or float32, "label": (batch_size,)
            int64, or (batch_size, num_classes) bool where several are right, "index":
            (batch_size,) int64, "readable": (batch_size,) bool}. What is not readable is black.
        """
        records = self._split(split)
        limit = records.num_examples if self.broken_are_wrong else 0
        broken = Broken(self.name, limit, "set pipeline.broken_are_wrong = True")

        def example(payload: tf.Tensor, index: tf.Tensor) -> Tensors:
            return self._evaluated(records.parse(payload)) | {"index": index, "readable": True}

        def instead(columns: tuple[tf.Tensor, ...], whole: tf.data.Dataset) -> tf.data.Dataset:
            def blank(payload: tf.Tensor, index: tf.Tensor) -> Tensors:
                image, label = whole.element_spec["image"], records.parse(payload)["label"]
                black = tf.zeros(image.shape, image.dtype)
                return {"image": black, "label": label, "index": index, "readable": False}

            found = broken.find(records.parse, example, columns)
            rows = tuple(tf.boolean_mask(column, found) for column in columns)
            return tf.data.Dataset.from_tensor_slices(rows).map(blank)

        def batch(*columns: tf.Tensor) -> tf.data.Dataset:
            return _batch(columns, example, instead)

        batches = in_order(records, shard, num_shards, batch_size)
        return batches.flat_map(_as_written(batch)).prefetch(_AHEAD)

    def _evaluated(self, record: Tensors) -> Tensors:
        return {"image": self.preprocessing.evaluate(record["image"]), "label": record["label"]}

    def _mixed(self, batch: Tensors) -> Tensors:
        image, label = batch["image"], batch["label"]
        if self.mixing:
            label = tf.one_hot(label, self.num_classes)
            image, label = self.mixing(image, label, batch["key"])
        return {"image": image, "label": label}

    def _split(self, name: str) -> Split:
        if name not in self.source.splits:
            raise ValueError(
                f"{self.name} has no split {name!r}; it has {', '.join(sorted(self.source.splits))}"
            )
        return self.source.splits[name]


@gin.register(denylist=["stand_in"])
def pipeline(
    source: Callable[..., Source],
    preprocessing: Callable[..., Preprocessing],
    mixing: Mixing | None = None,
    max_broken: int = 0,
    broken_are_wrong: bool = False,
    stand_in: bool = False,
) -> Pipeline:
    """Puts a source, a preprocessing and a mixing together; see ``Pipeline``.

    Args:
        source, preprocessing: factories of them.
        mixing, max_broken, broken_are_wrong: see ``Pipeline``.
        stand_in: whether made-up photographs take the place of the examples. Names, classes and
            numbers stay those of the source; of ImageNet and its kin they are known without data.

    Raises:
        ValueError: if ``max_broken`` is negative, the source does not take its arguments, or what
            is to stand in for it cannot be known.
    """
    check("pipeline.", ("max_broken", max_broken, max_broken >= 0, "no negative number"))
    opened = instead_of(source) if stand_in else source()
    return Pipeline(opened, preprocessing(), mixing, max_broken, broken_are_wrong)


def _batch(
    columns: tuple[tf.Tensor, ...],
    example: Callable[..., Tensors],
    instead: Callable[[tuple[tf.Tensor, ...], tf.data.Dataset], tf.data.Dataset],
) -> tf.data.Dataset:
    """Returns one batch; where images failed, what ``instead`` gives takes their places.

    Only then is ``instead`` run: nothing is paid as long as images are whole. (A dataset for each
    batch costs a millisecond or two; one for each example would cost a tenth of all the work.)
    """
    rows = tf.data.Dataset.from_tensor_slices(columns)
    whole = rows.map(example, num_parallel_calls=_cores(), deterministic=True).ignore_errors()
    rest = tf.data.Dataset.from_tensors(columns).flat_map(lambda *columns: instead(columns, whole))
    size = columns[0].shape[0]
    return whole.concatenate(rest).take(size).batch(size, drop_remainder=True)


def _cores() -> int:
    """Returns how many cores the process may use: AUTOTUNE would find out anew in each batch."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
