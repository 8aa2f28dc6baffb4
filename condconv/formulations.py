"""The ways to convolve each example with its own kernel; ``condconv.ops`` picks one of them.

Each maps x (B, H, W, in), kernels (B, kh, kw, in, filters or m) and a geometry to (B, H', W', …).
All give the same result, and cost differently.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from keras import ops

from condconv.normalization import at_least_float32

Tensor = Any
Pair = tuple[int, int]
Convolution = Callable[[Tensor, Tensor, "Geometry"], Tensor]

# More convolutions than this are not put into one graph: examples are folded into fewer.
MOST_CONVOLUTIONS = 32


class Geometry(NamedTuple):
    """The window of a convolution.

    Attributes:
        strides: of height and width.
        padding: "valid" or "same" (TensorFlow's: the odd zero goes behind).
        dilation_rate: of height and width.
    """

    strides: Pair = (1, 1)
    padding: str = "valid"
    dilation_rate: Pair = (1, 1)


def matmul_of_experts(routing_weights: Tensor, experts: Tensor) -> Tensor:
    """TensorFlow's product of (B, n) and (n, P), with a faster gradient of the routing weights.

    That is a product of two very wide matrices, (B, P) and (P, n), for which TensorFlow's batched
    operation takes half the time of the one for matrices.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def run(routing_weights: Tensor, experts: Tensor) -> tuple[Tensor, Callable]:
        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor]:
            of_routing = tf.matmul(upstream[None], experts[None], transpose_b=True)[0]
            # Whoever updates the experts has to copy them while somebody still reads them.
            with tf.control_dependencies([of_routing]):
                of_experts = tf.matmul(routing_weights, upstream, transpose_a=True)
            return of_routing, of_experts

        return tf.matmul(routing_weights, experts), gradient

    return run(routing_weights, experts)


def matmul(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A 1×1 convolution is a product of matrices, positions by channels by filters."""
    if geometry.strides != (1, 1):
        x = x[:, :: geometry.strides[0], :: geometry.strides[1]]
    batch, height, width, channels = ops.shape(x)
    filters = kernels.shape[-1]
    y = ops.matmul(
        ops.reshape(x, (batch, height * width, channels)),
        ops.reshape(kernels, (-1, channels, filters)),
    )
    return ops.reshape(y, (batch, height, width, filters))


def patches(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A convolution is a 1×1 convolution of patches, which hold all that a window sees.

    These come from TensorFlow's operation; Keras' own convolves with an identity matrix.
    """
    import tensorflow as tf

    seen = tf.image.extract_patches(
        x,
        sizes=(1, *kernels.shape[1:3], 1),
        strides=(1, *geometry.strides, 1),
        rates=(1, *geometry.dilation_rate, 1),
        padding=geometry.padding.upper(),
    )
    return matmul(seen, kernels, Geometry())


def shifts(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The same with patches put together from shifted inputs."""
    kernel_size = tuple(kernels.shape[1:3])
    taps = _taps(pad(x, kernel_size, geometry), kernel_size, geometry)
    return matmul(ops.concatenate(list(taps), axis=-1), kernels, Geometry())


def loop(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A convolution for each example, all of them in the graph."""
    examples = zip(ops.split(x, x.shape[0]), ops.split(kernels, x.shape[0]), strict=True)
    return ops.concatenate([_convolve(a, kernel[0], geometry) for a, kernel in examples])


def map_examples(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A convolution in TensorFlow's graph, which runs for one example after the other."""
    import tensorflow as tf

    def convolve(example: tuple[Tensor, Tensor]) -> Tensor:
        image, kernel = example
        return _convolve(image[None], kernel, geometry)[0]

    return tf.map_fn(convolve, (x, kernels), fn_output_signature=x.dtype)


def _convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    return ops.conv(x, kernel, **geometry._asdict(), data_format="channels_last")


def depthwise_plain(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The backend's own depthwise convolution, with the one kernel in ``kernels``."""
    return ops.depthwise_conv(x, kernels[0], **geometry._asdict(), data_format="channels_last")


def depthwise_loop(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A depthwise convolution for each example, or for an equal share of a larger batch."""
    batch = x.shape[0]
    count = max(n for n in range(1, min(batch, MOST_CONVOLUTIONS) + 1) if batch % n == 0)
    convolve = depthwise_plain if count == batch else depthwise_folding
    shares = zip(ops.split(x, count), ops.split(kernels, count), strict=True)
    return ops.concatenate([convolve(share, kernel, geometry) for share, kernel in shares])


def depthwise_folding(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """One depthwise convolution of one image, whose channels are those of all examples."""
    if geometry.dilation_rate != (1, 1):  # TensorFlow pads these for known numbers of channels
        x = pad(x, tuple(kernels.shape[1:3]), geometry)
        geometry = geometry._replace(padding="valid")
    batch, height, width, channels = ops.shape(x)
    _, kernel_height, kernel_width, _, multiplier = ops.shape(kernels)
    all_channels = batch * channels
    folded = ops.reshape(ops.transpose(x, (1, 2, 0, 3)), (1, height, width, all_channels))
    kernel = ops.reshape(
        ops.transpose(kernels, (1, 2, 0, 3, 4)),
        (1, kernel_height, kernel_width, all_channels, multiplier),
    )
    # TensorFlow has no convolution without channels, so an empty batch gets one, to drop again.
    # Padding and slicing (by `slice`, not by brackets) that change nothing copy nothing.
    empty = int(batch == 0) if isinstance(batch, int) else ops.cast(ops.equal(batch, 0), "int32")
    folded = ops.pad(folded, [(0, 0), (0, 0), (0, 0), (0, empty)])
    kernel = ops.pad(kernel, [(0, 0), (0, 0), (0, 0), (0, empty), (0, 0)])
    y = depthwise_plain(folded, kernel, geometry)
    new_height, new_width = ops.shape(y)[1:3]
    y = ops.slice(y, (0, 0, 0, 0), (1, new_height, new_width, all_channels * multiplier))
    y = ops.reshape(y, (new_height, new_width, batch, channels * multiplier))
    return ops.transpose(y, (2, 0, 1, 3))


def depthwise_taps(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The sum over the kernel's positions of the shifted input times one coefficient each.

    ``kernels`` may be (1, kh, kw, in, m): one kernel for all examples. Nothing has more than five
    dimensions, the most that LiteRT can slice.
    """
    height, width, channels, multiplier = kernels.shape[1:]
    coefficients = ops.reshape(kernels, (-1, height * width, 1, 1, channels * multiplier))
    x = pad(x, (height, width), geometry)
    if multiplier > 1:
        x = ops.repeat(x, multiplier, axis=-1)
    taps = _taps(x, (height, width), geometry)
    return sum(tap * coefficients[:, position] for position, tap in enumerate(taps))


def depthwise_loop_conv_gradient(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The loop, in the gradient too."""
    return _with_conv_gradient(depthwise_loop, depthwise_loop, x, kernels, geometry)


def depthwise_folding_conv_gradient(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Folding, in the gradient too."""
    return _with_conv_gradient(depthwise_folding, depthwise_folding, x, kernels, geometry)


def depthwise_plain_conv_gradient(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The backend's convolution with the one kernel in ``kernels``, in the gradient too."""
    of_each = depthwise_loop if x.shape[0] else depthwise_folding
    return _with_conv_gradient(depthwise_plain, of_each, x, kernels, geometry)


def _with_conv_gradient(
    convolve: Convolution, of_each: Convolution, x: Tensor, kernels: Tensor, geometry: Geometry
) -> Tensor:
    """Convolves on TensorFlow, with a gradient of two forward convolutions.

    With zeros put between its values as the strides ask, the output's gradient convolved with the
    flipped kernel is the gradient of the input; the input convolved with it, that of the kernel.

    Args:
        convolve: examples with ``kernels``.
        of_each: examples with a kernel each.
        x, kernels, geometry: without dilation, and with a depth multiplier of 1.
    """
    import tensorflow as tf

    def gradient(x: Tensor, kernels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        spread = _spread(upstream, geometry.strides)
        around, *of_x = zip(*_margins(x, kernels, spread, geometry), strict=True)
        flipped = ops.flip(kernels, (1, 2))
        of_input = convolve(ops.pad(spread, [(0, 0), *around, (0, 0)]), flipped, Geometry())
        seen = _window(x, *of_x)
        of_kernels = of_each(seen, ops.expand_dims(spread, -1), Geometry())
        return of_input, _sum_to(ops.expand_dims(of_kernels, -1), kernels)

    @tf.custom_gradient
    def run(x: Tensor, kernels: Tensor) -> tuple[Tensor, Callable]:
        return convolve(x, kernels, geometry), lambda upstream: gradient(x, kernels, upstream)

    return run(x, kernels)


def _margins(x: Tensor, kernels: Tensor, spread: Tensor, geometry: Geometry) -> Iterator[tuple]:
    """Yields for each axis the zeros around ``spread``, and where x begins and how far it goes."""
    for axis in (0, 1):
        size, length = ops.shape(x)[axis + 1], ops.shape(spread)[axis + 1]
        kernel, stride = kernels.shape[axis + 1], geometry.strides[axis]
        same = geometry.padding == "same"
        before = _same_padding(size, kernel, stride, 1)[0] if same else 0
        yield (kernel - 1 - before, size + before - length), before, length + kernel - 1


def _window(x: Tensor, before: Pair, lengths: Pair) -> Tensor:
    """Returns x with ``before`` zeros in front, and behind as many that it has ``lengths``."""
    missing = [
        (b, ops.maximum(length - b - size, 0))
        for b, length, size in zip(before, lengths, ops.shape(x)[1:3], strict=True)
    ]
    return ops.pad(x, [(0, 0), *missing, (0, 0)])[:, : lengths[0], : lengths[1]]


def _spread(x: Tensor, strides: Pair) -> Tensor:
    """Puts strides − 1 zeros between neighbours."""
    if strides == (1, 1):
        return x
    batch, height, width, channels = ops.shape(x)
    x = ops.reshape(x, (batch, height, 1, width, 1, channels))
    x = ops.pad(x, [(0, 0), (0, 0), (0, strides[0] - 1), (0, 0), (0, strides[1] - 1), (0, 0)])
    x = ops.reshape(x, (batch, height * strides[0], width * strides[1], channels))
    return x[:, : (height - 1) * strides[0] + 1, : (width - 1) * strides[1] + 1]


def _sum_to(gradients: Tensor, kernels: Tensor) -> Tensor:
    """Sums the gradients of all examples if they share one kernel."""
    if kernels.shape[0] != 1:
        return gradients
    precise = ops.cast(gradients, at_least_float32(gradients.dtype))
    return ops.cast(ops.sum(precise, axis=0, keepdims=True), gradients.dtype)


def pad(x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
    """Adds the zeros of the padding, so that the convolution that follows is a valid one."""
    if geometry.padding == "valid":
        return x
    pads = [
        _same_padding(size, k, s, d)
        for size, k, s, d in zip(
            ops.shape(x)[1:3], kernel_size, geometry.strides, geometry.dilation_rate, strict=True
        )
    ]
    return ops.pad(x, [(0, 0), *pads, (0, 0)])


def _same_padding(size: int | Tensor, kernel: int, stride: int, dilation: int) -> Pair:
    """Zeros before and behind one axis; ``size`` is a tensor where it is not known yet."""
    span = (kernel - 1) * dilation + 1
    if stride == 1:
        total = span - 1
    else:
        # Of positive numbers alone: the division that ONNX has rounds negative ones up.
        total = (size - 1) // stride * stride + span - size
        total = max(total, 0) if isinstance(size, int) else ops.maximum(total, 0)
    return total // 2, total - total // 2


def _taps(x: Tensor, kernel_size: Pair, geometry: Geometry) -> Iterator[Tensor]:
    """Yields, in the order of the kernel's positions, what each of them sees of a padded input."""
    rows, columns = (
        _windows(k, s, d)
        for k, s, d in zip(kernel_size, geometry.strides, geometry.dilation_rate, strict=True)
    )
    for row in rows:
        for column in columns:
            yield x[:, row, column]


def _windows(kernel: int, stride: int, dilation: int) -> list[slice]:
    """The slices of one axis, one for each position of the kernel, all of the same length."""
    reach = (kernel - 1) * dilation
    return [
        slice(offset, offset - reach or None, stride) for offset in range(0, reach + 1, dilation)
    ]
