"""What a run is for, and the data it sees: the two protocols.

A task knows what its labels and its network's outputs mean; nobody else in the engine does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Tensor = Any
Batch = Mapping[str, Any]
"""Examples by column, each (batch size, …): arrays of numpy, or tensors of a backend."""
Columns = dict[str, np.ndarray]
"""What is said of each example of a split: columns (N, …) by name."""


class ImageSpec(Protocol):
    """What the images of a split are.

    Attributes:
        shape: of an image, (height, width, channels); None for what may be any.
        dtype: numpy's name of it.
    """

    shape: tuple[int | None, ...]
    dtype: str


class Preprocessing(Protocol):
    """How an encoded image becomes what a network sees."""

    def evaluate(self, encoded: Tensor) -> Tensor:
        """Returns an encoded image as evaluation sees it, (H, W, 3), 0–255."""


class Data(Protocol):
    """What the engine and the tools need of a data set; ``data.pipeline.Pipeline`` is one.

    Batches are any iterable of dicts of arrays of numpy; a ``tf.data.Dataset`` is one.
    """

    name: str
    num_classes: int
    class_names: Sequence[str]
    """Of all classes, or none."""
    answers: Sequence[int] | None
    """Classes that evaluation chooses from; None for all."""
    preprocessing: Preprocessing

    def num_examples(self, split: str) -> int:
        """Returns how many examples ``split`` has."""

    def image_spec(self, split: str) -> ImageSpec:
        """Returns what the images of ``split`` are, as evaluation sees them."""

    def views_per_image(self, split: str) -> int:
        """Returns how many examples of ``split`` in a row show the same image."""

    def train_batches(
        self, split: str, *, batch_size: int, seed: int, start: int, shard: int, num_shards: int
    ) -> Iterable[Batch]:
        """Returns batches without end of {"image", "label"}.

        For classification, labels are (B,) classes or (B, num_classes) probabilities.

        Args:
            split: to read.
            batch_size: examples in a batch of this shard.
            seed: of the order and of the augmentation.
            start: steps to skip.
            shard: which part of each global batch.
            num_shards: parts of a global batch.
        """

    def eval_batches(
        self, split: str, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Iterable[Batch]:
        """Returns batches of each example once, over all shards.

        Its elements are {"image", "label", "index", "readable"}, each (batch_size, …). For
        classification, labels are classes, or (B, num_classes) bool where several are right or none
        is known. All shards have as many batches, filled up with examples of index -1.
        """

    def untouched(
        self, split: str, *, batch_size: int, seed: int, start: int = 0
    ) -> Iterable[Batch]:
        """Returns the images of ``train_batches`` one by one, as evaluation would see them."""


class Task(Protocol):
    """What a network is trained for and judged by.

    Attributes:
        means: names of what ``loss`` sums up, whose means over the examples are told.
        divisor: a batch to its share of what the loss is divided by, which is summed over replicas
            and accumulated parts before any loss is computed; None to divide by the examples.
    """

    means: Sequence[str]
    divisor: Callable[[Batch], Tensor] | None

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss to descend and what to tell, each a sum over the examples.

        Args:
            outputs: of the network in training, at least float32.
            batch: that they are of.
        """

    def judge(self, outputs: Any, batch: Batch) -> Columns:
        """Returns what the network said of each example; all arrays are numpy's."""

    def summary(self, columns: Columns) -> dict[str, float | int]:
        """Returns what a whole split comes to, by name, such as ``top1`` and ``images``."""

    def predictions(self, columns: Columns) -> Columns:
        """Returns what ``predictions.npz`` holds: a row for each example that counts, in order."""

    def score(self, summary: Mapping[str, float | int]) -> float:
        """Returns the number of a summary by which the best checkpoint is chosen: the highest."""


def as_numpy(batches: Iterable[Batch]) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches as dicts of numpy's arrays, whatever they come as."""
    if hasattr(batches, "as_numpy_iterator"):
        yield from batches.as_numpy_iterator()
    else:
        yield from ({name: np.asarray(v) for name, v in batch.items()} for batch in batches)
