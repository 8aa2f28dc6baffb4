"""Classification: cross-entropy, top-1 and top-5, and labels of one right class or of several."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np
from keras import ops

from condconv.engine.errors import UsageError
from condconv.engine.tasks import Batch, Columns, Data, Tensor


@dataclasses.dataclass(frozen=True)
class Classification:
    """Tells classes apart; its outputs are logits (B, num_classes).

    Attributes:
        num_classes: of the labels.
        allowed: (num_classes,) bool, which of them evaluation chooses from.
        label_smoothing: share of each training label that is spread evenly over all classes.
    """

    num_classes: int
    allowed: np.ndarray
    label_smoothing: float = 0.0

    means = ("loss", "top1")
    divisor = None

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the smoothed cross-entropy; tells the unsmoothed one and how many were right."""
        label = batch["label"]
        hits = ops.equal(ops.argmax(outputs, axis=-1), likeliest(label))
        return ops.sum(cross_entropy(label, outputs, self.label_smoothing)), {
            "loss": ops.sum(cross_entropy(label, outputs)),
            "top1": ops.sum(ops.cast(hits, outputs.dtype)),
        }

    def judge(self, outputs: np.ndarray, batch: Batch) -> Columns:
        """Returns columns of each example.

        ``label``: (N,) the right class, or (N, classes) bool where several can be right.
        ``answer``: (N,) the class that scored highest; -1 for an image that cannot be read.
        ``rank``: (N,) how many classes scored higher than the best right one; 0 where it was right.
        ``loss``: (N,) unsmoothed cross-entropy; of an image that cannot be read, as if all classes
        were equally likely. ``scored``: (N,) whether any class is known to be right; the others do
        not count.
        """
        label, readable = batch["label"], batch["readable"]
        classes = np.arange(self.num_classes)
        right = label if label.ndim == 2 else label[:, None] == classes
        logits = np.where(self.allowed, outputs, np.float32(-np.inf))
        of_right = np.where(right, logits, np.float32(-np.inf))
        own = of_right.max(axis=-1, keepdims=True)
        # A class of the same score counts as higher if it comes first, as in a sorted list; a logit
        # that is no number beats none, so a broken network scores as wrong.
        first = classes < of_right.argmax(axis=-1)[:, None]
        undefined = np.isnan(logits) | np.isnan(own)
        rank = ((logits > own) | (first & (logits == own)) | undefined).sum(axis=-1)
        loss = _log_sum_exp(logits) - _log_sum_exp(of_right)
        return {
            "label": label,
            "answer": np.where(readable, logits.argmax(axis=-1), -1),
            "rank": np.where(readable, rank, self.num_classes),
            "loss": np.where(readable, loss, math.log(self.allowed.sum())).astype(np.float32),
            "scored": right.any(axis=-1),
        }

    def summary(self, columns: Columns) -> dict[str, float | int]:
        """Returns ``top1``, ``top5`` (of at most all classes), ``loss`` and ``images``.

        Shares and the mean loss are over the examples of which a right class is known.
        """
        rank, loss = (columns[name][columns["scored"]] for name in ("rank", "loss"))
        return {
            "top1": float(np.mean(rank < 1)),
            "top5": float(np.mean(rank < min(5, self.num_classes))),
            "loss": float(np.mean(loss, dtype=np.float64)),
            "images": len(rank),
        }

    def predictions(self, columns: Columns) -> Columns:
        """Returns a row for each example that counts, in order.

        ``index`` (N,) int64, its place in the split; ``label``; ``predicted`` (N,) int64;
        ``correct`` (N,) bool, whose mean is ``top1``; ``rank`` (N,) int64, below 5 where it counts
        for ``top5``; ``loss`` (N,) float32.
        """
        scored = columns["scored"]
        label, answer, rank, loss = (
            columns[name][scored] for name in ("label", "answer", "rank", "loss")
        )
        return {
            "index": np.flatnonzero(scored),
            "label": label,
            "predicted": answer.astype(np.int64),
            "correct": rank < 1,
            "rank": rank.astype(np.int64),
            "loss": loss,
        }

    def score(self, summary: Mapping[str, float | int]) -> float:
        """Returns ``top1``."""
        return summary["top1"]


@gin.register(denylist=["data"])
def classification(data: Data, label_smoothing: float = 0.0) -> Classification:
    """Trains a network to tell the classes of ``data`` apart.

    Args:
        data: says how many there are, and which of them evaluation chooses from.
        label_smoothing: share of each training label that is spread evenly over all classes.
    """
    if not 0 <= label_smoothing < 1:
        raise UsageError(
            "classification.label_smoothing takes a share from 0 to below 1, "
            f"not {label_smoothing!r}"
        )
    classes = np.arange(data.num_classes)
    allowed = (
        np.ones(len(classes), bool) if data.answers is None else np.isin(classes, data.answers)
    )
    return Classification(data.num_classes, allowed, label_smoothing)


def cross_entropy(labels: Tensor, logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the cross-entropy of each example, (B,).

    Args:
        labels: (B,) classes, or (B, classes) probabilities.
        logits: (B, classes).
        smoothing: share of each label that is spread evenly over all classes.
    """
    classes = logits.shape[-1]
    if len(labels.shape) == 1:
        labels = ops.one_hot(labels, classes, dtype=logits.dtype)
    labels = ops.cast(labels, logits.dtype) * (1 - smoothing) + smoothing / classes
    return ops.categorical_crossentropy(labels, logits, from_logits=True)


def likeliest(labels: Tensor) -> Any:
    """Returns the class of each label, (B,) int32; of mixed ones (B, classes) the largest share."""
    return ops.cast(labels, "int32") if len(labels.shape) == 1 else ops.argmax(labels, axis=-1)


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Returns log Σ exp of each row, (N,) float64; -inf for a row of nothing else."""
    highest = x.max(axis=-1, keepdims=True).astype(np.float64)
    highest = np.where(np.isfinite(highest), highest, 0)
    with np.errstate(divide="ignore", over="ignore"):
        return np.log(np.exp(x - highest).sum(axis=-1)) + highest[:, 0]
