"""What happens to an image that cannot be read: named, and never passed over in silence."""

import logging
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from data.source import Example

_LOG = logging.getLogger(__name__)


class Broken:
    """Finds what is broken in a batch that did not come out whole, and keeps count of it."""

    def __init__(self, source: str, limit: int, cure: str):
        self._source, self._limit, self._cure = source, limit, cure
        self._named: set[str] = set()

    def find(
        self,
        parse: Callable[[tf.Tensor], Example],
        example: Callable[..., Example],
        columns: tuple[tf.Tensor, ...],
    ) -> tf.Tensor:
        """Returns which examples of a batch are broken, (B,) bool; runs in the graph.

        Args:
            parse: a payload to an example, for its id.
            example: what failed, a function of one row of the columns.
            columns: (payload, index, …), each (B,).

        Raises:
            tf.errors.OpError: in the graph, with one line, if the images named so far are more
                than the limit.
        """

        def find(*columns: tf.Tensor) -> np.ndarray:
            rows = list(zip(*columns, strict=True))
            reasons = [_failure(example, row) for row in rows]
            for row, reason in zip(rows, reasons, strict=True):
                if reason:
                    name = parse(row[0])["id"].numpy().decode(errors="replace")
                    self._note(name or f"example {row[1]}", reason)
            if not any(reasons):
                raise RuntimeError(f"{self._source}: a batch failed that can be read now; go on")
            return np.array([reason is not None for reason in reasons])

        found = tf.py_function(find, columns, tf.bool)
        return tf.ensure_shape(found, columns[0].shape)

    def _note(self, name: str, reason: str) -> None:
        if name in self._named:
            return
        self._named.add(name)
        if len(self._named) > self._limit:
            raise RuntimeError(
                f"{self._source}: {name} cannot be read ({reason}), and {self._limit} "
                f"broken images are allowed: mend or remove it, or {self._cure}"
            )
        skipped = "%s: %s cannot be read (%s): broken image %d of %d allowed"
        _LOG.warning(skipped, self._source, name, reason, len(self._named), self._limit)


def _failure(example: Callable[..., Example], row: tuple[tf.Tensor, ...]) -> str | None:
    try:
        example(*row)
    except tf.errors.OpError as error:
        first, *_ = re.sub(r"{{.*?}}", "", error.message).strip().split("\n")
        return first.split(" [Op:")[0]
    return None
