"""Folded networks compute what the networks with batch normalisation did."""

from typing import Any

import keras
import numpy as np
import numpy_reference
import pytest
from folded_models import (
    block,
    chain,
    difference,
    disturb,
    functional,
    left,
    numbers,
    outputs,
    pixels,
    precision,
)
from keras import layers, ops

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing, count_cost
from condconv import fold_batch_norm as fold
from condconv.layers import Logits
from condconv.normalization import BatchNormalization, BatchNormShift
from models import create_model, list_models

BACKEND = keras.backend.backend()
TINY = {"width": 0.1, "num_classes": 7, "image_size": 64, "batch_norm_momentum": 0.0}

without_jax = pytest.mark.skipif(BACKEND == "jax", reason="JAX computes in float32 by default")


def network(name: str, num_experts: int, policy: str = "float32") -> keras.Model:
    """A disturbed network.

    In float64 its statistics are those of its activations, so that the images' differences reach
    the logits. In float32 so would those of rounding, ten thousand times as large.
    """
    keras.utils.set_random_seed(0)
    with precision(policy):
        model = disturb(create_model(name, num_experts=num_experts, **TINY))
    if policy == "float64":
        model(pixels(16), training=True)
    return model


PRECISIONS = {"float64": 1e-10, "float32": 1e-5, "mixed_bfloat16": 2e-2}
# In mixed_bfloat16 the deepest networks are off by more than that with batch normalisation too.
DEEPEST = ("efficientnet_b0_depth", "mnasnet_a1")


def marks(name: str, num_experts: int, policy: str) -> list[pytest.MarkDecorator]:
    fast = ("mobilenet_v1", 2, "float32" if BACKEND == "jax" else "float64")
    slow = (name, num_experts, policy) != fast
    return [pytest.mark.slow] * slow + [without_jax] * (policy == "float64")


@pytest.mark.parametrize(
    ("name", "num_experts", "policy"),
    [
        pytest.param(name, n, policy, marks=marks(name, n, policy))
        for name in list_models()
        for n in (0, 2)
        for policy in PRECISIONS
        if policy != "mixed_bfloat16" or name not in DEEPEST
    ],
)
def test_networks_are_folded_whole(name, num_experts, policy):
    model = network(name, num_experts, policy)
    folded = fold(model)
    for batch in (1, 5):
        result, expected = (outputs(m, pixels(batch))[0] for m in (folded, model))
        largest = np.abs(expected).max()
        assert np.abs(result - expected).max() <= PRECISIONS[policy] * largest
    if policy == "float64":
        assert expected.std(0).max() > 1e-2 * largest
    assert left(model)
    assert not left(folded)
    assert folded.count_params() < model.count_params()
    paths = {v.path for v in [*model.variables, *folded.variables] if "seed_gen" not in v.path}
    assert all(p.endswith("/bias") for p in paths - {v.path for v in model.variables})
    before, after = count_cost(model), count_cost(folded)
    assert not after.uncounted
    for part in ("rule", "static", "mixing", "routing", "macs_static", "macs_mixing"):
        assert getattr(after, part) == getattr(before, part)


def test_a_bias_that_was_there_costs_as_before_and_a_new_one_nothing():
    shape = (8, 8, 3)
    for use_bias, halves in ((True, 64 * 5), (False, 0)):
        norm = layers.BatchNormalization()
        model = functional(chain(layers.Conv2D(5, 1, use_bias=use_bias), norm), shape)
        cost = count_cost(fold(model))
        assert (cost.macs, cost.multiply_adds) == (64 * 15, 64 * 15 + halves // 2)
        assert cost.parameters == 15 + 5


FOLDABLE = {
    "convolution": layers.Conv2D(6, 3, use_bias=False),
    "with a bias": layers.Conv2D(6, 3, strides=2, padding="same"),
    "grouped": layers.Conv2D(6, 3, groups=2, use_bias=False),
    "dilated": layers.Conv2D(6, 3, dilation_rate=2),
    "depthwise": layers.DepthwiseConv2D(3, use_bias=False),
    "depthwise, multiplied": layers.DepthwiseConv2D(3, depth_multiplier=3),
    "dense": layers.Dense(5),
    "conditional": CondConv2D(6, 3, 3, use_bias=False),
    "conditional with biases": CondConv2D(6, 1, 3),
    "conditional, channels first": CondConv2D(6, 3, 3, data_format="channels_first"),
    "conditional depthwise": DepthwiseCondConv2D(3, 3, use_bias=False),
    "conditional depthwise, multiplied": DepthwiseCondConv2D(3, 3, depth_multiplier=3),
}
if BACKEND == "jax":
    FOLDABLE["channels first"] = layers.Conv2D(6, 3, data_format="channels_first")


@pytest.mark.parametrize("case", FOLDABLE)
def test_a_layer_takes_the_normalisation_behind_it_in(case):
    layer = type(FOLDABLE[case]).from_config(FOLDABLE[case].get_config())
    axis = 1 if getattr(layer, "data_format", "") == "channels_first" else -1
    model = functional(chain(layer, BatchNormalization(axis=axis, name="bn"), layers.ReLU()))
    folded = fold(model)
    assert not left(folded)
    assert difference(folded, model, numbers(3, 9, 8, 4)) <= 1e-5
    conditional = "conditional" in case
    kinds = [type(part) for part in folded.layers]
    assert kinds == [type(p) for p in model.layers[:2]] + [BatchNormShift] * conditional + [
        layers.ReLU
    ]
    assert folded.get_layer(layer.name).use_bias or conditional
    assert not conditional or folded.get_layer("bn").axis == axis


@pytest.mark.parametrize("norm", [BatchNormalization, layers.BatchNormalization])
@pytest.mark.parametrize(
    "arguments", [{"scale": False}, {"center": False}, {"axis": 3, "epsilon": 0.5}], ids=str
)
def test_all_normalisations_of_channels_are_folded(norm, arguments):
    def stack(x: Any) -> Any:
        x = norm(**arguments)(layers.Conv2D(6, 3)(x))
        weights = Routing(3)(x)
        x = norm(**arguments)(CondConv2D(5, 3, 3)(x, weights))
        x = layers.GlobalAveragePooling2D()(x)
        return norm(**arguments | {"axis": -1})(CondDense(4, 3)(x, weights))

    model = functional(stack)
    assert not left(fold(model))
    assert difference(fold(model), model, numbers(3, 9, 8, 4)) <= 1e-5


def test_a_folded_conditional_layer_equals_plain_numpy():
    layer = DepthwiseCondConv2D(3, 3, depth_multiplier=2, padding="same", name="depthwise")
    norm = BatchNormalization(epsilon=0.1, name="bn")
    images, weights = keras.Input((5, 4, 3)), keras.Input((3,))
    model = disturb(keras.Model([images, weights], norm(layer(images, weights))))
    folded = fold(model)
    x, r = numbers(2, 5, 4, 3), np.abs(numbers(2, 3))
    get = {v.path: ops.convert_to_numpy(v).astype("float64") for v in model.variables}
    new = {v.path: ops.convert_to_numpy(v).astype("float64") for v in folded.variables}
    factor = get["bn/gamma"] / np.sqrt(get["bn/moving_variance"] + 0.1)

    experts, biases = get["depthwise/kernel"], get["depthwise/bias"]
    expected = numpy_reference.depthwise_conv2d(x, r, experts, biases, (1, 1), "same", (1, 1))
    expected = (expected - get["bn/moving_mean"]) * factor + get["bn/beta"]
    assert np.abs(outputs(folded, x, r)[0] - expected).max() <= 1e-5 * np.abs(expected).max()

    for channel in range(3):  # output channels are those of an input channel, one by one
        for m in range(2):
            kernel = experts[..., channel, m] * factor[channel * 2 + m]
            np.testing.assert_allclose(new["depthwise/kernel"][..., channel, m], kernel, 1e-6)
    np.testing.assert_allclose(new["depthwise/bias"], biases * factor, 1e-6)
    shift = get["bn/beta"] - get["bn/moving_mean"] * factor
    np.testing.assert_allclose(new["bn/bias"], shift, 1e-6)
    assert set(new) == {"depthwise/kernel", "depthwise/bias", "bn/bias"}


@pytest.mark.parametrize("num_experts", [0, 2])
@pytest.mark.parametrize(
    "name", ["", *(pytest.param(n, marks=pytest.mark.slow) for n in list_models())]
)
def test_a_folded_model_saves_and_loads_with_its_cost(name, num_experts, tmp_path):
    def stack(x: Any) -> Any:
        conv = CondConv2D(4, 3, 2) if num_experts else layers.Conv2D(4, 3, use_bias=False)
        x = layers.GlobalAveragePooling2D()(BatchNormalization()(conv(x)))
        return Logits("M")(layers.Dense(3)(x))

    model = network(name, num_experts) if name else functional(stack, (64, 64, 3))
    folded = fold(model)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras", safe_mode=True)
    np.testing.assert_array_equal(outputs(loaded, pixels(2))[0], outputs(folded, pixels(2))[0])
    assert count_cost(loaded) == count_cost(folded)
    for rule in (None, "M", "R"):
        assert count_cost(loaded, rule).static == count_cost(model, rule).static
    assert count_cost(loaded).rule == ("M" if name in ("", "mobilenet_v1") else "R")


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        ("mixed_bfloat16", 2e-2),
        ("mixed_float16", 5e-3),
        ("bfloat16", 5e-2),
        pytest.param("float64", 1e-12, marks=without_jax),
    ],
)
def test_precisions_are_kept(policy, tolerance):
    with precision(policy):
        model = functional(chain(block("block"), layers.Conv2D(4, 3), BatchNormalization()))
    folded, containers = fold(model), (keras.Model, layers.InputLayer)
    assert not left(folded)
    assert difference(folded, model, numbers(5, 9, 8, 4)) <= tolerance
    policies, expected = (
        {p.name: p.dtype_policy.name for p in m._flatten_layers() if not isinstance(p, containers)}
        for m in (folded, model)
    )
    assert policies.items() <= expected.items()
    assert [v.dtype for v in folded.variables] == [model.variables[0].dtype] * len(folded.variables)


def test_a_folded_model_outlives_what_is_done_to_the_original():
    model = functional(chain(CondConv2D(5, 3, num_experts=2), BatchNormalization()))
    folded, x = fold(model), numbers(2, 9, 8, 4)
    before = outputs(folded, x)[0]
    model.compile("sgd", "mse")
    model.fit(x, np.ones_like(before), verbose=0)
    np.testing.assert_array_equal(outputs(folded, x)[0], before)
