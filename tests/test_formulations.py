"""Every formulation of a convolution gives what the loop gives; the rule and its overrides."""

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from condconv import CondConv2D, DepthwiseCondConv2D, Routing, ops
from condconv.activation import swish
from condconv.depthwise import DepthwiseConv2D
from condconv.device import in_xla
from condconv.formulations import Geometry

# Height, width, kernel, stride, padding, dilation: odd and even sizes, all that rounds in padding.
WINDOWS = [
    (6, 5, (1, 1), 1, "same", 1),
    (7, 6, (1, 1), 2, "valid", 1),
    (6, 5, (3, 3), 1, "same", 1),
    (6, 7, (3, 3), 2, "same", 1),
    (7, 6, (3, 3), 2, "valid", 1),
    (8, 9, (5, 5), 2, "same", 1),
    (9, 8, (5, 5), 1, "valid", 1),
    (7, 8, (2, 4), 1, "same", 1),
    (8, 7, (3, 2), 3, "same", 1),
    (7, 9, (3, 3), 1, "same", 2),
]
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
CHANNELS = 3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def kernels_of(operation: str, batch: int, kernel: tuple[int, int], multiplier: int) -> np.ndarray:
    last = 4 if operation == "conv2d" else multiplier
    shape = (batch, *kernel, CHANNELS, last)
    return draw(*(shape[1:] if operation.startswith("static") else shape), seed=1)


def one_by_one(operation: str, x: Any, kernels: Any, geometry: Geometry) -> Any:
    """The loop over the examples in TensorFlow's own operations, as the authors wrote it."""
    strides = (1, *geometry.strides, 1)
    padding = geometry.padding.upper()
    outputs = []
    for i in range(x.shape[0]):
        kernel = kernels if operation.startswith("static") else kernels[i]
        if operation == "conv2d":
            y = tf.nn.conv2d(x[i][None], kernel, strides, padding, dilations=geometry.dilation_rate)
        else:
            y = tf.nn.depthwise_conv2d(
                x[i][None], kernel, strides, padding, dilations=geometry.dilation_rate
            )
        outputs.append(y)
    return tf.concat(outputs, 0)


def with_gradients(function: Callable, x: np.ndarray, kernels: np.ndarray, dtype: str) -> list:
    x, kernels = tf.constant(x, dtype), tf.constant(kernels, dtype)
    with tf.GradientTape() as tape:
        tape.watch((x, kernels))
        y = function(x, kernels)
        target = tf.cast(tf.reshape(tf.sin(tf.range(tf.size(y), dtype=tf.float32)), y.shape), dtype)
        loss = tf.reduce_sum(y * target)
    return [y, *tape.gradient(loss, (x, kernels))]


def assert_close(got: list, expected: list, dtype: str) -> None:
    forward, gradient = TOLERANCES[dtype]
    for a, b, tolerance in zip(got, expected, (forward, gradient, gradient), strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def check(operation: str, batch: int, window: tuple, multiplier: int, dtype: str, mode: str) -> int:
    """Compares all formulations that can compute a case with the loop; returns how many."""
    height, width, kernel, stride, padding, dilation = window
    geometry = Geometry((stride, stride), padding, (dilation, dilation))
    x = draw(batch, height, width, CHANNELS)
    kernels = kernels_of(operation, batch, kernel, multiplier)
    reference = "float64" if dtype == "float64" else "float32"
    expected = with_gradients(
        lambda x, k: one_by_one(operation, x, k, geometry), x, kernels, reference
    )
    case = ops.Case(
        kernel_size=kernel,
        geometry=geometry,
        batch=None if mode == "dynamic" else batch,
        sizes=(height, width),
        channels=CHANNELS,
        multiplier=multiplier,
    )
    names = ops.possible(operation, case)
    for name in names:

        def compute(x: Any, k: Any, name: str = name) -> Any:
            return getattr(ops, operation)(x, k, geometry, formulation=name)

        if mode == "dynamic":
            open_batch = tf.TensorSpec((None, None, None, CHANNELS), dtype)
            open_kernels = tf.TensorSpec((None, *kernel, *kernels.shape[-2:]), dtype)
            if operation.startswith("static"):
                open_kernels = tf.TensorSpec(kernels.shape, dtype)
            compute = tf.function(compute, input_signature=[open_batch, open_kernels])
        elif mode == "function":
            compute = tf.function(compute)
        assert_close(with_gradients(compute, x, kernels, dtype), expected, dtype)
    return len(names)


OPERATIONS = ("conv2d", "depthwise_conv2d", "static_depthwise_conv2d")


@pytest.mark.parametrize("mode", ["eager", "dynamic"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_formulation_equals_the_loop(operation: str, mode: str):
    window = WINDOWS[5] if "depthwise" in operation else WINDOWS[3]
    assert check(operation, 3, window, 1, "float32", mode) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "function", "dynamic"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_formulation_equals_the_loop_everywhere(operation: str, dtype: str, mode: str):
    computed = 0
    windows = WINDOWS
    if (operation, dtype) == ("conv2d", "float64"):  # TensorFlow's loop has no dilated gradient
        windows = [window for window in WINDOWS if window[-1] == 1]
    for window, batch in itertools.product(windows, (1, 3)):
        for multiplier in (1,) if operation == "conv2d" else (1, 2):
            computed += check(operation, batch, window, multiplier, dtype, mode)
    assert computed >= 40


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_of_more_examples_than_convolutions(operation: str):
    for batch in (34, 37):  # two examples a convolution, and a prime number
        check(operation, batch, (5, 6, (3, 3), 1, "same", 1), 1, "float32", "function")


CASES = [
    # What is asked, and what is known of it.
    ("conv2d", "matmul", {"kernel_size": (1, 1), "batch": 8}),
    ("conv2d", "loop", {"kernel_size": (1, 1), "batch": 1}),
    ("conv2d", "matmul", {"kernel_size": (1, 1), "batch": 1, "xla": True}),
    ("conv2d", "loop", {"batch": 8}),
    ("conv2d", "map", {"batch": None}),
    ("conv2d", "map", {"batch": 64}),
    ("conv2d", "patches", {"batch": 8, "training": True, "sizes": (7, 7)}),
    ("conv2d", "loop", {"batch": 8, "training": True, "sizes": (28, 28)}),
    (
        "conv2d",
        "patches",
        {"training": True, "sizes": (28, 28), "geometry": Geometry((1, 1), "same", (2, 2))},
    ),
    ("conv2d", "patches", {"batch": 8, "accelerator": True}),
    ("conv2d", "shifts", {"batch": 8, "xla": True}),
    ("conv2d", "shifts", {"batch": 0}),
    ("depthwise_conv2d", "taps", {"xla": True}),
    ("depthwise_conv2d", "taps", {"geometry": Geometry((1, 2))}),
    ("depthwise_conv2d", "folding", {"accelerator": True, "training": True}),
    ("depthwise_conv2d", "loop", {"channels": 512}),
    ("depthwise_conv2d", "folding", {"channels": 512, "batch": None}),
    ("depthwise_conv2d", "folding", {"channels": 32}),
    ("depthwise_conv2d", "loop", {"channels": 512, "training": True}),
    (
        "depthwise_conv2d",
        "loop_conv_gradient",
        {"channels": 512, "training": True, "kernel_size": (5, 5)},
    ),
    (
        "depthwise_conv2d",
        "folding_conv_gradient",
        {"channels": 512, "training": True, "kernel_size": (5, 5), "batch": None},
    ),
    ("depthwise_conv2d", "folding_conv_gradient", {"training": True, "sizes": (2, 2)}),
    ("static_depthwise_conv2d", "taps", {"xla": True}),
    ("static_depthwise_conv2d", "plain", {"xla": True, "accelerator": True}),
    ("static_depthwise_conv2d", "plain", {"training": True}),
    ("static_depthwise_conv2d", "plain", {"kernel_size": (5, 5)}),
    ("static_depthwise_conv2d", "conv_gradient", {"kernel_size": (5, 5), "training": True}),
]


@pytest.mark.parametrize(("operation", "expected", "known"), CASES)
def test_the_rule(operation: str, expected: str, known: dict[str, Any]):
    usual = {"kernel_size": (3, 3), "geometry": Geometry(), "batch": 8, "sizes": (14, 14)}
    case = ops.Case(**({"channels": 64} | usual | known))
    choice = ops.choose(operation, case)
    assert choice.formulation == expected
    assert choice.reason
    assert expected in ops.possible(operation, case)


@pytest.mark.parametrize("mode", ["eager", "function", "jit", "inside jit"])
def test_xla_is_seen_while_tracing(mode: str):
    seen = []

    def layer(x: tf.Tensor) -> tf.Tensor:
        seen.append(in_xla())
        return x

    run = layer if mode == "eager" else tf.function(layer, jit_compile=mode == "jit")
    if mode == "inside jit":
        run = tf.function(run, jit_compile=True)
    run(tf.zeros(1))
    assert seen == [mode.endswith("jit")]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_picked_is_always_possible(operation: str):
    spans = {
        "kernel_size": [(1, 1), (3, 3), (5, 5), (1, 7)],
        "geometry": [
            Geometry(),
            Geometry((2, 2)),
            Geometry((1, 2)),
            Geometry((1, 1), "same", (2, 2)),
        ],
        "batch": [None, 0, 1, 7, 64],
        "sizes": [(None, None), (2, 2), (14, 14), (56, None)],
        "channels": [1, 512],
        "multiplier": [1] if operation == "conv2d" else [1, 2],
        "training": [False, True],
        "tensorflow": [False, True],
        "xla": [False, True],
        "accelerator": [False, True],
    }
    reached = set()
    for values in itertools.product(*spans.values()):
        case = ops.Case(**dict(zip(spans, values, strict=True)))
        if operation == "conv2d" and not (case.tensorflow or case.xla):
            continue  # what is not TensorFlow is compiled by XLA
        choice = ops.choose(operation, case)
        reached.add(choice.formulation)
        if case.equal_strides or operation != "static_depthwise_conv2d":
            assert choice.formulation in ops.possible(operation, case), case
    everything = ops.possible(
        operation,
        ops.Case(kernel_size=(1, 1), geometry=Geometry(), batch=2, sizes=(4, 4), channels=1),
    )
    assert reached == set(everything)


@pytest.mark.parametrize(
    ("operation", "formulation", "needs"),
    [
        ("conv2d", "matmul", "needs a 1×1 kernel"),
        ("conv2d", "taps", "there is no 'taps'"),
        ("depthwise_conv2d", "folding", "needs equal strides"),
        ("depthwise_conv2d", "loop_conv_gradient", "needs a known batch, TensorFlow, equal"),
    ],
)
def test_a_formulation_that_cannot_be_is_refused(operation: str, formulation: str, needs: str):
    kernels = kernels_of(operation, 2, (3, 3), 1)
    with pytest.raises(ValueError, match=needs) as error:
        getattr(ops, operation)(
            draw(2, 5, 5, CHANNELS), kernels, Geometry((1, 2)), formulation=formulation
        )
    assert "possible here: " in str(error.value)


def test_a_layer_says_what_it_picks_and_takes_another():
    layer = DepthwiseCondConv2D(5, 4, padding="same")
    x, routing = draw(2, 14, 14, 8), np.random.default_rng(3).uniform(size=(2, 4))
    expected = layer(x, routing)
    assert layer.choose_formulation(x.shape).formulation == "folding"
    assert layer.choose_formulation((2, 56, 56, 128), training=True) == (
        "loop_conv_gradient",
        "TensorFlow's gradient is slow here; each example is worth a convolution",
    )
    assert layer.choose_formulation(x.shape, xla=True).formulation == "taps"
    for formulation in ("taps", "loop", "folding_conv_gradient"):
        layer.formulation = formulation
        np.testing.assert_allclose(layer(x, routing), expected, atol=1e-5)
    layer.formulation = "patches"
    with pytest.raises(ValueError, match="there is no 'patches'"):
        layer(x, routing)
    first = CondConv2D(4, 3, 2, data_format="channels_first")
    assert first.choose_formulation((8, 3, 28, 28)).formulation == "loop"


def test_a_saved_model_does_not_depend_on_the_formulation(tmp_path: Any):
    inputs = keras.Input((9, 9, 3))
    routing = Routing(3)(inputs)
    layers = [CondConv2D(4, 3, 3), DepthwiseCondConv2D(3, 3)]
    x = inputs
    for layer in layers:
        x = layer(x, routing)
    model = keras.Model(inputs, x)
    images = draw(2, 9, 9, 3)
    expected = model(images).numpy()
    saved = {}
    for name, picks in {"picked": (None, None), "asked": ("patches", "taps")}.items():
        for layer, formulation in zip(layers, picks, strict=True):
            layer.formulation = formulation
        model.save(tmp_path / f"{name}.keras")
        loaded = keras.models.load_model(tmp_path / f"{name}.keras")
        saved[name] = (loaded.get_config(), [w.shape for w in loaded.weights])
        np.testing.assert_allclose(loaded(images), expected, atol=1e-5)
    assert saved["picked"] == saved["asked"]


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_static_depthwise_layer_equals_keras(kernel: int):
    arguments = {"strides": 1, "padding": "same", "activation": "relu", "name": "same"}
    ours, theirs = (
        kind(kernel, **arguments) for kind in (DepthwiseConv2D, keras.layers.DepthwiseConv2D)
    )
    x = tf.constant(draw(3, 6, 7, CHANNELS), tf.float32)
    ours.build(x.shape)
    theirs.build(x.shape)
    ours.set_weights([draw(*w.shape, seed=i) for i, w in enumerate(ours.weights)])
    theirs.set_weights(ours.get_weights())
    assert [w.path for w in ours.weights] == [w.path for w in theirs.weights]
    assert ours.get_config() == theirs.get_config()
    results = []
    for layer, arguments in ((ours, {"training": True}), (theirs, {})):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **arguments)
            loss = tf.reduce_sum(y**2)
        results.append([y, *tape.gradient(loss, [x, layer.kernel.value])])
    assert_close(*results, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(2, 32, 32, 17), (4, 5)], ids=["large", "small"])
def test_swish_and_its_gradient(shape: tuple[int, ...], dtype: str):
    x = draw(*shape) * 4

    @tf.function
    def run(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = swish(x)
        return y, tape.gradient(y, x)

    y, gradient = run(tf.constant(x, dtype))
    gate = 1 / (1 + np.exp(-x))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-12}[dtype]
    for got, expected in ((y, x * gate), (gradient, gate * (1 + x * (1 - gate)))):
        assert got.dtype == dtype
        assert np.abs(np.asarray(got, "float64") - expected).max() <= tolerance * 16


def test_swish_saves_and_loads(tmp_path: Any):
    inputs = keras.Input((4, 4, 2))
    model = keras.Model(inputs, keras.layers.Activation(swish)(inputs))
    model.save(tmp_path / "m.keras")
    x = draw(1, 4, 4, 2).astype("float32")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
