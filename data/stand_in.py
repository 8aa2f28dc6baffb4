"""Made-up photographs in the place of data that is not there, for trying everything else."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence

import tensorflow as tf

from data.digits import digits
from data.hard_digits import hard_digits
from data.source import Source, Split
from data.synthetic import photograph, repeated, synthetic

_ALWAYS_THERE = (digits, hard_digits, synthetic)  # so that nothing has to stand in for them
_DISTINCT = 8  # photographs that are made; the examples repeat them
_HEIGHT, _WIDTH = 375, 500


def instead_of(factory: Callable[..., Source]) -> Source:
    """Returns what a factory of sources promises, with made-up photographs as its examples.

    A factory that knows its data set's facts without the data takes an argument ``stand_in``. Any
    other is called as usual, for its numbers.

    Args:
        factory: of a source; gin's own wrapper of one counts as what it wraps.

    Raises:
        ValueError: if the numbers are in the data, and the data is not there.
    """
    if inspect.unwrap(factory) in _ALWAYS_THERE:
        return factory()
    if "stand_in" in inspect.signature(factory).parameters:
        return factory(stand_in=True)
    real = _opened(factory)
    return photographs(
        real.name,
        real.num_classes,
        {name: split.num_examples for name, split in real.splits.items()},
        class_names=real.class_names,
        answers=real.answers,
        several={name for name, split in real.splits.items() if _has_several(split)},
    )


def photographs(
    name: str,
    num_classes: int,
    sizes: Mapping[str, int],
    *,
    class_names: Sequence[str] = (),
    answers: Sequence[int] | None = None,
    several: Collection[str] = (),
) -> Source:
    """Returns a source of made-up photographs, 375 high and 500 wide, with labels in turn.

    Args:
        name, num_classes, class_names, answers: of the data set; see ``Source``.
        sizes: examples in each split.
        several: splits whose labels are (num_classes,) bool.
    """
    labels = range(num_classes) if answers is None else answers
    splits = {
        split: repeated(_images(), size, labels, num_classes if split in several else None)
        for split, size in sizes.items()
    }
    return Source(name, num_classes, splits, class_names, answers)


def _opened(factory: Callable[..., Source]) -> Source:
    try:
        return factory()
    except ValueError as error:
        first, *_ = str(error).split("\n")  # gin adds lines of its own
        unknown = (
            "nothing can stand in for this data set, whose class count is not known without it"
        )
        raise ValueError(f"{unknown}: {first}") from error


def _has_several(split: Split) -> bool:
    """Returns whether the labels of a split tell of any number of right classes."""
    segments = tf.data.Dataset.from_tensors((tf.constant(0, tf.int64),) * 3)
    label = split.read(segments).map(lambda payload, _: split.parse(payload)["label"])
    return label.element_spec.shape.rank == 1


@functools.cache
def _images() -> tuple[bytes, ...]:
    return tuple(photograph(_HEIGHT, _WIDTH, seed) for seed in range(_DISTINCT))
