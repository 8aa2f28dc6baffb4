"""The authors' formulation of CondConv, to measure ours against: a loop over the examples.

As tensorflow/tpu, models/official/efficientnet/condconv has it: the kernels of all examples are
mixed by one matrix product, the batch is split, each example is convolved alone, and the results
are joined. So the batch has to be known, and the graph grows with it. TensorFlow only.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D

Tensor = Any


def of_network(model: keras.Model) -> keras.Model:
    """Returns the network with the loop in every conditional layer, else of Keras' own layers.

    Its weights are new ones, in the same order as the network's.
    """
    return keras.models.clone_model(model, clone_function=_official)


def with_our_layers(model: keras.Model) -> keras.Model:
    """Returns the network with the loop in every conditional layer, and the rest as it is."""
    return keras.models.clone_model(model, clone_function=_looped)


def _official(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Copies a layer, into Keras' own kind where ours only computes the same faster."""
    for kind in (keras.layers.BatchNormalization, keras.layers.DepthwiseConv2D):
        if isinstance(layer, kind):
            return kind.from_config(layer.get_config())
    return _looped(layer)


def _looped(layer: keras.layers.Layer) -> keras.layers.Layer:
    kind = _LOOPS.get(type(layer), type(layer))
    return kind.from_config(layer.get_config())


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


class LoopedConv2D(CondConv2D):
    """``CondConv2D`` as the authors compute it."""

    def apply_experts(self, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any) -> Tensor:
        """Convolves each example by a convolution of its own."""
        kernels = _mix(self.kernel, routing_weights, x.dtype)

        def apply(example: Tensor, kernel: Tensor) -> Tensor:
            return tf.nn.convolution(
                example, kernel, self.strides, self.padding.upper(), dilations=self.dilation_rate
            )

        return _each(x, kernels, apply)


class LoopedDepthwiseConv2D(DepthwiseCondConv2D):
    """``DepthwiseCondConv2D`` as the authors compute it."""

    def apply_experts(self, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any) -> Tensor:
        """Convolves each example by a depthwise convolution of its own."""
        kernels = _mix(self.kernel, routing_weights, x.dtype)

        def apply(example: Tensor, kernel: Tensor) -> Tensor:
            return tf.nn.depthwise_conv2d(
                example,
                kernel,
                (1, *self.strides, 1),
                self.padding.upper(),
                dilations=self.dilation_rate,
            )

        return _each(x, kernels, apply)


class LoopedDense(CondDense):
    """``CondDense`` as the authors would compute it; they published none."""

    def apply_experts(self, x: Tensor, routing_weights: Tensor, *_: Any, **__: Any) -> Tensor:
        """Multiplies each example with a kernel of its own."""
        return _each(x, _mix(self.kernel, routing_weights, x.dtype), tf.matmul)


_LOOPS = {
    CondConv2D: LoopedConv2D,
    DepthwiseCondConv2D: LoopedDepthwiseConv2D,
    CondDense: LoopedDense,
}
