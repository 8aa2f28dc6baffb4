import ast
import dataclasses
import inspect
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np
import numpy_reference as reference
import pytest
from keras import initializers, regularizers

import condconv.ops as conditional
from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing
from condconv.layers import Logits
from condconv.normalization import BatchNormalization
from condconv.stochastic import Dropout, StochasticDepth

Array = np.ndarray
Layer = keras.layers.Layer
Level = Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
BACKEND = keras.backend.backend()
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow's graphs")

# JAX runs the matrix compiled, as Keras' trainer does; its eager mode compiles each operation for
# each shape on its own, and meets the layers in every other test of this file.
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


# Every combination of two levels, out of a matrix too large to run whole each time.


def pairwise(
    factors: Mapping[str, Sequence[Level]], allowed: Callable[[Mapping[str, Level]], bool]
) -> list[dict[str, Level]]:
    """Rows in which any two levels of two factors meet that ``allowed`` lets meet at all.

    ``allowed`` is asked about unfinished rows too, and accepts those that it cannot judge yet.
    """
    names = list(factors)

    def pairs(row: Mapping[str, Level]) -> Iterable[tuple]:
        return itertools.combinations([(name, row[name]) for name in names if name in row], 2)

    def complete(row: dict[str, Level]) -> dict[str, Level] | None:
        if not allowed(row):
            return None
        name = next((name for name in names if name not in row), None)
        if name is None:
            return row
        options = [{**row, name: level} for level in factors[name]]
        options.sort(key=lambda option: -sum(pair in missing for pair in pairs(option)))
        return next(filter(None, map(complete, options)), None)

    # A dictionary for its order: a set of strings differs from process to process.
    missing = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows = []
    while missing:
        wanted = next(iter(missing))
        row = complete(dict(wanted))
        if row is None:  # these two may not meet
            del missing[wanted]
            continue
        rows.append({name: row[name] for name in names})
        for pair in pairs(row):
            missing.pop(pair, None)
    return rows


def test_pairwise_covers_what_is_allowed_and_nothing_else():
    factors = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2, 3, 4), "d": "xyz"}

    def allowed(row: Mapping[str, Level]) -> bool:
        return not (row.get("a") == 2 and row.get("c") == 4) and not (
            row.get("b") == 1 and row.get("d") == "z"
        )

    rows = pairwise(factors, allowed)
    whole = [
        row
        for levels in itertools.product(*factors.values())
        if allowed(row := dict(zip(factors, levels, strict=True)))
    ]
    assert all(row in whole for row in rows)
    assert len(rows) < len(whole) / 2
    assert {p for row in rows for p in itertools.combinations(row.items(), 2)} == {
        p for row in whole for p in itertools.combinations(row.items(), 2)
    }


# Forward and backward against plain numpy.


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


CHANNELS, OUT = 3, 4

WINDOWS = {"kernel": (1, 3, 5), "stride": (1, 2), "dilation": (1, 2), "padding": ("same", "valid")}
REST = {
    "experts": (1, 5, 32),
    "batch": (1, 3, 5),
    "dtype": DTYPES,
    "mode": MODES,
    "training": TRAINING,
}
# The two smallest maps are below the size at which a depthwise convolution in training leaves
# the compiled taps for the folded form; the others are odd and not square.
SIZES = ((2, 2), (3, 3), (9, 12), (7, 5))
POSITIONS = ((), (5,), (3, 2))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def fits(row: Mapping[str, Level]) -> bool:
    """Whether a convolution may have this geometry, as far as it is known."""
    if row.get("stride", 1) > 1 and row.get("dilation", 1) > 1:
        return False
    if row.get("padding") == "same" or not {"kernel", "dilation", "size"} <= row.keys():
        return True
    return (row["kernel"] - 1) * row["dilation"] < min(row["size"])


SAMPLE = [
    *(Case("conv", **row) for row in pairwise({**WINDOWS, "size": SIZES, **REST}, fits)),
    *(
        Case("depthwise", **row)
        for row in pairwise({**WINDOWS, "size": SIZES, "multiplier": (1, 2), **REST}, fits)
    ),
    *(Case("dense", **row) for row in pairwise({"size": POSITIONS, **REST}, lambda row: True)),
]
UNEQUAL_AXES = [
    Case(layer, 2, 3, (7, 6), "float32", mode, **window)
    for layer in ("conv", "depthwise")
    for mode in MODES
    for window in (
        {"kernel": (3, 5), "stride": (2, 1), "padding": "same"},
        {"kernel": (2, 4), "dilation": (2, 1), "padding": "valid"},
    )
]


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


@pytest.mark.parametrize("case", slow_on_jax(SAMPLE, 3), ids=str)
def test_forward_and_gradients_equal_numpy(case: Case):
    check(case)


@pytest.mark.parametrize("case", slow_on_jax(UNEQUAL_AXES, 4), ids=str)
def test_forward_and_gradients_equal_numpy_where_the_axes_differ(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", WINDOWS["padding"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kernel", WINDOWS["kernel"])
@pytest.mark.parametrize(("layer", "multiplier"), [("conv", 1), ("depthwise", 1), ("depthwise", 2)])
def test_whole_matrix_of_convolutions(
    layer: str,
    multiplier: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: str,
    dtype: str,
    mode: str,
):
    window = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    # In each of these, one example and several, experts of all numbers, and maps of both kinds. XLA
    # has one formulation for all maps, and never gives back the memory maps of what it compiled,
    # some fifty a program: a process that asks for more than Linux grants, 65,530, is killed.
    rows = [(1, 1, (3, 3)), (5, 3, (9, 10)), (32, 3, (3, 3)), (32, 1, (9, 10))]
    if mode == "jit":
        rows = [(1, 3, (9, 10)), (32, 1, (7, 6))]
    rows = [row for row in rows if fits({**window, "size": row[-1]})]
    assert rows
    for experts, batch, size in rows:
        check(Case(layer, experts, batch, size, dtype, mode, multiplier=multiplier, **window))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", POSITIONS, ids=str)
def test_whole_matrix_of_dense(size: tuple[int, ...], dtype: str, mode: str):
    for experts, batch in itertools.product((1, 5, 32), (1, 3, 5)):
        check(Case("dense", experts, batch, size, dtype, mode))


def test_the_sample_meets_every_level():
    for layer in ("conv", "depthwise", "dense"):
        cases = [case for case in SAMPLE if case.layer == layer]
        factors = {**REST, **(WINDOWS if layer != "dense" else {})}
        factors["size"] = POSITIONS if layer == "dense" else SIZES
        for name, levels in factors.items():
            assert {getattr(case, name) for case in cases} == set(levels)
        assert len(cases) < 40


@pytest.mark.parametrize("layer", ["conv2d", "depthwise_conv2d", "dense"])
def test_reference_gradients_equal_differences(layer: str):
    forward = getattr(reference, layer)
    if layer == "dense":
        shapes, geometry = [(2, 3, 4), (2, 3), (3, 4, 5), (3, 5)], ()
    else:
        last = (2, 5) if layer == "conv2d" else (2, 2)
        shapes = [(2, 5, 4, 2), (2, 3), (3, 3, 2, *last), (3, 5 if layer == "conv2d" else 4)]
        geometry = ((2, 1), "same", (1, 2))
    arguments = [to_numpy(numbers(*shape, seed=i)) for i, shape in enumerate(shapes)]
    gradient = to_numpy(numbers(*forward(*arguments, *geometry).shape, seed=9))
    check_by_differences(
        lambda *values: forward(*values, *geometry),
        arguments,
        getattr(reference, f"{layer}_backward")(*arguments, *geometry, gradient),
        gradient,
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 5)], ids=str)
def test_reference_routing_gradients_equal_differences(shape: tuple[int, ...], activation: str):
    arguments = [to_numpy(numbers(*s, seed=i)) for i, s in enumerate((shape, (5, 3), (3,)))]
    gradient = to_numpy(numbers(2, 3, seed=9))
    check_by_differences(
        lambda *values: reference.routing(*values, activation),
        arguments,
        reference.routing_backward(*arguments, activation, gradient),
        gradient,
    )


def check_by_differences(
    forward: Callable[..., Array],
    arguments: list[Array],
    gradients: Sequence[Array],
    gradient: Array,
) -> None:
    """Compares gradients along one random direction for each argument."""
    step = 1e-5
    for i, claimed in enumerate(gradients):
        direction = to_numpy(numbers(*arguments[i].shape, seed=20 + i))
        ends = []
        for sign in (1, -1):
            moved = [*arguments[:i], arguments[i] + sign * step * direction, *arguments[i + 1 :]]
            ends.append(np.sum(forward(*moved) * gradient))
        assert np.sum(claimed * direction) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7
        )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", [(3, 4, 5, CHANNELS), (3, CHANNELS)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_routing_equals_numpy(mode: str, shape: tuple[int, ...], activation: str):
    layer = Routing(4, activation=activation)
    x, gradient = numbers(*shape, seed=1), numbers(3, 4, seed=3)
    layer.build(x.shape)
    for weight in layer.trainable_weights:
        weight.assign(numbers(*weight.shape, seed=2))
    # The harness hands a second argument on, which a routing does not take.
    y, (d_x, _, d_kernel, d_bias) = forward_and_gradients(
        Ignoring(layer), x, np.zeros((3, 1), "float32"), gradient, mode, False
    )
    arguments = (to_numpy(x), *map(to_numpy, layer.trainable_weights))
    assert error(y, reference.routing(*arguments, activation)) <= 1e-5
    expected = reference.routing_backward(*arguments, activation, to_numpy(gradient))
    for actual, wanted in zip((d_x, d_kernel, d_bias), expected, strict=True):
        assert error(actual, wanted) <= 1e-4


class Ignoring(keras.layers.Layer):
    """Calls a built layer with the first of its two arguments only."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer
        self.built = True

    def call(self, x: Any, ignored: Any, training: bool | None = None) -> Any:
        return self.layer(x) + 0 * ignored[:, :1]


@pytest.mark.parametrize("size", [(7, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_gradients_reach_the_inputs_through_a_layers_own_routing(layer: str, size: tuple[int, int]):
    case = Case(layer, 3, 2, size, "float32", MODES[len(MODES) // 2], kernel=3)
    layer = case.make()
    x = numbers(2, *size, CHANNELS, seed=1)
    layer.build(x.shape)
    for weight in layer.trainable_weights:
        weight.assign(numbers(*weight.shape, seed=2))
    y_shape = layer.compute_output_shape(x.shape)
    gradient = numbers(*y_shape, seed=3)

    outer = Ignoring(layer)
    y, (d_x, _, *_) = forward_and_gradients(
        outer, x, np.zeros((2, 1, 1, 1), "float32"), gradient, case.mode, True
    )

    x, gradient = to_numpy(x), to_numpy(gradient)
    routing_weights = [to_numpy(w) for w in (layer.routing.kernel, layer.routing.bias)]
    routing = reference.routing(x, *routing_weights, "sigmoid")
    forward = reference.conv2d if case.layer == "conv" else reference.depthwise_conv2d
    arguments = (x, routing, to_numpy(layer.kernel), to_numpy(layer.bias), *case.geometry)
    backward = getattr(reference, f"{forward.__name__}_backward")
    directly, d_routing, *_ = backward(*arguments, gradient)
    through_routing, *_ = reference.routing_backward(x, *routing_weights, "sigmoid", d_routing)
    assert error(y, forward(*arguments)) <= 1e-5
    assert error(d_x, directly + through_routing) <= 1e-4
    assert np.abs(through_routing).max() > 0.01 * np.abs(directly).max()


# The authors' own layers.


def golden_layers() -> list[tuple[str, dict[str, Any], dict[str, Array]]]:
    """Class, arguments and arrays (x, r, y, w/...) of each recorded layer."""
    with np.load(GOLDEN / "condconv_layers.npz") as file:
        records = {name: file[name] for name in file}
    layers = []
    for i in sorted({name.split("/")[0] for name in records}):
        arrays = {k.removeprefix(f"{i}/"): v for k, v in records.items() if k.startswith(f"{i}/")}
        config = ast.literal_eval(str(arrays.pop("cfg")))
        layers.append((str(arrays.pop("cls")), config, arrays))
    return layers


@pytest.mark.parametrize(("name", "config", "arrays"), slow_on_jax(golden_layers(), 5))
def test_outputs_equal_those_of_the_authors_layers(
    name: str, config: dict[str, Any], arrays: dict[str, Array]
):
    layer = {"CondConv2D": CondConv2D, "DepthwiseCondConv2D": DepthwiseCondConv2D}[name](**config)
    layer.build(arrays["x"].shape, arrays["r"].shape)
    kernel = next(v for k, v in arrays.items() if k.endswith("condconv_kernel"))
    layer.kernel.assign(kernel.reshape(layer.kernel.shape))
    if layer.use_bias:
        layer.bias.assign(arrays["w/condconv_bias"])
    assert error(layer(arrays["x"], arrays["r"]), arrays["y"]) <= 1e-5
    assert error(layer(arrays["x"], arrays["r"], training=True), arrays["y"]) <= 1e-5


def test_six_layers_of_the_authors_are_recorded():
    assert len(golden_layers()) == 6


# What a mixture of kernels must satisfy, whatever the numbers.

LAYERS = ("conv", "depthwise", "dense")


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


STATIC = [
    ("conv", {"kernel_size": 1}),
    ("conv", {"kernel_size": (3, 5), "padding": "same"}),
    ("conv", {"kernel_size": 3, "strides": 2, "padding": "same"}),
    ("conv", {"kernel_size": 3, "strides": (2, 1), "padding": "valid"}),
    ("conv", {"kernel_size": 3, "dilation_rate": 2, "padding": "same", "activation": "relu"}),
    ("depthwise", {"kernel_size": 3, "padding": "same", "depth_multiplier": 2}),
    ("depthwise", {"kernel_size": 5, "strides": 2, "padding": "same"}),
    ("depthwise", {"kernel_size": 3, "dilation_rate": 2, "padding": "valid", "use_bias": False}),
    ("dense", {}),
    ("dense", {"use_bias": False, "activation": "swish"}),
]


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize(("layer", "arguments"), slow_on_jax(STATIC, 5))
def test_one_expert_of_weight_one_is_the_static_layer(
    layer: str, arguments: dict[str, Any], training: bool
):
    static_class, conditional_class, own = {
        "conv": (keras.layers.Conv2D, CondConv2D, {"filters": OUT}),
        "depthwise": (keras.layers.DepthwiseConv2D, DepthwiseCondConv2D, {}),
        "dense": (keras.layers.Dense, CondDense, {"units": OUT}),
    }[layer]
    static, ours = (
        static_class(**arguments, **own),
        conditional_class(num_experts=1, **arguments, **own),
    )
    x = numbers(3, 9, 8, CHANNELS, seed=1)
    static.build(x.shape)
    ours.build(x.shape, (None, 1))
    for i, (a, b) in enumerate(zip(static.weights, ours.weights, strict=True)):
        assert (1, *a.shape) == tuple(b.shape)
        a.assign(numbers(*a.shape, seed=i))
        b.assign(keras.ops.expand_dims(a, 0))
    expected = static(x)
    assert error(ours(x, np.ones((3, 1), "float32"), training=training), expected) <= 1e-6
    assert ours.compute_output_shape(x.shape) == tuple(expected.shape)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_order_of_the_experts_does_not_matter(layer: str):
    order = [2, 0, 3, 1]
    one, other = built(layer), built(layer)
    x, routing = inputs_of(layer), mixture_of(3, 4)
    for weight in other.weights:
        weight.assign(to_numpy(weight)[order])
    assert error(other(x, routing[:, order]), one(x, routing)) <= 1e-6
    assert error(other(x, routing), one(x, routing)) > 1e-2


@pytest.mark.parametrize("layer", LAYERS)
def test_permuting_the_batch_permutes_the_outputs(layer: str):
    order = [2, 0, 1]
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    expected = to_numpy(instance(x, routing))[order]
    assert error(instance(x[order], routing[order]), expected) <= 1e-6


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("layer", LAYERS)
def test_an_example_depends_on_itself_alone(layer: str, training: bool):
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    other_x, other_routing = inputs_of(layer, seed=7), mixture_of(3, 4, seed=7)
    other_x[1], other_routing[1] = x[1], routing[1]
    one = to_numpy(instance(x, routing, training=training))
    other = to_numpy(instance(other_x, other_routing, training=training))
    assert error(other[1], one[1]) <= 1e-6
    assert error(other[0], one[0]) > 1e-2
    alone = to_numpy(instance(x[1:2], routing[1:2], training=training))
    assert error(alone[0], one[1]) <= 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_gradient_flows_between_examples(layer: str, mode: str):
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    gradient = np.zeros(instance.compute_output_shape(x.shape), "float32")
    gradient[1] = 1.0
    _, (d_x, d_routing, *_) = forward_and_gradients(instance, x, routing, gradient, mode, True)
    for actual in map(to_numpy, (d_x, d_routing)):
        assert not np.any(actual[[0, 2]])
        assert np.any(actual[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_equal_experts_scale_one_of_them_by_the_sum_of_the_weights(layer: str):
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    for weight in instance.weights:
        weight.assign(np.broadcast_to(to_numpy(weight)[:1], weight.shape))
    one_hot = np.zeros((3, 4), "float32")
    one_hot[:, 0] = 1.0
    static = to_numpy(instance(x, one_hot))
    sums = routing.sum(-1).reshape(-1, *(1,) * (static.ndim - 1))
    assert error(instance(x, routing), static * sums) <= 1e-6


# How the experts start.

INITIALIZERS = {
    "glorot_uniform": lambda: "glorot_uniform",
    "he_normal": lambda: "he_normal",
    "fan_out": lambda: initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
    "truncated": lambda: initializers.TruncatedNormal(stddev=0.05),
    "seeded": lambda: initializers.GlorotNormal(seed=11),
    "generator": lambda: initializers.GlorotUniform(seed=keras.random.SeedGenerator(11)),
}


def wide(layer: str, initializer: Any, static: bool = False) -> Layer:
    """A built layer of enough weights to judge their variance."""
    experts = {} if static else {"num_experts": 4}
    if layer == "conv":
        instance = (keras.layers.Conv2D if static else CondConv2D)(
            32, 3, kernel_initializer=initializer, **experts
        )
        shape = (None, 5, 5, 24)
    elif layer == "depthwise":
        name = "depthwise_initializer" if static else "kernel_initializer"
        instance = (keras.layers.DepthwiseConv2D if static else DepthwiseCondConv2D)(
            3, depth_multiplier=4, **{name: initializer}, **experts
        )
        shape = (None, 5, 5, 128)
    else:
        instance = (keras.layers.Dense if static else CondDense)(
            80, kernel_initializer=initializer, **experts
        )
        shape = (None, 60)
    if static:
        instance.build(shape)
    else:
        instance.build(shape, (None, 4))
    return instance


@pytest.mark.parametrize("initializer", slow_on_jax(INITIALIZERS.values(), 10), ids=INITIALIZERS)
@pytest.mark.parametrize("layer", slow_on_jax(LAYERS[::-1], 3))
def test_each_expert_starts_with_the_variance_of_the_static_layer(layer: str, initializer: Any):
    keras.utils.set_random_seed(5)
    static = to_numpy(wide(layer, initializer(), static=True).kernel)
    experts = to_numpy(wide(layer, initializer()).kernel)
    # Of n normal numbers the variance comes out with a deviation of sqrt(2 / n); two such, at
    # five deviations.
    tolerance = 5 * np.sqrt(4 / static.size)
    assert tolerance < 0.2
    for expert in experts:
        assert expert.shape == static.shape
        assert expert.var() / static.var() == pytest.approx(1, abs=tolerance)
        assert abs(expert.mean()) < 5 * static.std() / np.sqrt(static.size)


@pytest.mark.parametrize("initializer", slow_on_jax(INITIALIZERS.values(), 10), ids=INITIALIZERS)
@pytest.mark.parametrize("layer", slow_on_jax(LAYERS[::-1], 3))
def test_experts_start_unlike_each_other(layer: str, initializer: Any):
    keras.utils.set_random_seed(5)
    experts = to_numpy(wide(layer, initializer()).kernel).reshape(4, -1)
    correlations = np.corrcoef(experts)[np.triu_indices(4, 1)]
    assert np.all(np.abs(correlations) < 5 / np.sqrt(experts.shape[1]))


@pytest.mark.parametrize("initializer", ["seeded", "generator"])
@pytest.mark.parametrize("layer", slow_on_jax(LAYERS[::-1], 3))
def test_seeded_experts_are_reproducible(layer: str, initializer: str):
    one, other = (wide(layer, INITIALIZERS[initializer]()).kernel for _ in range(2))
    np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


def test_a_global_seed_reproduces_unseeded_experts():
    kernels = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        kernels.append(to_numpy(wide("dense", "glorot_uniform").kernel))
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.all(kernels[0] != kernels[2])


# A routing of the layer's own.


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.layer = make("conv")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = make("dense")

    def call(self, inputs: Any) -> Any:
        return self.head(self.pool(self.layer(inputs)))


def sequential() -> keras.Model:
    layers = [make("conv"), make("depthwise"), keras.layers.GlobalAveragePooling2D(), make("dense")]
    return keras.Sequential(layers)


def functional() -> keras.Model:
    inputs = keras.Input((5, 4, CHANNELS))
    x = make("depthwise")(make("conv")(inputs))
    return keras.Model(inputs, make("dense")(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_routes_for_itself(layer: str):
    instance, x = make(layer), inputs_of(layer)
    y = instance(x)
    of_kernel = {"conv": 9 * CHANNELS * OUT, "depthwise": 9 * CHANNELS * 2, "dense": CHANNELS * OUT}
    assert instance.count_params() == 4 * (of_kernel[layer] + y.shape[-1] + CHANNELS + 1)
    assert [w.path.split("/", 1)[1] for w in instance.weights] == [
        "kernel",
        "bias",
        "routing/kernel",
        "routing/bias",
    ]
    assert len(instance.trainable_weights) == 4
    assert error(y, instance(x, instance.routing(x))) <= 1e-6
    expected = reference.routing(
        to_numpy(x), to_numpy(instance.routing.kernel), to_numpy(instance.routing.bias), "sigmoid"
    )
    assert error(instance.routing(x), expected) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_routing_weights_owns_no_routing(layer: str):
    instance = make(layer)
    instance(inputs_of(layer), mixture_of(3, 4))
    assert [w.path.split("/", 1)[1] for w in instance.weights] == ["kernel", "bias"]
    assert instance.routing is None


@pytest.mark.parametrize(
    "model", slow_on_jax([Subclassed, functional, sequential], 3), ids=lambda m: m.__name__
)
def test_layers_route_for_themselves_in_every_kind_of_model(model: Callable[[], keras.Model]):
    model, x = model(), inputs_of("conv")
    y = model(x)
    assert tuple(y.shape) == (3, OUT)
    count = 2 if isinstance(model, Subclassed) else 3
    assert len(model.trainable_weights) == 4 * count
    model.compile("sgd", "mse")
    before = [to_numpy(weight) for weight in model.trainable_weights]
    model.fit(x, np.ones((3, OUT), "float32"), verbose=0)
    after = [to_numpy(weight) for weight in model.trainable_weights]
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_leaving_the_routing_weights_out_later_is_an_error(layer: str):
    instance = make(layer)
    instance(inputs_of(layer), mixture_of(3, 4))
    with pytest.raises(ValueError, match="first called with routing weights"):
        instance(inputs_of(layer))


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 1), (4,)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_routing_weights_of_a_wrong_shape_are_an_error(
    layer: str, shape: tuple[int, ...], symbolic: bool
):
    x, routing = inputs_of(layer), np.ones(shape, "float32")
    if symbolic:
        x, routing = (keras.KerasTensor(value.shape) for value in (x, routing))
    with pytest.raises(ValueError, match=r"routing weights of shape \(batch, 4\)"):
        make(layer)(x, routing)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_routing_weights_of_another_batch_are_an_error(layer: str, batch: int, symbolic: bool):
    x, routing = inputs_of(layer), np.ones((batch, 4), "float32")
    if symbolic:
        x, routing = (keras.KerasTensor(value.shape) for value in (x, routing))
    with pytest.raises(ValueError, match=r"each of its 3 examples.*\(3, .*of shape \(., 4\)"):
        make(layer)(x, routing)


# An empty batch, as the last one of a replica can be.


def empties() -> list[tuple[str, dict[str, Any]]]:
    windows = [{}, {"strides": 2}, {"dilation_rate": 2}]
    return [("dense", {}), *itertools.product(("conv", "depthwise"), windows)]


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize(("layer", "window"), slow_on_jax(empties(), 3))
def test_an_empty_batch_has_an_empty_result(layer: str, window: dict[str, Any], training: bool):
    instance = built(layer, **window)
    x, routing = inputs_of(layer)[:0], np.ones((0, 4), "float32")
    y = instance(x, routing, training=training)
    assert tuple(y.shape) == instance.compute_output_shape(x.shape)
    assert y.shape[0] == 0


@tf_only
@pytest.mark.parametrize(("layer", "window"), empties())
def test_one_graph_trains_on_empty_batches_too(layer: str, window: dict[str, Any]):
    import tensorflow as tf

    instance = built(layer, **window)
    weights = [weight.value for weight in instance.trainable_weights]

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, *inputs_of(layer).shape[1:])),
            tf.TensorSpec((None, 4)),
        ]
    )
    def run(x: tf.Tensor, routing: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            y = instance(x, routing, training=True)
        return y, tape.gradient(y, weights)

    y, gradients = run(inputs_of(layer)[:0], np.ones((0, 4), "float32"))
    assert tuple(y.shape) == instance.compute_output_shape((0, *inputs_of(layer).shape[1:]))
    assert all(not np.any(to_numpy(gradient)) for gradient in gradients)
    x, routing = inputs_of(layer), mixture_of(3, 4)
    assert error(run(x, routing)[0], instance(x, routing)) <= 1e-6


# Configuration and files.

SHARED = {
    "activation": "relu",
    "use_bias": False,
    "kernel_initializer": initializers.HeNormal(seed=3),
    "bias_initializer": initializers.Constant(0.5),
    "kernel_regularizer": regularizers.L2(0.1),
    "bias_regularizer": regularizers.L1(0.2),
}
CONDITIONAL = {
    **SHARED,
    "activity_regularizer": regularizers.L2(0.3),
    "kernel_constraint": keras.constraints.MaxNorm(2.0, axis=[0, 1]),
    "bias_constraint": keras.constraints.NonNeg(),
    "num_experts": 3,
}
WINDOW = {
    "kernel_size": (3, 2),
    "strides": (2, 1),
    "padding": "same",
    "data_format": "channels_first",
    "dilation_rate": 1,
}
CONFIGURATIONS = [
    (Routing, {**SHARED, "num_experts": 3, "data_format": "channels_first", "hidden_units": 5}),
    (CondConv2D, {**CONDITIONAL, **WINDOW, "filters": 5, "groups": 1}),
    (DepthwiseCondConv2D, {**CONDITIONAL, **WINDOW, "depth_multiplier": 2}),
    (
        DepthwiseCondConv2D,
        {
            **CONDITIONAL,
            **WINDOW,
            "strides": 1,
            "padding": "valid",
            "depth_multiplier": 1,
            "dilation_rate": (1, 2),
        },
    ),
    (CondDense, {**CONDITIONAL, "units": 5}),
]


def parameters_of(layer_class: type) -> set[str]:
    """The arguments that a layer takes besides those of all Keras layers."""
    classes = itertools.takewhile(lambda c: c is not keras.layers.Layer, layer_class.__mro__)
    names = {name for c in classes for name in inspect.signature(c).parameters} - {"kwargs"}
    return names - ({"data_format"} if layer_class is CondDense else set())


@pytest.mark.parametrize(("layer_class", "arguments"), slow_on_jax(CONFIGURATIONS, 5))
def test_configuration_round_trip(layer_class: type, arguments: dict[str, Any]):
    parameters = parameters_of(layer_class)
    assert parameters == set(arguments)
    layer = layer_class(**arguments, name="mine", dtype="mixed_bfloat16", trainable=False)

    description = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    copy = keras.saving.deserialize_keras_object(description)

    assert type(copy) is layer_class
    assert copy.get_config() == layer.get_config()
    assert layer_class.from_config(layer.get_config()).get_config() == layer.get_config()
    assert set(layer.get_config()) >= parameters - {"groups"}
    assert (copy.name, copy.dtype_policy.name, copy.trainable) == ("mine", "mixed_bfloat16", False)
    for name, value in arguments.items():
        if name == "groups":
            continue
        kept = getattr(copy, name)
        if isinstance(value, str) and callable(kept):
            assert kept is keras.activations.get(value)
        elif hasattr(value, "get_config"):
            assert type(kept) is type(value)
            assert kept.get_config() == value.get_config()
        else:
            assert kept in (value, (value, value))
    rank_4 = layer_class is not CondDense
    x = numbers(2, CHANNELS, 6, 5) if rank_4 else numbers(2, CHANNELS)
    y = layer(x)
    copy.build(x.shape)
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(to_numpy(copy(x)), to_numpy(y))


def test_logits_configuration_round_trip():
    layer = Logits(cost_rule="M", name="mine")
    copy = Logits.from_config(layer.get_config())
    assert (copy.cost_rule, copy.name, copy.dtype_policy.name) == ("M", "mine", "float32")


def shared_routing_model(dtype: str | None = None) -> keras.Model:
    inputs = keras.Input((8, 7, CHANNELS), name="image")
    routing = Routing(4, dtype=dtype)(inputs)
    x = make("conv", dtype=dtype, kernel_initializer=initializers.HeNormal(seed=1))(inputs, routing)
    x = BatchNormalization(dtype=dtype)(x)
    y = make("depthwise", dtype=dtype, depth_multiplier=1, activation="swish")(x, routing)
    x = keras.layers.Add()([x, StochasticDepth(0.8)(y)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = make("dense", dtype=dtype)(Dropout(0.2)(x), routing)
    return keras.Model(inputs, Logits(cost_rule="M")(x))


SAVED = {
    "shared": shared_routing_model,
    "mixed": lambda: shared_routing_model("mixed_bfloat16"),
    "sequential": lambda: keras.Sequential([keras.Input((8, 7, CHANNELS)), *sequential().layers]),
}
LOAD = """
import sys
{imports}
import numpy
for name in sys.argv[1].split(","):
    model = keras.saving.load_model(name + ".keras", safe_mode=True)
    y = model(numpy.load(name + ".npy"))
    numpy.save(f"{{name}}-{order}.npy", keras.ops.convert_to_numpy(y))
"""


def save(name: str, folder: pathlib.Path) -> Array:
    """Saves a model of known weights and its inputs, and returns its outputs."""
    model, x = SAVED[name](), numbers(3, 8, 7, CHANNELS)
    for i, weight in enumerate(model.weights):
        weight.assign(np.abs(numbers(*weight.shape, seed=i)))
    model.save(folder / f"{name}.keras")
    np.save(folder / f"{name}.npy", x)
    return to_numpy(model(x))


@tf_only  # the order of imports is nothing to a backend
def test_new_processes_load_the_models_whatever_is_imported_first(tmp_path: pathlib.Path):
    expected = {name: save(name, tmp_path) for name in SAVED}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    orders = {"first": ("condconv", "keras"), "last": ("keras", "condconv")}
    processes = {}
    for order, modules in orders.items():
        imports = "\n".join(f"import {module}" for module in modules)
        processes[order] = subprocess.Popen(
            [sys.executable, "-c", LOAD.format(imports=imports, order=order), ",".join(SAVED)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for order, process in processes.items():
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, f"condconv imported {order}:\n{said}"
        for name, y in expected.items():
            assert y.std() > 1e-3
            assert error(np.load(tmp_path / f"{name}-{order}.npy"), y) <= 1e-6


@pytest.mark.parametrize("model", slow_on_jax(SAVED, 3))
def test_loading_keeps_outputs_and_weights(tmp_path: pathlib.Path, model: str):
    expected = save(model, tmp_path)
    loaded = keras.saving.load_model(tmp_path / f"{model}.keras", safe_mode=True)
    assert error(loaded(np.load(tmp_path / f"{model}.npy")), expected) <= 1e-6
    original = SAVED[model]()
    assert [tuple(w.shape) for w in loaded.weights] == [tuple(w.shape) for w in original.weights]
    for i, weight in enumerate(loaded.weights):
        np.testing.assert_array_equal(to_numpy(weight), np.abs(numbers(*weight.shape, seed=i)))
        assert dtype_of(weight) == "float32"


# Batches and maps of unknown size.


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


@pytest.mark.parametrize(
    ("layer", "window"),
    [
        *mostly_slow([*GEOMETRIES, ("conv", DILATED)], 5 if BACKEND == "tensorflow" else 20),
        ("depthwise", DILATED),
    ],
)
def test_predict_takes_any_batch_and_any_map(layer: str, window: dict[str, Any]):
    inputs, routing = keras.Input((None, None, CHANNELS)), keras.Input((2,))
    instance = windowed(layer, window)
    model = keras.Model([inputs, routing], instance(inputs, routing))
    channels = OUT if layer == "conv" else 2 * CHANNELS
    assert model.output_shape == (None, None, None, channels)
    shapes = [(1, 6, 5), (3, 6, 5), (5, 9, 8)]
    for batch, height, width in shapes if BACKEND == "tensorflow" else shapes[1:]:
        x, weights = numbers(batch, height, width, CHANNELS), mixture_of(batch, 2)
        y = model.predict([x, weights], batch_size=4, verbose=0)
        assert y.shape == instance.compute_output_shape(x.shape)
        assert error(y, instance(x, weights)) <= 1e-6
        symbolic = instance(keras.Input(x.shape[1:]), keras.Input((2,)))
        assert symbolic.shape == (None, *y.shape[1:])


@tf_only
@pytest.mark.parametrize(
    ("layer", "kernel", "stride", "dilation", "jit_compile"),
    [
        ("conv", 3, 2, 1, True),
        ("depthwise", 3, 2, 1, False),
        ("depthwise", 3, 2, 1, True),
        ("depthwise", 3, 1, 2, False),
    ],
)
def test_one_graph_trains_on_any_batch_and_any_map(
    layer: str, kernel: int, stride: int, dilation: int, jit_compile: bool
):
    import tensorflow as tf

    case = Case(layer, 2, 1, (), "float32", "", kernel=kernel, stride=stride, dilation=dilation)
    instance = case.make()
    instance.build((None, None, None, CHANNELS), (None, 2))
    weights = [weight.value for weight in instance.trainable_weights]

    @tf.function(
        input_signature=[tf.TensorSpec((None, None, None, CHANNELS)), tf.TensorSpec((None, 2))],
        jit_compile=jit_compile,
    )
    def run(x: tf.Tensor, routing: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch((x, routing))
            y = instance(x, routing, training=True)
        return tape.gradient(y, [x, routing, *weights])

    forward = reference.conv2d if layer == "conv" else reference.depthwise_conv2d
    backward = getattr(reference, f"{forward.__name__}_backward")
    for shape in ((1, 3, 2), (3, 6, 7)):
        x, routing = numbers(*shape, CHANNELS, mean=0.5), mixture_of(shape[0], 2)
        arguments = (
            *map(to_numpy, (x, routing, instance.kernel, instance.bias)),
            *case.geometry,
        )
        expected = backward(*arguments, np.ones(forward(*arguments).shape))
        for actual, wanted in zip(run(x, routing), expected, strict=True):
            assert error(actual, wanted) <= 1e-4


@pytest.mark.parametrize("jit_compile", slow_on_jax([True, False]))
def test_fit_trains_a_model_and_takes_a_partial_batch(jit_compile: bool):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3, 3, CHANNELS))  # compiled taps inside Keras' own graph
    routing = Routing(2)(inputs)
    x = CondConv2D(OUT, 1, 2)(inputs, routing)
    x = DepthwiseCondConv2D(3, 2, padding="same")(x, routing)
    x = CondDense(2, 2)(keras.layers.GlobalAveragePooling2D()(x), routing)
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit_compile)
    before = [to_numpy(weight) for weight in model.trainable_weights]
    batch = 4 if jit_compile else 3  # each size of a batch is a compilation
    x, y = numbers(4, 3, 3, CHANNELS), numbers(4, 2)
    losses = model.fit(x, y, batch_size=batch, epochs=4, shuffle=False, verbose=0).history["loss"]
    assert model.optimizer.iterations == (4 if jit_compile else 8)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(to_numpy(weight) != old), weight.path


# Precision.


@pytest.mark.parametrize("dtype", slow_on_jax(["bfloat16", "float16"]))
@pytest.mark.parametrize("layer", LAYERS)
def test_mixed_precision_keeps_weights_and_routing_in_float32(layer: str, dtype: str):
    instance, x = make(layer, dtype=policy(dtype)), inputs_of(layer)
    y = instance(x)
    assert dtype_of(y) == dtype
    assert len(instance.weights) == 4
    assert {dtype_of(weight.value) for weight in instance.weights} == {"float32"}
    assert dtype_of(instance.routing(x)) == "float32"
    symbolic = instance(keras.Input(x.shape[1:]))
    assert dtype_of(symbolic) == dtype
    assert dtype_of(Routing(4, dtype=policy(dtype))(keras.Input(x.shape[1:]))) == "float32"
    half = keras.ops.cast(x, dtype)
    assert dtype_of(instance(half)) == dtype


class Wrapping(keras.Model):
    """A mixed precision model around a layer: opens Keras' scope of automatic casts."""

    def __init__(self, layer: Layer, dtype: str):
        super().__init__(dtype=dtype)
        self.layer = layer

    def call(self, *inputs: Any) -> Any:
        return self.layer(*inputs)


@pytest.mark.parametrize("inside", [True, False])
def test_routing_computes_in_float32(inside: bool):
    mixed, plain = Routing(4, dtype="mixed_bfloat16"), Routing(4)
    x = numbers(3, 5, 4, CHANNELS)
    for layer in (mixed, plain):
        layer.build(x.shape)
        layer.kernel.assign(numbers(CHANNELS, 4))
    called = Wrapping(mixed, "mixed_bfloat16") if inside else mixed
    # The model casts its inputs, as every Keras layer does.
    x = numbers(3, 5, 4, CHANNELS, dtype="bfloat16")
    assert error(called(x), plain(x)) <= 1e-6


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_experts_are_mixed_in_float32(layer: str, inside: bool):
    instance = make(layer, 2, dtype="mixed_bfloat16")
    x, routing = np.ones((1, 1, 1, CHANNELS), "float32"), np.ones((1, 2), "float32")
    instance.build(x.shape, routing.shape)
    # Bfloat16 cannot tell the experts' sizes apart: mixed in it they would leave nothing.
    experts = np.ones(instance.kernel.shape)
    experts[0] += 2**-10
    experts[1] *= -1
    instance.kernel.assign(experts)
    biases = np.ones(instance.bias.shape)
    biases[0] += 2**-10
    biases[1] *= -1
    instance.bias.assign(biases)
    called = Wrapping(instance, "mixed_bfloat16") if inside else instance
    channels = CHANNELS if layer == "conv" else 1
    np.testing.assert_array_equal(to_numpy(called(x, routing)), (channels + 1) * 2**-10)


# Other precisions.


@tf_only
@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("layer", LAYERS)
def test_float64_is_float64_all_the_way(layer: str, training: bool):
    x, routing = (value.astype("float64") / 3 for value in (inputs_of(layer), mixture_of(3, 4)))
    instance = built(layer, dtype="float64")
    for weight in instance.weights:
        assert dtype_of(weight) == "float64"
        weight.assign(to_numpy(weight) / 3)  # thirds have no end, in float32 a nearer one
    forward = {"conv": reference.conv2d, "depthwise": reference.depthwise_conv2d}.get(layer)
    arguments = (x, routing, to_numpy(instance.kernel), to_numpy(instance.bias))
    if forward:
        expected = forward(*arguments, (1, 1), "same", (1, 1))
    else:
        expected = reference.dense(*arguments)
    y = instance(x, routing, training=training)
    assert dtype_of(y) == "float64"
    assert error(y, expected) <= 1e-13


@tf_only
def test_routing_and_logits_follow_a_policy_of_float64():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        routing, logits = Routing(4), Logits()
    finally:
        keras.config.set_dtype_policy(before)
    x = inputs_of("dense").astype("float64") / 3
    y = routing(x)
    expected = 1 / (1 + np.exp(-(x @ to_numpy(routing.kernel))))
    assert dtype_of(y) == "float64"
    assert error(y, expected) <= 1e-14
    assert dtype_of(logits(y)) == routing.compute_output_spec(x).dtype == "float64"


@tf_only
def test_a_whole_network_computes_in_float64_under_its_policy():
    from models import create_model

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        network = create_model(
            "mobilenet_v1", num_experts=2, width=0.1, image_size=32, condconv_classifier=True
        )
    finally:
        keras.config.set_dtype_policy(before)
    for layer in network.layers[1:]:  # but for the pixels
        assert layer.compute_dtype == layer.output.dtype == "float64", layer.name
    assert {dtype_of(weight) for weight in network.trainable_weights} == {"float64"}


@pytest.mark.parametrize("dtype", slow_on_jax(["bfloat16", "float16"]))
def test_nothing_is_mixed_or_routed_below_float32(dtype: str):
    routing = Routing(4, dtype=dtype)
    y = routing(inputs_of("dense"))
    assert dtype_of(routing.kernel) == dtype
    assert dtype_of(y) == routing.compute_output_spec(y).dtype == "float32"
    experts = np.asarray([1.0, 2.0**-12], dtype).reshape(2, 1)
    mixed = conditional.mix(keras.ops.array(experts, dtype), np.ones((1, 2), "float32"))
    assert dtype_of(mixed) == "float32"
    assert to_numpy(mixed)[0, 0] == 1 + 2**-12
    assert dtype_of(built("conv", dtype=dtype)(inputs_of("conv"), mixture_of(3, 4))) == dtype
    assert Logits(dtype=dtype).compute_dtype == "float32"


# Channels first.


@pytest.mark.parametrize("own_routing", [True, False])
@pytest.mark.parametrize(
    ("layer", "window"),
    slow_on_jax([*GEOMETRIES, ("conv", DILATED), ("depthwise", DILATED)], 5),
)
def test_channels_first_is_channels_last_transposed(
    layer: str, window: dict[str, Any], own_routing: bool
):
    x = numbers(3, 7, 6, CHANNELS)
    x_first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    rest = () if own_routing else (mixture_of(3, 2),)
    last = windowed(layer, window, data_format="channels_last")
    first = windowed(layer, window, data_format="channels_first")
    expected = last(x, *rest)
    batch, height, width, channels = expected.shape
    assert first.compute_output_shape(x_first.shape) == (batch, channels, height, width)
    first.build(x_first.shape, *(r.shape for r in rest))
    first.set_weights(last.get_weights())
    assert error(first(x_first, *rest), to_numpy(expected).transpose(0, 3, 1, 2)) <= 1e-6
    assert first(keras.Input(x_first.shape[1:]), *(keras.Input((2,)) for _ in rest)).shape[1:] == (
        tuple(first(x_first, *rest).shape[1:])
    )


def test_routing_with_channels_first_is_that_with_channels_last():
    x = numbers(3, 7, 6, CHANNELS)
    last, first = Routing(4), Routing(4, data_format="channels_first")
    expected = last(x)
    first.build((None, CHANNELS, 7, 6))
    first.set_weights(last.get_weights())
    assert error(first(x.transpose(0, 3, 1, 2)), expected) <= 1e-6


# Arguments out of range.

CONV = {"filters": 2, "kernel_size": 3, "num_experts": 2}
DEPTHWISE = {"kernel_size": 3, "num_experts": 2}
DENSE = {"units": 2, "num_experts": 2}
BAD = [
    *(
        (layer_class, {**good, "num_experts": value}, rf"`num_experts`.*Received: {value}")
        for layer_class, good in (
            (CondConv2D, CONV),
            (DepthwiseCondConv2D, DEPTHWISE),
            (CondDense, DENSE),
            (Routing, {}),
        )
        for value in (0, -1, True, 1.5)
    ),
    (Routing, {"num_experts": 2, "data_format": "foo"}, "'channels_first'.*Received: 'foo'"),
    *((Routing, {"num_experts": 2, "hidden_units": v}, rf"`hidden_units`.*{v}") for v in (-1, 0.5)),
    (CondConv2D, {**CONV, "groups": 2}, "groups=2"),
    (CondConv2D, {**CONV, "filters": 0}, "`filters`.*Received: 0"),
    (CondDense, {**DENSE, "units": 0}, "`units`.*Received: 0"),
    (DepthwiseCondConv2D, {**DEPTHWISE, "depth_multiplier": 0}, "`depth_multiplier`.*Received: 0"),
    *(
        (layer_class, {**good, **bad}, message)
        for layer_class, good in ((CondConv2D, CONV), (DepthwiseCondConv2D, DEPTHWISE))
        for bad, message in (
            ({"padding": "causal"}, "`padding`.*Received: 'causal'"),
            ({"strides": 2, "dilation_rate": 2}, "`strides`.*`dilation_rate`"),
            ({"strides": (1, 2), "dilation_rate": (2, 1)}, "`strides`.*`dilation_rate`"),
            ({"kernel_size": (3, 3, 3)}, r"`kernel_size`.*Received: \(3, 3, 3\)"),
            ({"kernel_size": 0}, "`kernel_size`.*Received: 0"),
            ({"strides": (1, -1)}, r"`strides`.*Received: \(1, -1\)"),
            ({"dilation_rate": 0}, "`dilation_rate`.*Received: 0"),
            ({"data_format": "channels_middle"}, "`data_format`.*Received: 'channels_middle'"),
        )
    ),
]


@pytest.mark.parametrize(("layer_class", "arguments", "message"), BAD)
def test_bad_arguments_are_named(layer_class: type, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        layer_class(**arguments)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_inputs_of_a_wrong_rank_are_an_error(layer: str, symbolic: bool):
    x = keras.KerasTensor((2, 5, CHANNELS)) if symbolic else numbers(2, 5, CHANNELS)
    with pytest.raises(ValueError, match=r"four dimensions.*\(2, 5, 3\)"):
        make(layer)(x)


def test_routing_of_a_wrong_rank_is_an_error():
    with pytest.raises(ValueError, match=r"Routing takes.*\(2, 5, 3\)"):
        Routing(4)(numbers(2, 5, CHANNELS))


@pytest.mark.parametrize("layer", LAYERS)
def test_an_unknown_number_of_channels_is_an_error(layer: str):
    shape = (2, None) if layer == "dense" else (2, 5, 4, None)
    with pytest.raises(ValueError, match="known number of channels"):
        make(layer)(keras.KerasTensor(shape), keras.KerasTensor((2, 4)))


@pytest.mark.parametrize("how", ["shape", "symbolic", "eager"])
@pytest.mark.parametrize("window", [{}, {"dilation_rate": 2}], ids=str)
@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_a_window_larger_than_its_input_is_an_error(layer: str, window: dict[str, Any], how: str):
    size = 2 if not window else 4
    instance = make(layer, 2, padding="valid", **window)
    x, routing = numbers(3, size, 5, CHANNELS), mixture_of(3, 2)
    with pytest.raises(ValueError, match="larger than its input"):
        if how == "shape":
            instance.compute_output_shape(x.shape)
        elif how == "symbolic":
            instance(keras.KerasTensor(x.shape), keras.KerasTensor(routing.shape))
        else:
            instance(x, routing)


# Regularizers, constraints, activations, biases.


@pytest.mark.parametrize("layer", LAYERS)
def test_regularizers_see_the_sum_over_the_experts(layer: str):
    instance = built(layer, kernel_regularizer=regularizers.L2(0.1), bias_regularizer="l1")
    instance.bias.regularizer = regularizers.L1(0.3)
    kernel, bias = to_numpy(instance.kernel), to_numpy(instance.bias)
    losses = sorted(float(to_numpy(loss)) for loss in instance.losses)
    assert losses == pytest.approx(
        sorted([0.1 * np.sum(kernel**2), 0.3 * np.sum(np.abs(bias))]), rel=1e-5
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_constraints_see_one_expert_at_a_time(layer: str):
    axes = [0] if layer == "dense" else [0, 1, 2]
    instance = built(
        layer,
        kernel_constraint=keras.constraints.MaxNorm(1.0, axis=axes),
        bias_constraint=keras.constraints.MaxNorm(1.0, axis=0),
    )
    scales = np.array([0.01, 1.0, 3.0, 10.0])
    for weight in instance.weights:
        weight.assign(to_numpy(weight) * scales.reshape(-1, *(1,) * (len(weight.shape) - 1)))
    expected = [
        np.stack([to_numpy(keras.constraints.MaxNorm(1.0, axis=over)(e)) for e in to_numpy(weight)])
        for weight, over in ((instance.kernel, axes), (instance.bias, 0))
    ]
    still = [keras.ops.zeros(weight.shape) for weight in instance.weights]
    keras.optimizers.SGD(0.0).apply(still, instance.trainable_variables)
    for weight, wanted in zip(instance.weights, expected, strict=True):
        assert error(weight, wanted) <= 1e-5
    norms = np.sqrt(np.sum(to_numpy(instance.kernel) ** 2, tuple(a + 1 for a in axes)))
    assert norms.max() <= 1 + 1e-5
    assert norms[0].max() < 0.5  # the small expert has been left alone


@pytest.mark.parametrize("layer", LAYERS)
def test_activity_regularizer_is_that_of_the_static_layer(layer: str):
    regularizer = regularizers.L1(0.01)
    static = {
        "conv": lambda: keras.layers.Conv2D(
            OUT, 3, padding="same", activity_regularizer=regularizer
        ),
        "depthwise": lambda: keras.layers.DepthwiseConv2D(
            3, padding="same", depth_multiplier=2, activity_regularizer=regularizer
        ),
        "dense": lambda: keras.layers.Dense(OUT, activity_regularizer=regularizer),
    }[layer]()
    ours, x = built(layer, 1, activity_regularizer=regularizer), inputs_of(layer)
    static.build(x.shape)
    for a, b in zip(static.weights, ours.weights, strict=True):
        a.assign(b[0])
    static(x)
    ours(x, np.ones((3, 1), "float32"))
    (expected,), (actual,) = static.losses, ours.losses
    assert float(to_numpy(actual)) == pytest.approx(float(to_numpy(expected)), rel=1e-5)
    assert float(to_numpy(actual)) > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_activation_comes_last(layer: str):
    plain, active = built(layer), built(layer, activation="sigmoid")
    x, routing = inputs_of(layer), mixture_of(3, 4)
    expected = 1 / (1 + np.exp(-to_numpy(plain(x, routing))))
    assert error(active(x, routing), expected) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_biases_are_mixed_like_the_kernels(layer: str):
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    instance.kernel.assign(np.zeros(instance.kernel.shape))
    y = to_numpy(instance(x, routing))
    expected = (routing @ to_numpy(instance.bias)).reshape(3, *(1,) * (y.ndim - 2), -1)
    assert error(y, np.broadcast_to(expected, y.shape)) <= 1e-6
