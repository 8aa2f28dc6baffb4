"""What the 1,000 classes of ImageNet (ILSVRC2012) are called, in the order of their labels.

The table, from WordNet 3.0, is in ``imagenet_classes.tsv`` next to this file.
"""

import functools
import pathlib

_TABLE = pathlib.Path(__file__).with_name("imagenet_classes.tsv")


def imagenet_synsets() -> tuple[str, ...]:
    """Returns the WordNet number of each class, such as "n01440764", all different."""
    return tuple(synset for synset, *_ in _table())


def imagenet_class_names() -> tuple[str, ...]:
    """Returns the words for each class, such as "tench, Tinca tinca".

    Two classes are called "crane" (134, the bird, and 517, the machine): a name does not tell
    which class is meant, a label or a synset does.
    """
    return tuple(name for _, name, *_ in _table())


def imagenet_subset(letter: str) -> tuple[int, ...]:
    """Returns the labels of the 200 classes that occur in ImageNet-A ("A") or ImageNet-R ("R")."""
    return tuple(label for label, row in enumerate(_table()) if letter in "".join(row[2:]))


@functools.cache
def _table() -> tuple[tuple[str, ...], ...]:
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines if not line.startswith("#"))
