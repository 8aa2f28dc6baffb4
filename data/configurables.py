"""Imported by configs: everything of the input that they may name."""

from data import (  # noqa: F401
    augment,
    autoaugment,
    digits,
    folder,
    imagenet,
    mixing,
    pipeline,
    preprocess,
    records,
    synthetic,
)
