"""Empty batches, batches and maps of unknown size, and channels that come first."""

import itertools
from typing import Any

import keras
import numpy as np
import numpy_reference as reference
import pytest
from layer_cases import (
    BACKEND,
    CHANNELS,
    DILATED,
    GEOMETRIES,
    OUT,
    TRAINING,
    Case,
    built,
    error,
    inputs_of,
    mixture_of,
    mostly_slow,
    numbers,
    slow_on_jax,
    tf_only,
    to_numpy,
    windowed,
)

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing

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


# Batches and maps of unknown size.


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
