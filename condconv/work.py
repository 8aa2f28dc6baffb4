"""What each kind of layer does for one image, in multiply-adds and single operations."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from condconv.depthwise import DepthwiseConv2D
from condconv.layers import CondConv2D, CondDense, DepthwiseCondConv2D, Logits
from condconv.normalization import (
    BatchNormalization,
    BatchNormShift,
    FromBatchNorm,
    PixelNormalization,
)
from condconv.routing import Routing
from condconv.stochastic import Dropout, StochasticDepth

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of a layer does for one image; every rule is a sum over these."""

    convolution: int = 0  # multiply-adds
    dense: int = 0  # multiply-adds
    mixing: int = 0  # multiply-adds
    bias_mixing: int = 0  # multiply-adds
    routing: int = 0  # multiply-adds
    elementwise: int = 0  # additions or multiplications
    routing_elementwise: int = 0  # additions or multiplications

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(sum, zip(*map(dataclasses.astuple, (self, other)), strict=True)))


def _free(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    return Work()


def _elementwise(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    return Work(elementwise=math.prod(output))


def _reduction(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    return Work(elementwise=sum(math.prod(shape) for shape in inputs))


def _combination(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    return Work(elementwise=(len(inputs) - 1) * math.prod(output))


def _pooling(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    return Work(elementwise=math.prod(layer.pool_size) * math.prod(output))


def _activation(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    """Swish multiplies by its gate; TensorFlow's profiler saw nothing in the others."""
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return Work(elementwise=math.prod(output) if name in ("silu", "swish") else 0)


def _with_bias_and_activation(layer: Any, work: Work, output: Shape) -> Work:
    """A bias that a folded batch normalisation left is accounted as what it was: nothing.

    So a folded network has the multiply-adds of the one it was made from, which the paper printed.
    """
    own_bias = layer.use_bias and not isinstance(layer.bias_initializer, FromBatchNorm)
    bias = Work(elementwise=math.prod(output) if own_bias else 0)
    return work + bias + _activation(layer, [], output)


def _convolution(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    """Every output sees one window of the input channels of its group."""
    channels = inputs[0][_channel_axis(layer)] // getattr(layer, "groups", 1)
    work = Work(convolution=math.prod(output) * math.prod(layer.kernel_size) * channels)
    return _with_bias_and_activation(layer, work, output)


def _transposed_convolution(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    work = Work(convolution=math.prod(inputs[0]) * math.prod(layer.kernel_size) * layer.filters)
    return _with_bias_and_activation(layer, work, output)


def _depthwise(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    work = Work(convolution=math.prod(output) * math.prod(layer.kernel_size))
    return _with_bias_and_activation(layer, work, output)


def _separable(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    middle = inputs[0][_channel_axis(layer)] * layer.depth_multiplier
    positions = math.prod(output) // layer.filters
    work = positions * middle * (math.prod(layer.kernel_size) + layer.filters)
    return _with_bias_and_activation(layer, Work(convolution=work), output)


def _dense(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    work = Work(dense=math.prod(output) * inputs[0][-1])
    return _with_bias_and_activation(layer, work, output)


def _mixing(layer: Any) -> Work:
    bias = 0 if layer.bias is None else math.prod(layer.bias.shape)
    return Work(mixing=math.prod(layer.kernel.shape), bias_mixing=bias)


def _routing(layer: Any, inputs: list[Shape], output: Shape) -> Work:
    """The pooling adds up all positions, where there are any."""
    pooled = math.prod(inputs[0]) if len(inputs[0]) == 3 else 0
    dense = sum(math.prod(k.shape) for k in (layer.kernel, layer.hidden_kernel) if k is not None)
    bias = layer.num_experts + layer.hidden_units if layer.use_bias else 0
    return Work(routing=dense, routing_elementwise=pooled + bias)


def _channel_axis(layer: Any) -> int:
    return 0 if layer.data_format == "channels_first" else -1


_LAYERS: dict[type, Callable[[Any, list[Shape], Shape], Work]] = {
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), _convolution),
    **dict.fromkeys(
        (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        _transposed_convolution,
    ),
    **dict.fromkeys((DepthwiseConv2D, layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise),
    **dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), _separable),
    layers.Dense: _dense,
    CondConv2D: lambda layer, i, o: _convolution(layer, i, o) + _mixing(layer),
    DepthwiseCondConv2D: lambda layer, i, o: _depthwise(layer, i, o) + _mixing(layer),
    CondDense: lambda layer, i, o: _dense(layer, i, o) + _mixing(layer),
    Routing: _routing,
    layers.Activation: _activation,
    **dict.fromkeys((layers.Add, layers.Subtract, layers.Multiply, layers.Average), _combination),
    **dict.fromkeys(
        (
            layers.AveragePooling1D,
            layers.AveragePooling2D,
            layers.AveragePooling3D,
            layers.MaxPooling1D,
            layers.MaxPooling2D,
            layers.MaxPooling3D,
        ),
        _pooling,
    ),
    **dict.fromkeys(
        (
            layers.GlobalAveragePooling1D,
            layers.GlobalAveragePooling2D,
            layers.GlobalAveragePooling3D,
            layers.GlobalMaxPooling1D,
            layers.GlobalMaxPooling2D,
            layers.GlobalMaxPooling3D,
        ),
        _reduction,
    ),
    **dict.fromkeys(
        (
            BatchNormShift,
            BatchNormalization,
            Dropout,
            Logits,
            PixelNormalization,
            StochasticDepth,
            layers.AlphaDropout,
            layers.BatchNormalization,
            layers.Concatenate,
            layers.Cropping1D,
            layers.Cropping2D,
            layers.Dropout,
            layers.ELU,
            layers.Flatten,
            layers.GaussianDropout,
            layers.GaussianNoise,
            layers.GroupNormalization,
            layers.Identity,
            layers.InputLayer,
            layers.LayerNormalization,
            layers.LeakyReLU,
            layers.Normalization,
            layers.PReLU,
            layers.Permute,
            layers.ReLU,
            layers.Rescaling,
            layers.Reshape,
            layers.Softmax,
            layers.SpatialDropout1D,
            layers.SpatialDropout2D,
            layers.SpatialDropout3D,
            layers.UpSampling2D,
            layers.ZeroPadding1D,
            layers.ZeroPadding2D,
        ),
        _free,
    ),
}

# Functions of keras.ops used between the layers of a functional model.
_OPERATIONS: dict[str, Callable[[Any, list[Shape], Shape], Work]] = {
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Divide", "Silu"), _elementwise),
    **dict.fromkeys(("Mean", "Sum"), _reduction),
    **dict.fromkeys(
        (
            "Cast",
            "Concatenate",
            "ExpandDims",
            "GetItem",
            "Pad",
            "Relu",
            "Relu6",
            "Reshape",
            "Sigmoid",
            "Softmax",
            "Squeeze",
            "Tanh",
            "Transpose",
        ),
        _free,
    ),
}


# What says what a layer computes: where a subclass has its own, nothing is known of it.
_COMPUTING = ("call", "convolution_op", "apply_experts", "kernel")


def kind(operation: Any) -> type | None:
    """Returns the known layer that computes as ``operation`` does; None where there is none."""
    own = type(operation)
    known = next((kind for kind in own.__mro__ if kind in _LAYERS), None)
    if known is None or any(
        getattr(own, m, None) is not getattr(known, m, None) for m in _COMPUTING
    ):
        return None
    return known


def counter(operation: Any) -> Callable[[Any, list[Shape], Shape], Work] | None:
    """Returns the function that counts calls of ``operation``; None where nothing is known of it.

    It takes the operation, the shapes of its inputs and that of its output, without the batch.
    """
    if not isinstance(operation, keras.Layer):
        return _OPERATIONS.get(type(operation).__name__)
    return _LAYERS.get(kind(operation))


def extras(operation: Any) -> list[str]:
    """Names what ``operation`` does besides that which its kind does and ``counter`` counts.

    A quantised layer does as many multiply-adds, of integers; then there are the scales. LoRA adds
    the product of its two factors to the kernel.
    """
    quantized = getattr(operation, "quantization_mode", None) is not None
    lora = getattr(operation, "lora_enabled", False)
    return ["quantisation"] * quantized + ["LoRA"] * lora
