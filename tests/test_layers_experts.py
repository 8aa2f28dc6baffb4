"""What a mixture of kernels must satisfy, whatever the numbers, and how the experts start."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import initializers
from layer_cases import (
    CHANNELS,
    LAYERS,
    MODES,
    OUT,
    TRAINING,
    Layer,
    built,
    error,
    forward_and_gradients,
    inputs_of,
    mixture_of,
    numbers,
    slow_on_jax,
    to_numpy,
)

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D

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


@pytest.mark.parametrize("layer", LAYERS)
def test_biases_are_mixed_like_the_kernels(layer: str):
    instance, x, routing = built(layer), inputs_of(layer), mixture_of(3, 4)
    instance.kernel.assign(np.zeros(instance.kernel.shape))
    y = to_numpy(instance(x, routing))
    expected = (routing @ to_numpy(instance.bias)).reshape(3, *(1,) * (y.ndim - 2), -1)
    assert error(y, np.broadcast_to(expected, y.shape)) <= 1e-6


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
