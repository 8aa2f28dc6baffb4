"""Conditional layers in plain float64 numpy, forward and backward: what the real ones must equal.

Written for being right rather than fast: loops over the examples, the experts and the positions of
the kernel, and nothing shared with the package under test. Channels come last. Every backward
function takes the forward's arguments and the gradient of the output, and returns the gradients of
the inputs, the routing weights, the experts and their biases.
"""

import numpy as np

Array = np.ndarray
Pair = tuple[int, int]
Gradients = tuple[Array, Array, Array, Array]


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    """TensorFlow's rule: the output has ceil(size / stride) pixels, the odd zero goes behind."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _padded(
    image: Array, kernel_size: Pair, strides: Pair, padding: str, dilation: Pair
) -> tuple[Array, Pair, Pair]:
    """Returns the padded image, the zeros put before each axis, and the size of the output."""
    pads = [(0, 0), (0, 0)]
    if padding == "same":
        axes = zip(image.shape[:2], kernel_size, strides, dilation, strict=True)
        pads = [same_padding(*axis) for axis in axes]
    image = np.pad(image, [*pads, (0, 0)])
    height, width = (
        (image.shape[a] - (kernel_size[a] - 1) * dilation[a] - 1) // strides[a] + 1 for a in (0, 1)
    )
    return image, (pads[0][0], pads[1][0]), (height, width)


def _seen_by(position: Pair, size: Pair, strides: Pair, dilation: Pair) -> tuple[slice, slice]:
    """The pixels of the padded image that meet one position of the kernel."""
    return tuple(
        slice(p * d, p * d + (n - 1) * s + 1, s)
        for p, n, s, d in zip(position, size, strides, dilation, strict=True)
    )


def mix(experts: Array, weights: Array) -> Array:
    """Sums the experts with the weights of one example."""
    mixture = np.zeros(experts.shape[1:])
    for expert, weight in zip(experts, weights, strict=True):
        mixture += weight * expert
    return mixture


def _backward_of_mix(experts: Array, weights: Array, gradient: Array) -> tuple[Array, Array]:
    """The gradients of the experts and of the weights of one example."""
    return (
        np.stack([weight * gradient for weight in weights]),
        np.array([np.sum(expert * gradient) for expert in experts]),
    )


def conv2d(
    x: Array,
    routing: Array,
    experts: Array,
    biases: Array,
    strides: Pair,
    padding: str,
    dilation: Pair,
) -> Array:
    """(B, H, W, in), (B, n), (n, kh, kw, in, filters), (n, filters) -> (B, H', W', filters)."""
    rows, columns = experts.shape[1:3]
    outputs = []
    for image, weights in zip(x, routing, strict=True):
        kernel = mix(experts, weights)
        padded, _, size = _padded(image, (rows, columns), strides, padding, dilation)
        y = np.zeros((*size, kernel.shape[-1])) + mix(biases, weights)
        for i in range(rows):
            for j in range(columns):
                seen = padded[_seen_by((i, j), size, strides, dilation)]
                y += np.einsum("hwc,cf->hwf", seen, kernel[i, j])
        outputs.append(y)
    return np.stack(outputs)


def conv2d_backward(
    x: Array,
    routing: Array,
    experts: Array,
    biases: Array,
    strides: Pair,
    padding: str,
    dilation: Pair,
    gradient: Array,
) -> Gradients:
    """The gradients of ``conv2d``."""
    rows, columns = experts.shape[1:3]
    d_x, d_routing = np.zeros(x.shape), np.zeros(routing.shape)
    d_experts, d_biases = np.zeros(experts.shape), np.zeros(biases.shape)
    for b, (image, weights, g) in enumerate(zip(x, routing, gradient, strict=True)):
        kernel = mix(experts, weights)
        padded, (top, left), size = _padded(image, (rows, columns), strides, padding, dilation)
        d_padded, d_kernel = np.zeros(padded.shape), np.zeros(kernel.shape)
        for i in range(rows):
            for j in range(columns):
                seen = _seen_by((i, j), size, strides, dilation)
                d_padded[seen] += np.einsum("hwf,cf->hwc", g, kernel[i, j])
                d_kernel[i, j] = np.einsum("hwc,hwf->cf", padded[seen], g)
        d_x[b] = d_padded[top : top + image.shape[0], left : left + image.shape[1]]
        for_experts, for_weights = _backward_of_mix(experts, weights, d_kernel)
        for_biases, for_weights_too = _backward_of_mix(biases, weights, g.sum((0, 1)))
        d_experts += for_experts
        d_biases += for_biases
        d_routing[b] = for_weights + for_weights_too
    return d_x, d_routing, d_experts, d_biases


def depthwise_conv2d(
    x: Array,
    routing: Array,
    experts: Array,
    biases: Array,
    strides: Pair,
    padding: str,
    dilation: Pair,
) -> Array:
    """(B, H, W, in), (B, n), (n, kh, kw, in, m), (n, in * m) -> (B, H', W', in * m)."""
    _, rows, columns, channels, multiplier = experts.shape
    outputs = []
    for image, weights in zip(x, routing, strict=True):
        kernel = mix(experts, weights)
        padded, _, size = _padded(image, (rows, columns), strides, padding, dilation)
        y = np.zeros((*size, channels * multiplier)) + mix(biases, weights)
        for i in range(rows):
            for j in range(columns):
                seen = padded[_seen_by((i, j), size, strides, dilation)]
                for c in range(channels):
                    for m in range(multiplier):
                        y[..., c * multiplier + m] += seen[..., c] * kernel[i, j, c, m]
        outputs.append(y)
    return np.stack(outputs)


def depthwise_conv2d_backward(
    x: Array,
    routing: Array,
    experts: Array,
    biases: Array,
    strides: Pair,
    padding: str,
    dilation: Pair,
    gradient: Array,
) -> Gradients:
    """The gradients of ``depthwise_conv2d``."""
    _, rows, columns, channels, multiplier = experts.shape
    d_x, d_routing = np.zeros(x.shape), np.zeros(routing.shape)
    d_experts, d_biases = np.zeros(experts.shape), np.zeros(biases.shape)
    for b, (image, weights, g) in enumerate(zip(x, routing, gradient, strict=True)):
        kernel = mix(experts, weights)
        padded, (top, left), size = _padded(image, (rows, columns), strides, padding, dilation)
        d_padded, d_kernel = np.zeros(padded.shape), np.zeros(kernel.shape)
        for i in range(rows):
            for j in range(columns):
                seen = _seen_by((i, j), size, strides, dilation)
                for c in range(channels):
                    for m in range(multiplier):
                        of_output = g[..., c * multiplier + m]
                        d_padded[seen][..., c] += of_output * kernel[i, j, c, m]
                        d_kernel[i, j, c, m] = np.sum(of_output * padded[seen][..., c])
        d_x[b] = d_padded[top : top + image.shape[0], left : left + image.shape[1]]
        for_experts, for_weights = _backward_of_mix(experts, weights, d_kernel)
        for_biases, for_weights_too = _backward_of_mix(biases, weights, g.sum((0, 1)))
        d_experts += for_experts
        d_biases += for_biases
        d_routing[b] = for_weights + for_weights_too
    return d_x, d_routing, d_experts, d_biases


def dense(x: Array, routing: Array, experts: Array, biases: Array) -> Array:
    """(B, ..., in), (B, n), (n, in, units), (n, units) -> (B, ..., units)."""
    return np.stack(
        [
            example @ mix(experts, weights) + mix(biases, weights)
            for example, weights in zip(x, routing, strict=True)
        ]
    )


def dense_backward(
    x: Array, routing: Array, experts: Array, biases: Array, gradient: Array
) -> Gradients:
    """The gradients of ``dense``."""
    d_x, d_routing = np.zeros(x.shape), np.zeros(routing.shape)
    d_experts, d_biases = np.zeros(experts.shape), np.zeros(biases.shape)
    for b, (example, weights, g) in enumerate(zip(x, routing, gradient, strict=True)):
        d_x[b] = g @ mix(experts, weights).T
        rows, g_rows = example.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        for_experts, for_weights = _backward_of_mix(experts, weights, rows.T @ g_rows)
        for_biases, for_weights_too = _backward_of_mix(biases, weights, g_rows.sum(0))
        d_experts += for_experts
        d_biases += for_biases
        d_routing[b] = for_weights + for_weights_too
    return d_x, d_routing, d_experts, d_biases


def routing(x: Array, kernel: Array, bias: Array, activation: str) -> Array:
    """(B, H, W, C) or (B, C), (C, n), (n,) -> (B, n), with "sigmoid" or "softmax"."""
    logits = _pooled(x) @ kernel + bias
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def routing_backward(
    x: Array, kernel: Array, bias: Array, activation: str, gradient: Array
) -> tuple[Array, Array, Array]:
    """The gradients of the inputs, the kernel and the bias of ``routing``."""
    weights = routing(x, kernel, bias, activation)
    if activation == "sigmoid":
        d_logits = gradient * weights * (1 - weights)
    else:
        d_logits = weights * (gradient - np.sum(gradient * weights, -1, keepdims=True))
    d_pooled = d_logits @ kernel.T
    d_x = np.array(d_pooled)
    if x.ndim == 4:
        pixels = x.shape[1] * x.shape[2]
        d_x = np.broadcast_to(d_pooled[:, None, None] / pixels, x.shape).copy()
    return d_x, _pooled(x).T @ d_logits, d_logits.sum(0)


def _pooled(x: Array) -> Array:
    return x.mean((1, 2)) if x.ndim == 4 else x
