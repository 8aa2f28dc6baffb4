"""Batch normalisation folded into the layers before it, for inference.

In inference a batch normalisation multiplies each channel by gamma / sqrt(variance + epsilon) and
shifts it. What follows a convolution linearly can be computed by it: the factor goes into the
kernel, into every expert of a conditional one (arXiv:1904.04971 mixes them linearly), and the
shift becomes a bias.
"""

import collections
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import activations, initializers, layers, ops

from condconv.layers import CondConv2D, CondDense, DepthwiseCondConv2D
from condconv.normalization import BatchNormShift, FromBatchNorm
from condconv.work import extras, kind

Operation = Any  # a layer, a model, or a function of keras.ops in a graph
Calls = dict[Operation, list[Any]]

_CONDITIONAL = (CondConv2D, DepthwiseCondConv2D, CondDense)
_DEPTHWISE = (layers.DepthwiseConv2D, DepthwiseCondConv2D)
_FOLDED_INTO = (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense, *_CONDITIONAL)


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a copy of a model for inference, its batch normalisations folded into convolutions.

    A batch normalisation is folded if it directly follows a ``Conv2D``, ``DepthwiseConv2D``,
    ``Dense`` or one of our conditional layers that is linear, normalises that layer's channels in
    its precision, and is all that reads its output, in every call where one of the two is shared;
    also in models within the model. Anything else stays as it is, with its names and paths. A
    static layer gets a bias; a conditional one is followed by a ``BatchNormShift`` in the place,
    and with the name, of the normalisation.

    The copy equals the original in inference up to rounding: the folding itself is computed in
    float64. It is not compiled, and saves and loads like any other. It can be trained, but then
    without batch normalisation: nothing normalises any more, and regularizers see the folded
    kernels. ``count_cost`` accounts a bias that stands for a batch normalisation as what it was,
    at nothing, so the copy costs the multiply-adds of the original; its parameters are fewer.

    Args:
        model: a Functional model or a built Sequential one, which is left as it is. Layers are
            copied by their configs.

    Raises:
        ValueError: if it is subclassed, so that nobody can see what follows what, or not built.
    """
    _check(model)
    calls, folds = _look_through(model)
    copies = _copy(model, calls, folds)
    for old, new in copies.items():
        if old in folds:
            _fold(old, folds[old], new, copies[folds[old]])
        elif isinstance(new, keras.Layer) and old not in calls and old not in folds.values():
            _copy_state(old, new)
    return copies[model]


def _check(model: keras.Model) -> None:
    if _graph(model) is not None:
        return
    reason = "whose call is its own: fold the Functional models inside it one by one"
    if isinstance(model, keras.Sequential) and not model.built:
        reason = "that is not built: call it on a batch once"
    raise ValueError(
        "fold_batch_norm takes a Functional or a built Sequential model, not "
        f"{getattr(model, 'name', model)!r}, a {type(model).__name__} {reason}"
    )


def _graph(operation: Operation) -> Any:
    """Returns the graph of a model that does nothing but call its parts; None of all others."""
    if not isinstance(operation, keras.Model):
        return None
    if not type(operation).call.__module__.startswith("keras."):
        return None
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return operation if isinstance(operation, keras.Function) else None


def _look_through(model: keras.Model) -> tuple[Calls, dict[Operation, Operation]]:
    """Returns the calls in each graph, and which layers take which batch normalisation in."""
    calls = _calls(model)
    before, after = _neighbours(calls)
    forced = _forced(calls)
    return calls, {
        layer: follower
        for layer, followers in after.items()
        for follower in followers
        if len(followers) == 1
        and before[follower] == {layer}
        and follower not in forced
        and _fits(layer, follower)
    }


def _calls(model: Operation) -> Calls:
    """Returns the calls in ``model`` and in all graphs inside it."""
    found: Calls = {}
    waiting = [model]
    while waiting:
        operation = waiting.pop()
        graph = _graph(operation)
        if graph is None or operation in found:
            continue
        levels = graph._nodes_by_depth.values()
        found[operation] = [call for level in levels for call in level if not call.is_input]
        waiting += [call.operation for call in found[operation]]
    return found


def _forced(calls: Calls) -> set[Operation]:
    """Returns what is not left to run in inference, with all that is in it."""
    forced = {call.operation for graph in calls for call in calls[graph] if not _is_plain(call)}
    inside = [_calls(operation).values() for operation in forced]
    return forced | {call.operation for graphs in inside for graph in graphs for call in graph}


def _is_plain(call: Any) -> bool:
    """Whether nothing but tensors is passed: with ``training=True`` the batch's statistics stay."""
    arguments = keras.tree.flatten((call.arguments.args, call.arguments.kwargs))
    return all(a is None or a is False or isinstance(a, keras.KerasTensor) for a in arguments)


def _neighbours(calls: Calls) -> tuple[dict[Operation, set], dict[Operation, set]]:
    """Returns what each operation reads from, and what reads from it: its graph, where it ends."""
    before, after = collections.defaultdict(set), collections.defaultdict(set)
    for graph in calls:
        for call in calls[graph]:
            for tensor in call.input_tensors:
                before[call.operation].add(tensor._keras_history.operation)
                after[tensor._keras_history.operation].add(call.operation)
        for tensor in _graph(graph).outputs:
            after[tensor._keras_history.operation].add(graph)
    return before, after


def _fits(layer: Operation, norm: Operation) -> bool:
    """Whether ``layer`` can compute what ``norm`` does to its output."""
    if not issubclass(kind(layer) or object, _FOLDED_INTO):
        return False
    if not issubclass(kind(norm) or object, layers.BatchNormalization):
        return False
    rank = norm.input_spec.ndim
    first = getattr(layer, "data_format", None) == "channels_first"
    return (
        layer.activation is activations.linear
        and norm.axis % rank == (1 if first else rank - 1)
        and layer.compute_dtype == norm.compute_dtype
        and layer.activity_regularizer is None
        and norm.activity_regularizer is None
        and not extras(layer)
    )


def _copy(
    model: keras.Model, calls: Calls, folds: dict[Operation, Operation]
) -> dict[Operation, Operation | None]:
    """Copies everything in ``model``, without its weights; None for what is no longer needed."""
    norms = {norm: layer for layer, norm in folds.items()}
    copies: dict[Operation, Operation | None] = {}

    def copy(operation: Operation) -> Operation | None:
        if operation not in copies:
            copies[operation] = make(operation)
        return copies[operation]

    def make(operation: Operation) -> Operation | None:
        if operation in calls:
            sequential = isinstance(operation, keras.Sequential)
            return (_copy_sequential if sequential else _copy_functional)(operation, copy)
        if operation in norms:
            return _remainder(operation, norms[operation])
        config = operation.get_config()
        if (
            operation in folds
            and not isinstance(operation, _CONDITIONAL)
            and not config["use_bias"]
        ):
            config["bias_initializer"] = initializers.serialize(FromBatchNorm())
            config["use_bias"] = True
        return type(operation).from_config(config)

    copy(model)
    return copies


def _copy_sequential(
    model: keras.Sequential, copy: Callable[[Operation], Operation | None]
) -> keras.Sequential:
    parts = [model.inputs[0]._keras_history.operation, *model.layers]
    copies = [part for part in map(copy, parts) if part is not None]
    return keras.Sequential(copies, name=model.name, trainable=model.trainable)


def _copy_functional(
    model: keras.Model, copy: Callable[[Operation], Operation | None]
) -> keras.Model:
    def call(operation: Operation | None, *args: Any, **kwargs: Any) -> Any:
        if operation is not None and not isinstance(operation, BatchNormShift):
            return operation(*args, **kwargs)
        x = keras.tree.flatten((args, kwargs))[0]  # of what a batch normalisation was called with
        return x if operation is None else operation(x)

    inputs = keras.tree.map_structure(
        lambda x: copy(x._keras_history.operation).output, model.input
    )
    outputs = model._run_through_graph(inputs, operation_fn=copy, call_fn=call)
    return keras.Model(inputs, outputs, name=model.name, trainable=model.trainable)


def _remainder(norm: Any, layer: Any) -> BatchNormShift | None:
    if not isinstance(layer, _CONDITIONAL):
        return None
    return BatchNormShift(
        norm.axis, name=norm.name, dtype=norm.dtype_policy, trainable=norm.trainable
    )


def _fold(layer: Any, norm: Any, new: Any, shift: BatchNormShift | None) -> None:
    """Gives ``new``, the copy of ``layer``, and what follows it the weights of both."""
    scale, offset = _affine(norm)
    channels = layer.kernel.shape[-2:] if isinstance(layer, _DEPTHWISE) else scale.shape
    bias = 0.0 if layer.bias is None else _values(layer.bias) * scale
    if shift is None:
        _assign(new.bias, bias + offset)
    else:
        _copy_state(layer, new)  # it may have a routing of its own
        _assign(shift.bias, offset)
        if layer.bias is not None:
            _assign(new.bias, bias)
    _assign(new.kernel, _values(layer.kernel) * scale.reshape(channels))


def _affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns factor and summand (C,) of each channel in inference."""
    scale = 1 / np.sqrt(_values(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale = scale * _values(norm.gamma)
    offset = -_values(norm.moving_mean) * scale
    return scale, offset + _values(norm.beta) if norm.center else offset


def _values(variable: keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(variable).astype("float64")


def _assign(variable: keras.Variable, value: np.ndarray) -> None:
    variable.assign(ops.cast(value, variable.dtype))


def _copy_state(old: keras.Layer, new: keras.Layer) -> None:
    """Copies the weights as saving and loading do: some layers derive more from them.

    On JAX no array may belong to two variables: a compiled function may take one model's for its
    own use, and then the other's is gone.
    """
    for part, copied in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
        store: dict[str, Any] = {}
        part.save_own_variables(store)
        copied.load_own_variables({name: ops.convert_to_numpy(v) for name, v in store.items()})
