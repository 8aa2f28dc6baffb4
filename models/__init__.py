"""The networks of the CondConv paper, static and conditional, by name."""

import difflib
import inspect
from typing import Any

import keras

from models.efficientnet import efficientnet_b0, efficientnet_b0_depth
from models.mnasnet import mnasnet_a1
from models.mobilenet_v1 import mobilenet_v1
from models.mobilenet_v2 import mobilenet_v2
from models.resnet import resnet50

MODELS = {
    factory.__name__: factory
    for factory in (
        efficientnet_b0,
        efficientnet_b0_depth,
        mobilenet_v1,
        mobilenet_v2,
        mnasnet_a1,
        resnet50,
    )
}

__all__ = ["MODELS", "create_model", "list_models"]


def list_models() -> list[str]:
    """Returns the names that ``create_model`` knows."""
    return sorted(MODELS)


def create_model(name: str, **arguments: Any) -> keras.Model:
    """Builds a network that maps pixels to logits.

    Args:
        name: one of ``list_models()``.
        **arguments: those of the factory of that name, such as ``num_classes=1000``,
            ``num_experts=0`` (static), ``image_size=224``, ``width=1.0``.

    Returns:
        A model from pixels (B, H, W, 3) of 0–255, uint8 or float32, to logits (B, num_classes)
        float32. It normalises the pixels itself.

    Raises:
        ValueError: if there is no such network or argument, or a value is out of range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {_known(name, MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{name} has no argument {argument!r}; {_known(argument, known)}")
    return MODELS[name](**arguments)


def _known(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known are {', '.join(sorted(known))}"
