"""Sources: where examples come from, each as an encoded image, a label and an id.

A split is made of parts: the files of records, or, where each example can be reached by itself,
the examples. What reads them, and in which order, is the same for all (``data.order``).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

Example = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Split:
    """Some examples of a source.

    Attributes:
        lengths: (parts,) int64, examples in each part.
        read: a dataset of (part, first, count), scalars, to one of (payload, index): of each
            part, ``count`` examples from ``first`` on, unparsed, with their places in the split.
        parse: a payload to {"image": encoded bytes, "label": int64, or (num_classes,) bool where
            several are right, "id": the name of its file, or ""}.
        sequential: whether a part can only be read from its beginning, so that it is best read
            through, and several at once.
        views_per_image: examples that follow each other and show the same image, so that their
            errors are not independent: example i is of image i // views_per_image.
    """

    lengths: np.ndarray
    read: Callable[[tf.data.Dataset], tf.data.Dataset]
    parse: Callable[[tf.Tensor], Example]
    sequential: bool
    views_per_image: int = 1

    @property
    def num_examples(self) -> int:
        """How many examples there are in all parts."""
        return int(self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set for classification.

    Attributes:
        name: of the data set.
        num_classes: of its labels.
        splits: by name.
        class_names: of all classes, or none.
        answers: the classes that evaluation chooses from, where these are not all.
    """

    name: str
    num_classes: int
    splits: Mapping[str, Split]
    class_names: Sequence[str] = ()
    answers: Sequence[int] | None = None


def indexed(
    num_examples: int, example: Callable[[tf.Tensor], Example], views_per_image: int = 1
) -> Split:
    """Returns a split of which each example can be had by its index, a scalar int64."""
    return Split(
        lengths=np.ones(num_examples, np.int64),
        read=lambda segments: segments.map(lambda part, first, count: (part, part)),
        parse=example,
        sequential=False,
        views_per_image=views_per_image,
    )


def record_files(
    files: Sequence[str],
    skips: Sequence[int],
    lengths: Sequence[int],
    parse: Callable[[tf.Tensor], Example],
) -> Split:
    """Returns a split of TFRecord files.

    Args:
        files: their paths.
        skips: records at the beginning of each that do not belong to the split.
        lengths: records of each that do.
        parse: a serialized record to an example.
    """
    paths, before = tf.constant(list(files)), tf.constant(skips, tf.int64)
    lengths = np.asarray(lengths, np.int64)
    starts = tf.constant(np.cumsum(lengths) - lengths)

    def open_part(part: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(paths[part]).skip(before[part] + first).take(count)
        places = tf.data.Dataset.range(starts[part] + first, starts[part] + first + count)
        return tf.data.Dataset.zip((records, places))

    return Split(lengths, lambda segments: segments.flat_map(open_part), parse, sequential=True)
