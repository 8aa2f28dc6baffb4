"""From a published checkpoint to one of our networks that computes the same."""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import keras
import numpy as np

from condconv import count_cost
from models import MODELS, create_model, released, released_timm

_WITH_BACKGROUND = 1001  # classes of ImageNet, where the first one stands for none of them

Values = Mapping[str, np.ndarray]


class ReleasedWeights(Protocol):
    """What has been read of a checkpoint; see ``condconv.tools.published_weights``."""

    values: Values
    averaged: frozenset[str]
    is_timm: bool
    architecture: str | None
    normalization: Any


def import_network(
    source: ReleasedWeights, name: str, num_experts: int = 0, **arguments: Any
) -> tuple[keras.Model, dict[str, Any]]:
    """Builds a network, and gives it the weights of a checkpoint.

    Args:
        source: the checkpoint.
        name: of our network, one of ``models.list_models()``.
        num_experts: of its conditional layers; 0 for the static one.
        **arguments: others of the network, such as ``image_size``, ``width`` or ``normalization``;
            they win over what the checkpoint says. The classes are the checkpoint's, but for the
            background where there are 1001.

    Returns:
        The network, and what is to be known of it, by name.

    Raises:
        ValueError: if there is no such network, or the checkpoint is not one of it; all that is
            missing, left over or misshapen is named.
    """
    arguments = {"num_experts": num_experts, **arguments}
    like = None
    if source.is_timm:
        like = released_timm.architecture(name, num_experts, source.architecture)
        said = {"normalization": source.normalization} if source.normalization else {}
        arguments = {**like.arguments(), **said, **arguments}
    network = create_model(name, **arguments)
    names = _names(source, network)
    values, classes = _without_background(source, names)
    if classes not in (None, network.output.shape[-1]):
        network = create_model(name, num_classes=classes, **arguments)
    _assign(source, network, values, names, like)
    return network, {
        "network": name,
        "num_experts": num_experts,
        "same_as": f"timm's {like.name}" if like else "the authors' TensorFlow 1 graph",
        **_weights(source, names),
        "classes": network.output.shape[-1],
        "background_dropped": values is not source.values,
        **_described(network),
        "padding": arguments.get("padding", _default(name, "padding")),
    }


def _weights(source: ReleasedWeights, names: released.Names) -> dict[str, int]:
    averaged = len(source.averaged & set(names.values()))
    return {"averaged_variables": averaged, "raw_variables": len(names) - averaged}


def _described(network: keras.Model) -> dict[str, Any]:
    cost, normalization = count_cost(network), network.get_layer("normalization")
    return {
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "mean": normalization.mean,
        "deviation": normalization.deviation,
        "batch_norm_epsilon": network.get_layer("stem_conv_bn").epsilon,
    }


def _default(name: str, argument: str) -> Any:
    return inspect.signature(MODELS[name]).parameters[argument].default


def _names(source: ReleasedWeights, network: keras.Model) -> released.Names:
    if source.is_timm:
        return released_timm.timm_names(network)
    scope = released.tf1_scope(source.values)
    return released.recounted(released.tf1_names(network, scope), source.values)


def _assign(
    source: ReleasedWeights,
    network: keras.Model,
    values: Values,
    names: released.Names,
    like: released_timm.Architecture | None,
) -> None:
    if like is None:
        released.assign(network, values, names)
        return
    try:
        released.assign(network, values, names, released_timm.timm_layout)
    except ValueError as error:
        this = f"timm's {source.architecture}" if source.architecture else "this"
        raise ValueError(f"{this} is not timm's {like.name}: {error}") from error
    released_timm.check_known(source.architecture, like)


def _without_background(
    source: ReleasedWeights, names: released.Names
) -> tuple[Values, int | None]:
    """Returns the values without the class that stands for none, and how many classes are left.

    None where the classifier is missing or in no shape to tell.
    """
    bias, kernel = names["classifier/bias"], names["classifier/kernel"]
    if bias not in source.values or kernel not in source.values:
        return source.values, None
    axis = 0 if source.is_timm else -1
    classes = source.values[bias].size
    if not source.values[kernel].ndim or source.values[kernel].shape[axis] != classes:
        return source.values, None
    if classes != _WITH_BACKGROUND:
        return source.values, classes
    kept = range(1, classes)
    dropped = {name: np.take(source.values[name], kept, axis) for name in (bias, kernel)}
    return {**source.values, **dropped}, classes - 1
