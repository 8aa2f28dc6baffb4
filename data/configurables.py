"""Imported by configs: everything of the input that they may name."""

from data import (  # noqa: F401
    augment,
    autoaugment,
    digits,
    folder,
    hard_digits,
    imagenet,
    mixing,
    pipeline,
    preprocess,
    records,
    synthetic,
)
