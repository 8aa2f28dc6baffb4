"""In which precision the layers keep weights, mix, route and compute."""

from typing import Any

import keras
import numpy as np
import numpy_reference as reference
import pytest
from layer_cases import (
    CHANNELS,
    LAYERS,
    TRAINING,
    Layer,
    built,
    dtype_of,
    error,
    inputs_of,
    make,
    mixture_of,
    numbers,
    policy,
    slow_on_jax,
    tf_only,
    to_numpy,
)

import condconv.ops as conditional
from condconv import Routing
from condconv.layers import Logits


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
