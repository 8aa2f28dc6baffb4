"""How images are cut for an exported network: lines of its run's config, kept in its metadata."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from data.class_names import imagenet_class_names
from data.preprocess import Preprocessing, crops, whole

_KINDS = {"crops": crops, "whole": whole}
_OF_EVALUATION = ("image_size", "resize_method", "antialias", "eval_padding")


def preprocessing_in(config: str) -> list[str]:
    """Returns the lines of a saved config that say how evaluation cuts an image."""
    which = re.search(r"^pipeline\.preprocessing = @(?:\w+\.)*(\w+)", config, re.MULTILINE)
    names = ("pipeline.preprocessing ", f"{which[1]}.") if which else ()
    lines = [line for line in config.splitlines() if line.startswith(names)]
    return [line for line in lines if ".augmentations = " not in line]


def recorded(bindings: Sequence[str], image_size: int) -> Preprocessing:
    """Returns the preprocessing that some lines of a config describe, as far as evaluation goes.

    Args:
        bindings: from ``preprocessing_in``, such as "pipeline.preprocessing = @crops" and
            "crops.image_size = 224"; without any, it is the official one of ImageNet.
        image_size: height and width, where the lines do not say.

    Raises:
        ValueError: if they name another preprocessing than those here, or a value that is none.
    """
    values = dict(line.split(" = ", 1) for line in bindings if " = " in line)
    kind = values.get("pipeline.preprocessing", "@crops").split(".")[-1].lstrip("@")
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no preprocessing that is known here: {', '.join(_KINDS)}")
    given = {n: values[f"{kind}.{n}"] for n in _OF_EVALUATION if f"{kind}.{n}" in values}
    arguments = {name: _literal(f"{kind}.{name}", text) for name, text in given.items()}
    return _KINDS[kind](**{"image_size": image_size} | arguments)


def _literal(name: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{name} = {text} is no plain value") from error


def as_of_imagenet(image_size: int, num_classes: int) -> dict[str, Any]:
    """Returns how a network is evaluated that tells ImageNet's 1,000 classes apart.

    Of one with another number of them nobody knows, and there is nothing in the result; else
    ``evaluate``, a function of images, ``preprocessing``, the lines of a config that say the same,
    and ``class_names``.
    """
    if num_classes != 1000:
        return {}
    lines = [
        "pipeline.preprocessing = @crops",
        f"crops.image_size = {image_size}",
        f"crops.eval_padding = {round(image_size / 7)}",  # 32 at 224: a share of 0.875
        "crops.resize_method = 'legacy_bicubic'",
    ]
    return {
        "evaluate": recorded(lines, image_size).evaluate,
        "preprocessing": lines,
        "class_names": imagenet_class_names(),
    }
