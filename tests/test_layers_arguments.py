"""Arguments out of range, inputs of a wrong shape; regularizers, constraints and activations."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import regularizers
from layer_cases import (
    CHANNELS,
    LAYERS,
    OUT,
    built,
    error,
    inputs_of,
    make,
    mixture_of,
    numbers,
    to_numpy,
)

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing

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
