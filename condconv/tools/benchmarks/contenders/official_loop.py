"""The authors' formulation of CondConv, to measure ours against: a loop over the examples.

As tensorflow/tpu, models/official/efficientnet/condconv has it: the kernels of all examples are
mixed by one matrix product, the batch is split, each example is convolved alone, and the results
are joined. So the batch has to be known, and the graph grows with it. TensorFlow only.

It comes as methods to put into our layers before a network is made, so that the process that
measures it holds one network and makes one.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, activation

Tensor = Any
Replacement = tuple[Any, str, Callable[..., Any]]


def in_keras_layers() -> list[Replacement]:
    """Returns the loop, and Keras' own methods where ours only compute the same faster."""
    return [
        *in_our_layers(),
        (activation, "_with_compiled_gradient", lambda: keras.ops.silu),
        *(
            (ours, "call", kind.call)
            for kind in (keras.layers.BatchNormalization, keras.layers.DepthwiseConv2D)
            for ours in kind.__subclasses__()
            if ours.__module__.startswith("condconv.")
        ),
    ]


def in_our_layers() -> list[Replacement]:
    """Returns the loop alone, for every conditional layer: class, name and new method."""
    return [
        (CondConv2D, "apply_experts", _convolve),
        (DepthwiseCondConv2D, "apply_experts", _convolve_depthwise),
        (CondDense, "apply_experts", _multiply),
    ]


def _mix(experts: Tensor, routing_weights: Tensor, dtype: Any) -> Tensor:
    """Mixes experts (n, …) by weights (B, n) into kernels (B, …)."""
    experts = tf.convert_to_tensor(experts)
    flat = tf.reshape(experts, (experts.shape[0], -1))
    mixed = tf.matmul(tf.cast(routing_weights, flat.dtype), flat)
    return tf.cast(tf.reshape(mixed, (-1, *experts.shape[1:])), dtype)


def _each(x: Tensor, kernels: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Applies to each example (1, …) its kernel."""
    if x.shape[0] is None:
        raise ValueError("the official loop needs a batch of a known size")
    pairs = zip(tf.split(x, x.shape[0]), tf.unstack(kernels, x.shape[0]), strict=True)
    return tf.concat([apply(example, kernel) for example, kernel in pairs], axis=0)


def _convolve(layer: CondConv2D, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any) -> Tensor:
    def apply(example: Tensor, kernel: Tensor) -> Tensor:
        padding, dilations = layer.padding.upper(), layer.dilation_rate
        return tf.nn.convolution(example, kernel, layer.strides, padding, dilations=dilations)

    return _each(x, _mix(layer.kernel, routing_weights, x.dtype), apply)


def _convolve_depthwise(
    layer: DepthwiseCondConv2D, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any
) -> Tensor:
    def apply(example: Tensor, kernel: Tensor) -> Tensor:
        padding, dilations = layer.padding.upper(), layer.dilation_rate
        strides = (1, *layer.strides, 1)
        return tf.nn.depthwise_conv2d(example, kernel, strides, padding, dilations=dilations)

    return _each(x, _mix(layer.kernel, routing_weights, x.dtype), apply)


def _multiply(layer: CondDense, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any) -> Tensor:
    """As they would have done it: they published no conditional dense layer."""
    return _each(x, _mix(layer.kernel, routing_weights, x.dtype), tf.matmul)
