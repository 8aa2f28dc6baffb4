"""Conditional layers to test, what they are compared with, and how far two results are apart."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np
import numpy_reference as reference
import pytest

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D

Array = np.ndarray
Layer = keras.layers.Layer

BACKEND = keras.backend.backend()
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow alone")

# JAX runs the matrix compiled, as Keras' trainer does; its eager mode compiles each operation for
# each shape on its own, and meets the layers in every other test.
MODES = ("eager", "function", "jit") if BACKEND == "tensorflow" else ("jit",)
TRAINING = (True, False) if BACKEND == "tensorflow" else (True,)  # JAX computes both alike
DTYPES = ("float32", "bfloat16", "float16")

# Relative to the largest number of the reference. Float32: some hundred products of rounding
# 6e-8 each, in any order; a gradient sums over batch and positions on top. Bfloat16 rounds by up
# to 2^-9 = 2e-3 at every operation that is not fused, and the taps add up to 25 rounded products
# with rounded sums. Float16 runs the same operations and rounds eight times finer. A wrong tap,
# pad, expert or missing term is off by far more.
FORWARD = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
GRADIENT = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
if BACKEND == "jax":
    # JAX sums the gradient of a bias over up to 108 pixels in bfloat16 itself.
    GRADIENT["bfloat16"] = 6e-2


def mostly_slow(cases: Iterable[Any], one_in: int = 2) -> list[Any]:
    """Marks all but one case in so many as slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.slow] if i % one_in else [],
        )
        for i, case in enumerate(cases)
    ]


def slow_on_jax(cases: Iterable[Any], one_in: int = 2) -> list[Any]:
    """The same on JAX only, which compiles each eager operation for each shape."""
    return mostly_slow(cases, one_in if BACKEND == "jax" else 1)


def policy(dtype: str) -> str:
    return dtype if dtype == "float32" else f"mixed_{dtype}"


def to_numpy(tensor: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype("float64")


def dtype_of(tensor: Any) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected number."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape
    assert np.all(np.isfinite(actual))
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def numbers(*shape: int, seed: int = 0, mean: float = 0.0, dtype: str = "float32") -> Array:
    """Normal numbers that ``dtype`` holds exactly, in float32."""
    drawn = np.random.default_rng((seed, *shape)).normal(mean, 1.0, shape)
    return drawn.astype(dtype).astype("float32")


def mixture_of(batch: int, experts: int, seed: int = 0, dtype: str = "float32") -> Array:
    """Routing weights between 0 and 1, as a sigmoid gives them."""
    drawn = np.random.default_rng((seed, batch, experts)).uniform(0.05, 0.95, (batch, experts))
    return drawn.astype(dtype).astype("float32")


CHANNELS, OUT = 3, 4
LAYERS = ("conv", "depthwise", "dense")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class Case:
    layer: str
    experts: int
    batch: int
    size: tuple[int, ...]
    dtype: str
    mode: str
    training: bool = True
    kernel: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    padding: str = "same"
    multiplier: int = 1

    def __str__(self) -> str:
        def short(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        window = ""
        if self.layer != "dense":
            window = (
                f"-k{short(self.kernel)}-s{short(self.stride)}-d{short(self.dilation)}"
                f"-m{self.multiplier}-{self.padding}"
            )
        return (
            f"{self.layer}{window}-n{self.experts}-b{self.batch}-{short(self.size)}"
            f"-{self.dtype}-{self.mode}-{'training' if self.training else 'inference'}"
        )

    @property
    def geometry(self) -> tuple:
        return pair(self.stride), self.padding, pair(self.dilation)

    def make(self) -> Layer:
        if self.layer == "dense":
            return CondDense(OUT, self.experts, dtype=policy(self.dtype))
        window = {
            "kernel_size": self.kernel,
            "strides": self.stride,
            "padding": self.padding,
            "dilation_rate": self.dilation,
            "num_experts": self.experts,
            "dtype": policy(self.dtype),
        }
        if self.layer == "conv":
            return CondConv2D(OUT, **window)
        return DepthwiseCondConv2D(depth_multiplier=self.multiplier, **window)


def forward_and_gradients(
    layer: Layer, x: Array, routing: Array, gradient: Array, mode: str, training: bool
) -> tuple[Any, list[Any]]:
    """The output, and the gradients of the inputs, the routing weights and the layer's weights."""
    weights = [weight.value for weight in layer.trainable_weights]
    if BACKEND == "jax":
        import jax

        def run(x: Any, routing: Any, gradient: Any, weights: list[Any]) -> tuple:
            def forward(x: Any, routing: Any, weights: list[Any]) -> Any:
                others = [v.value for v in layer.non_trainable_variables]
                return layer.stateless_call(weights, others, x, routing, training=training)[0]

            y, backward = jax.vjp(forward, x, routing, weights)
            d_x, d_routing, d_weights = backward(gradient.astype(y.dtype))
            return y, [d_x, d_routing, *d_weights]

        run = jax.jit(run) if mode == "jit" else run
        return run(*map(jax.numpy.asarray, (x, routing, gradient)), weights)

    import tensorflow as tf

    def run(x: tf.Tensor, routing: tf.Tensor, gradient: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            tape.watch((x, routing))
            y = layer(x, routing, training=training)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * gradient)
        return y, tape.gradient(loss, [x, routing, *weights])

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "jit")
    return run(*map(tf.constant, (x, routing, gradient)))


def check(case: Case) -> None:
    """Compares a layer with the reference, whose inputs are those of the layer, not rounded."""
    layer = case.make()
    channels = (OUT if case.layer == "dense" else CHANNELS,)
    # Means away from zero keep the sums from cancelling: a gradient that happens to be tiny says
    # nothing about a relative error.
    x = numbers(case.batch, *case.size, *channels, seed=1, mean=0.5, dtype=case.dtype)
    routing = mixture_of(case.batch, case.experts, dtype=case.dtype)
    layer.build(x.shape, routing.shape)
    assert [weight.name for weight in layer.trainable_weights] == ["kernel", "bias"]
    for weight in layer.trainable_weights:
        weight.assign(numbers(*weight.shape, seed=2, mean=0.2, dtype=case.dtype))
    experts, biases = map(to_numpy, layer.trainable_weights)
    geometry = () if case.layer == "dense" else case.geometry
    forward = {
        "conv": reference.conv2d,
        "depthwise": reference.depthwise_conv2d,
        "dense": reference.dense,
    }[case.layer]
    backward = getattr(reference, f"{forward.__name__}_backward")
    arguments = (to_numpy(x), to_numpy(routing), experts, biases, *geometry)
    expected = forward(*arguments)
    gradient = numbers(*expected.shape, seed=3, mean=0.5, dtype=case.dtype)
    expected_gradients = backward(*arguments, to_numpy(gradient))

    y, gradients = forward_and_gradients(layer, x, routing, gradient, case.mode, case.training)

    assert dtype_of(y) == case.dtype
    assert layer.compute_output_shape(x.shape) == tuple(y.shape)
    assert layer.compute_output_shape((None, *x.shape[1:]))[1:] == tuple(y.shape)[1:]
    assert error(y, expected) <= FORWARD[case.dtype], case
    for name, actual, wanted in zip(
        ("inputs", "routing weights", "kernel", "bias"), gradients, expected_gradients, strict=True
    ):
        assert dtype_of(actual) == "float32", (name, case)
        assert error(actual, wanted) <= GRADIENT[case.dtype], (name, case)


class Ignoring(keras.layers.Layer):
    """Calls a built layer with the first of its two arguments only."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer
        self.built = True

    def call(self, x: Any, ignored: Any, training: bool | None = None) -> Any:
        return self.layer(x) + 0 * ignored[:, :1]


def make(layer: str, experts: int = 4, **kwargs: Any) -> Layer:
    if layer == "conv":
        return CondConv2D(OUT, 3, experts, **{"padding": "same", **kwargs})
    if layer == "depthwise":
        return DepthwiseCondConv2D(
            3, experts, **{"padding": "same", "depth_multiplier": 2, **kwargs}
        )
    return CondDense(OUT, experts, **kwargs)


def inputs_of(layer: str, batch: int = 3, seed: int = 1) -> Array:
    return numbers(*((batch, CHANNELS) if layer == "dense" else (batch, 5, 4, CHANNELS)), seed=seed)


def built(layer: str, experts: int = 4, **kwargs: Any) -> Layer:
    """A layer with random weights that expects routing weights."""
    instance = make(layer, experts, **kwargs)
    instance.build(inputs_of(layer).shape, (None, experts))
    for i, weight in enumerate(instance.weights):
        weight.assign(numbers(*weight.shape, seed=i))
    return instance


DILATED = {"kernel_size": 3, "dilation_rate": 2, "padding": "same"}
GEOMETRIES = [
    (layer, window)
    for layer in ("conv", "depthwise")
    for window in (
        {"kernel_size": 3, "strides": 2, "padding": "same"},
        {"kernel_size": 5, "padding": "same"},
        {"kernel_size": 3, "dilation_rate": 2, "padding": "valid"},
        {"kernel_size": 1, "strides": 2, "padding": "valid"},
        {"kernel_size": (2, 3), "strides": (1, 2), "padding": "same"},
    )
]


def windowed(layer: str, window: dict[str, Any], **kwargs: Any) -> Layer:
    if layer == "conv":
        return CondConv2D(OUT, num_experts=2, **window, **kwargs)
    return DepthwiseCondConv2D(num_experts=2, depth_multiplier=2, **window, **kwargs)


def sequential() -> keras.Model:
    """Layers that route for themselves, one after the other."""
    layers = [make("conv"), make("depthwise"), keras.layers.GlobalAveragePooling2D(), make("dense")]
    return keras.Sequential(layers)
