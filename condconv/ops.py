"""Convolutions whose kernel differs from example to example.

Everything here is channels-last and stateless, and works with a batch of any size, known or not.
The experts are mixed first and each example is convolved once with its own kernel: that is what
keeps a CondConv at the cost of one convolution (arXiv:1904.04971, section 3).

Shapes use B for the batch, n for the experts, m for the depth multiplier.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from condconv.normalization import at_least_float32

Tensor = Any
Pair = tuple[int, int]

# A depthwise convolution that holds the batch in its channels loses to the compiled taps in
# training when the map is smaller than this: its gradient grows with the number of channels.
_SMALLEST_FOLDED_MAP = 4 * 4


def mix(experts: Tensor, routing_weights: Tensor) -> Tensor:
    """Sums experts (n, …) with weights (B, n) into one kernel an example (B, …).

    The sum is taken in the experts' own precision and at least in float32, whatever that of the
    activations.
    """
    dtype = at_least_float32(experts.dtype)
    flat = ops.cast(ops.reshape(experts, (experts.shape[0], -1)), dtype)
    mixed = ops.matmul(ops.cast(routing_weights, dtype), flat)
    return ops.reshape(mixed, (-1, *experts.shape[1:]))


def dense(x: Tensor, experts: Tensor, routing_weights: Tensor) -> Tensor:
    """Applies to each example the mixture of dense kernels.

    Nothing is shared between the positions of a dense layer, so mixing first would write B
    kernels to use each once. Σ r_e (x W_e) = (r ⊗ x) W needs none: one matrix product.

    Args:
        x: (B, …, in).
        experts: (n, in, units).
        routing_weights: (B, n).

    Returns:
        (B, …, units), in the dtype of ``x``.
    """
    num_experts, channels, units = experts.shape
    weights = ops.cast(routing_weights, x.dtype)
    weights = ops.reshape(weights, (-1, *(1,) * (len(x.shape) - 2), num_experts, 1))
    outer = weights * ops.expand_dims(x, -2)
    outer = ops.reshape(outer, (*ops.shape(x)[:-1], num_experts * channels))
    return ops.matmul(outer, ops.cast(ops.reshape(experts, (-1, units)), x.dtype))


def conv2d(x: Tensor, kernels: Tensor, strides: Pair, padding: str, dilation_rate: Pair) -> Tensor:
    """Convolves each example with its own kernel.

    Args:
        x: (B, H, W, in).
        kernels: (B, kh, kw, in, filters), in the dtype of ``x``.
        strides: of height and width.
        padding: "valid" or "same" (TensorFlow's: the odd zero goes behind).
        dilation_rate: of height and width.

    Returns:
        (B, H', W', filters).
    """
    kernel_size = tuple(kernels.shape[1:3])
    x = _pad(x, kernel_size, strides, padding, dilation_rate)
    # A convolution is a matrix product over patches, and a 1×1 patch is the pixel itself.
    patches = list(_taps(x, kernel_size, strides, dilation_rate))
    x = patches[0] if len(patches) == 1 else ops.concatenate(patches, axis=-1)
    batch, height, width, channels = ops.shape(x)
    filters = kernels.shape[-1]
    y = ops.matmul(
        ops.reshape(x, (batch, height * width, channels)),
        ops.reshape(kernels, (-1, channels, filters)),
    )
    return ops.reshape(y, (batch, height, width, filters))


def depthwise_conv2d(
    x: Tensor,
    kernels: Tensor,
    strides: Pair,
    padding: str,
    dilation_rate: Pair,
    training: bool = False,
) -> Tensor:
    """Convolves each channel of each example with its own kernel.

    Args:
        x: (B, H, W, in).
        kernels: (B, kh, kw, in, m), in the dtype of ``x``.
        strides: of height and width.
        padding: "valid" or "same" (TensorFlow's: the odd zero goes behind).
        dilation_rate: of height and width.
        training: whether a gradient will be asked for; it decides the formulation only.

    Returns:
        (B, H', W', in · m).
    """
    form = _depthwise_formulation(x, strides, training)
    return form(x, kernels, strides, padding, dilation_rate)


def _depthwise_formulation(x: Tensor, strides: Pair, training: bool) -> Callable[..., Tensor]:
    """The one place that picks how a depthwise convolution is computed."""
    if _in_xla():
        return _depthwise_by_taps  # XLA fuses the taps into one loop; its convolution is slow
    height, width = x.shape[1:3]
    small = None not in (height, width) and height * width < _SMALLEST_FOLDED_MAP
    if training and small:
        return _compiled_taps()
    if strides[0] != strides[1]:
        return _depthwise_by_taps  # the folded form rests on an operation with equal strides
    return _depthwise_by_folding


def _depthwise_by_folding(
    x: Tensor, kernels: Tensor, strides: Pair, padding: str, dilation_rate: Pair
) -> Tensor:
    """One depthwise convolution of one image, whose channels are those of all examples."""
    if dilation_rate != (1, 1):  # TensorFlow pads these only for a known number of channels
        kernel_size = tuple(kernels.shape[1:3])
        x, padding = _pad(x, kernel_size, strides, padding, dilation_rate), "valid"
    batch, height, width, channels = ops.shape(x)
    kernel_height, kernel_width, _, multiplier = kernels.shape[1:]
    all_channels = batch * channels
    folded = ops.reshape(ops.transpose(x, (1, 2, 0, 3)), (1, height, width, all_channels))
    kernel = ops.reshape(
        ops.transpose(kernels, (1, 2, 0, 3, 4)),
        (kernel_height, kernel_width, all_channels, multiplier),
    )
    # TensorFlow has no convolution without channels, so an empty batch gets one, to drop again.
    # Padding and slicing (by `slice`, not by brackets) that change nothing copy nothing.
    empty = int(batch == 0) if isinstance(batch, int) else ops.cast(ops.equal(batch, 0), "int32")
    folded = ops.pad(folded, [(0, 0), (0, 0), (0, 0), (0, empty)])
    kernel = ops.pad(kernel, [(0, 0), (0, 0), (0, empty), (0, 0)])
    y = ops.depthwise_conv(
        folded,
        kernel,
        strides=strides,
        padding=padding,
        data_format="channels_last",
        dilation_rate=dilation_rate,
    )
    new_height, new_width = ops.shape(y)[1:3]
    y = ops.slice(y, (0, 0, 0, 0), (1, new_height, new_width, all_channels * multiplier))
    y = ops.reshape(y, (new_height, new_width, batch, channels * multiplier))
    return ops.transpose(y, (2, 0, 1, 3))


def _depthwise_by_taps(
    x: Tensor, kernels: Tensor, strides: Pair, padding: str, dilation_rate: Pair
) -> Tensor:
    """The sum over the kernel's positions of the shifted input times one coefficient each."""
    kernel_size = tuple(kernels.shape[1:3])
    batch, _, _, channels, multiplier = ops.shape(kernels)
    coefficients = ops.reshape(kernels, (batch, *kernel_size, 1, 1, channels, multiplier))
    x = _pad(x, kernel_size, strides, padding, dilation_rate)
    total = 0.0
    for position, tap in enumerate(_taps(x, kernel_size, strides, dilation_rate)):
        row, column = divmod(position, kernel_size[1])
        total = total + ops.expand_dims(tap, -1) * coefficients[:, row, column]
    return ops.reshape(total, (*ops.shape(total)[:3], channels * multiplier))


@functools.cache
def _compiled_taps() -> Callable[..., Tensor]:
    """The taps as one compiled function inside an otherwise uncompiled TensorFlow graph."""
    import tensorflow as tf

    return tf.function(_depthwise_by_taps, jit_compile=True)


def _in_xla() -> bool:
    """Whether what is being traced now will be compiled by XLA as a whole."""
    if keras.backend.backend() == "jax":
        return True
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.ops import control_flow_util
    except ImportError:  # not a public module: without it the uncompiled forms are right, if slow
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _pad(x: Tensor, kernel_size: Pair, strides: Pair, padding: str, dilation_rate: Pair) -> Tensor:
    """Adds the zeros of ``padding``, so that the convolution that follows is a valid one."""
    if padding == "valid" or (kernel_size == (1, 1) and strides == (1, 1)):
        return x
    pads = [
        _same_padding(size, k, s, d)
        for size, k, s, d in zip(
            ops.shape(x)[1:3], kernel_size, strides, dilation_rate, strict=True
        )
    ]
    return ops.pad(x, [(0, 0), *pads, (0, 0)])


def _same_padding(size: int | Tensor, kernel: int, stride: int, dilation: int) -> Pair:
    """Zeros before and behind one axis; ``size`` is a tensor where it is not known yet."""
    span = (kernel - 1) * dilation + 1
    if stride == 1:
        total = span - 1
    else:
        total = (-(-size // stride) - 1) * stride + span - size
        total = max(total, 0) if isinstance(size, int) else ops.maximum(total, 0)
    return total // 2, total - total // 2


def _taps(x: Tensor, kernel_size: Pair, strides: Pair, dilation_rate: Pair):
    """Yields, in the order of the kernel's positions, what each of them sees of a padded input."""
    rows = _windows(kernel_size[0], strides[0], dilation_rate[0])
    columns = _windows(kernel_size[1], strides[1], dilation_rate[1])
    for row in rows:
        for column in columns:
            yield x[:, row, column]


def _windows(kernel: int, stride: int, dilation: int) -> list[slice]:
    """The slices of one axis, one for each position of the kernel, all of the same length."""
    reach = (kernel - 1) * dilation
    return [
        slice(offset, offset - reach or None, stride) for offset in range(0, reach + 1, dilation)
    ]
