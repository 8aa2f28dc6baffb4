import inspect
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import BACKEND, MODES, Array, Layer, dtype_of, error, numbers, tf_only, to_numpy

from condconv.normalization import BatchNormalization, PixelNormalization, at_least_float32


def set_weights(*layers: Layer) -> None:
    """Gives layers the same weights, unlike those that they start with."""
    for layer in layers:
        for weight in layer.weights:
            value = 0.5 + np.abs(numbers(*weight.shape, seed=len(weight.name)))
            weight.assign(value * (1 if weight.name != "beta" else -1))


def stepper(layer: Layer, mode: str, training: bool) -> Any:
    """A function of inputs and the output's gradient: output and gradients of inputs and weights.

    It updates the layer's statistics where the layer does.
    """
    trainable = [weight.value for weight in layer.trainable_weights]
    if BACKEND == "jax":
        import jax

        def run(x: Any, gradient: Any, others: list[Any]) -> tuple:
            def forward(x: Any, weights: list[Any]) -> Any:
                return layer.stateless_call(weights, others, x, training=training)

            y, backward, others = jax.vjp(forward, x, trainable, has_aux=True)
            d_x, d_weights = backward(gradient)
            return y, [d_x, *d_weights], others

        compiled = jax.jit(run)

        def step(x: Array, gradient: Array) -> tuple:
            variables = layer.non_trainable_variables
            y, gradients, others = compiled(x, gradient, [v.value for v in variables])
            for variable, value in zip(variables, others, strict=True):
                variable.assign(value)
            return y, gradients

        return step

    import tensorflow as tf

    def run(x: tf.Tensor, gradient: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            loss = tf.reduce_sum(tf.cast(y, gradient.dtype) * gradient)
        return y, tape.gradient(loss, [x, *trainable])

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "jit")
    return lambda x, gradient: run(tf.constant(x), tf.constant(gradient))


CASES = {
    "plain": ({}, (4, 5, 3, 6)),
    "constants": ({"momentum": 0.9, "epsilon": 1e-5}, (3, 2, 4, 5)),
    "one image": ({"axis": 3}, (1, 4, 3, 2)),
    "no scale": ({"scale": False}, (4, 5, 3, 6)),
    "no center": ({"center": False}, (4, 5, 3, 6)),
    "channels first": ({"axis": 1}, (4, 3, 5, 6)),
    "vectors": ({}, (8, 6)),
    "sequences": ({}, (4, 5, 6)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("case", "mode"),
    [*((case, MODES[0]) for case in CASES), *(("plain", mode) for mode in MODES[1:])],
)
def test_equals_keras_in_outputs_gradients_and_statistics(case: str, mode: str, training: bool):
    arguments, shape = CASES[case]
    ours, theirs = BatchNormalization(**arguments), keras.layers.BatchNormalization(**arguments)
    for layer in (ours, theirs):
        layer.build(shape)
    set_weights(ours, theirs)
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    steps = [stepper(layer, mode, training) for layer in (ours, theirs)]
    start = to_numpy(ours.moving_mean)
    for i in range(3 if training else 1):
        x, gradient = numbers(*shape, seed=i, mean=0.3), numbers(*shape, seed=10 + i)
        (y, gradients), (expected, expected_gradients) = (step(x, gradient) for step in steps)
        assert error(y, expected) <= 1e-5
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert error(actual, wanted) <= 1e-5
        for actual, wanted in zip(ours.weights, theirs.weights, strict=True):
            assert error(actual, wanted) <= 1e-5, actual.path
    assert np.any(to_numpy(ours.moving_mean) != start) == training


@tf_only
@pytest.mark.parametrize("case", ["plain", "constants", "one image"])
def test_these_are_fused(case: str):
    arguments, shape = CASES[case]
    layer = BatchNormalization(**arguments)
    layer.build(shape)
    assert layer._can_fuse(ops.zeros(shape), None)
    assert not layer._can_fuse(ops.zeros(shape), ops.ones(shape[:-1]))


def test_statistics_are_those_of_the_batch_without_bessels_correction():
    layer, x = BatchNormalization(momentum=0.75), numbers(2, 3, 1, 4, mean=2.0)
    layer(x, training=True)
    pixels = to_numpy(x).reshape(-1, 4)
    assert error(layer.moving_mean, 0.25 * pixels.mean(0)) <= 1e-6
    assert error(layer.moving_variance, 0.75 + 0.25 * pixels.var(0)) <= 1e-6


def test_a_frozen_layer_keeps_to_its_statistics():
    x, layers = numbers(3, 4, 5, 6), (BatchNormalization(), keras.layers.BatchNormalization())
    for layer in layers:
        layer.build(x.shape)
        layer.trainable = False
    set_weights(*layers)
    ours, theirs = (layer(x, training=True) for layer in layers)
    assert error(ours, theirs) <= 1e-5
    assert error(layers[0].moving_mean, layers[1].moving_mean) == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_has_its_effect(training: bool):
    x, mask = numbers(3, 4, 5, 6), np.random.default_rng(0).uniform(size=(3, 4, 5)) < 0.5
    layers = BatchNormalization(), keras.layers.BatchNormalization()
    for layer in layers:
        layer.build(x.shape)
    ours, theirs = (layer(x, training=training, mask=ops.array(mask)) for layer in layers)
    assert error(ours, theirs) <= 1e-5
    assert error(layers[0].moving_variance, layers[1].moving_variance) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_keeps_weights_and_statistics_in_float32(
    dtype: str, mode: str, training: bool
):
    mixed, plain = BatchNormalization(dtype=f"mixed_{dtype}"), BatchNormalization()
    # Of a size whose squares float16 could not hold.
    x = numbers(4, 5, 3, 6, mean=1.0) * 300
    x, gradient = x.astype("float16").astype("float32"), numbers(4, 5, 3, 6, seed=1)
    for layer in (mixed, plain):
        layer.build(x.shape)
        assert {dtype_of(weight.value) for weight in layer.weights} == {"float32"}
    set_weights(mixed, plain)
    if BACKEND == "jax":
        y, expected = mixed(x, training=training), plain(x, training=training)
    else:
        y, gradients = stepper(mixed, mode, training)(x, gradient)
        expected, expected_gradients = stepper(plain, mode, training)(x, gradient)
        assert [dtype_of(g) for g in gradients] == ["float32"] * 3
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert error(actual, wanted) <= 2e-2
    assert dtype_of(y) == dtype
    assert error(y, expected) <= 2e-2
    for weight, wanted in zip(mixed.weights, plain.weights, strict=True):
        assert dtype_of(weight.value) == "float32"
        # The statistics are of inputs rounded to the compute dtype, taken in float32.
        assert error(weight, wanted) <= (4e-3 if dtype == "bfloat16" else 1e-5), weight.path


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("mode", MODES)
def test_one_pixel_gives_no_nan(mode: str, dtype: str):
    layer, x = BatchNormalization(dtype=dtype), numbers(1, 1, 1, 4)
    layer.build(x.shape)
    set_weights(layer)
    before = to_numpy(layer.moving_variance)
    if BACKEND == "jax":
        y = layer(x, training=True)
    else:
        y, gradients = stepper(layer, mode, True)(x, np.ones_like(x))
        assert all(np.all(np.isfinite(to_numpy(gradient))) for gradient in gradients)
    assert error(y, to_numpy(layer.beta).reshape(x.shape)) <= 1e-2
    assert error(layer.moving_variance, 0.99 * before) <= 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions_equal_keras(dtype: str, training: bool):
    if dtype == "float64" and BACKEND == "jax":
        pytest.skip("off by default on JAX")
    layers = BatchNormalization(dtype=dtype), keras.layers.BatchNormalization(dtype=dtype)
    x = ops.cast(numbers(4, 5, 3, 6), dtype)
    for layer in layers:
        layer.build(x.shape)
    set_weights(*layers)
    ours, theirs = (layer(x, training=training) for layer in layers)
    assert dtype_of(ours) == dtype
    assert error(ours, theirs) <= {"bfloat16": 2e-2, "float16": 5e-3, "float64": 1e-12}[dtype]


@tf_only
def test_one_graph_serves_any_batch_and_any_map():
    import tensorflow as tf

    ours, theirs = BatchNormalization(), keras.layers.BatchNormalization()
    for layer in (ours, theirs):
        layer.build((None, None, None, 3))
    run = tf.function(
        lambda x: ours(x, training=True),
        input_signature=[tf.TensorSpec((None, None, None, 3))],
    )
    for i, shape in enumerate(((1, 2, 3, 3), (3, 5, 4, 3))):
        x = numbers(*shape, seed=i)
        assert error(run(x), theirs(x, training=True)) <= 1e-5
        assert error(ours.moving_variance, theirs.moving_variance) <= 1e-5


def test_configuration_round_trip():
    arguments = {
        "axis": 1,
        "momentum": 0.9,
        "epsilon": 1e-5,
        "center": False,
        "scale": False,
        "gamma_initializer": keras.initializers.Constant(0.5),
        "gamma_regularizer": keras.regularizers.L2(0.1),
        "name": "mine",
        "dtype": "mixed_bfloat16",
    }
    layer = BatchNormalization(**arguments)
    description = keras.saving.serialize_keras_object(layer)
    assert description["registered_name"] == "condconv>BatchNormalization"
    copy = keras.saving.deserialize_keras_object(description)
    assert type(copy) is BatchNormalization
    assert copy.get_config() == layer.get_config()
    assert (copy.axis, copy.momentum, copy.epsilon) == (1, 0.9, 1e-5)
    assert (copy.name, copy.dtype_policy.name) == ("mine", "mixed_bfloat16")
    assert not copy.autocast
    known = set(inspect.signature(keras.layers.BatchNormalization).parameters) - {"kwargs"}
    assert known <= set(copy.get_config())


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_pixels_are_normalised_in_float32(policy: str, dtype: str):
    mean, deviation = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    layer = PixelNormalization(mean, deviation, dtype=policy)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(dtype)
    y = layer(x)
    assert dtype_of(y) == "float32"
    assert error(y, (x.astype("float64") - mean) / deviation) <= 1e-6
    assert layer.compute_output_shape(x.shape) == x.shape
    description = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(description)
    assert copy.get_config() == layer.get_config()
    np.testing.assert_array_equal(to_numpy(copy(x)), to_numpy(y))


@pytest.mark.parametrize("deviation", [(1.0, 2.0), (1.0, 2.0, 0.0), (1.0, 2.0, -1.0)], ids=str)
def test_pixels_need_a_positive_deviation_for_each_channel(deviation: tuple[float, ...]):
    with pytest.raises(ValueError, match="positive deviation for each channel"):
        PixelNormalization((1.0, 2.0, 3.0), deviation)


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (None, None, None, 4), (2, 2)], ids=str)
def test_pixels_of_other_channels_are_refused_when_built(shape: tuple[int | None, ...]):
    layer = PixelNormalization((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=f"of 3 channels, and its input has {shape[-1]}"):
        layer(keras.KerasTensor(shape))


@tf_only
def test_pixels_are_normalised_in_float64_under_its_policy():
    layer = PixelNormalization((0.1,), (0.3,), dtype="float64")
    y = layer(np.ones((1, 1, 1, 1), "uint8"))
    assert dtype_of(y) == "float64"
    assert abs(to_numpy(y).item() - (1 - 0.1) / 0.3) <= 1e-15
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert copy.compute_dtype == "float64"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", "float64"),
        (np.float64, "float64"),
        (keras.DTypePolicy("float64"), "float64"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
        (np.float16, "float32"),
        ("mixed_float16", "float32"),
        (keras.DTypePolicy("mixed_bfloat16"), "float32"),
        ({"class_name": "DTypePolicy", "config": {"name": "float64"}}, "float64"),
        (None, "float32"),
    ],
    ids=str,
)
def test_at_least_float32(dtype: Any, expected: str):
    assert at_least_float32(dtype) == expected


def test_at_least_float32_follows_the_policy_in_force():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        assert at_least_float32() == "float64"
    finally:
        keras.config.set_dtype_policy(before)
