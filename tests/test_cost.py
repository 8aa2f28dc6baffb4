"""Costs: the paper's printed numbers, and those that can be worked out by hand."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import condconv
from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing, count_cost
from condconv.cost import Cost, count_unbuilt
from models import create_model
from models.paper import PAPER

PRINTED = [row for row in PAPER if row.multiply_adds]


def printed_as(multiply_adds: int, millions: int) -> bool:
    """Whether a count is printed so; the paper rounds, but 567.716 million it prints as 567."""
    return millions in (round(multiply_adds / 1e6), multiply_adds // 10**6)


def count(name: str, rule: str | None = None, **arguments: Any) -> Cost:
    return count_unbuilt(lambda: create_model(name, **arguments), rule)


def test_a_cost_needs_no_weights():
    arguments = {"num_experts": 3, "image_size": 32, "width": 0.25}
    expected = count_cost(create_model("efficientnet_b0", **arguments))
    assert count("efficientnet_b0", **arguments) == expected
    assert count("efficientnet_b0", rule="M", **arguments).rule == "M"


@pytest.mark.parametrize("row", PRINTED, ids=lambda r: f"{r.model}-{r.num_experts}")
def test_multiply_adds_are_those_the_paper_prints(row):
    cost = count(row.model, num_experts=row.num_experts)
    assert printed_as(cost.multiply_adds, row.multiply_adds)
    assert not cost.uncounted
    assert sum(r.parameters for r in cost.rows) == cost.parameters
    assert abs(sum(r.macs for r in cost.rows) - cost.macs) == 0
    parts = sum(r.static + r.mixing + r.routing for r in cost.rows)
    assert 0 <= cost.multiply_adds - parts < 3 * len(cost.rows)  # halves, rounded down row by row


def test_mobilenet_v1_follows_rule_m_and_can_be_counted_by_the_other():
    by_m, by_r = (count("mobilenet_v1", rule, num_experts=8) for rule in (None, "R"))
    assert (by_m.rule, by_r.rule) == ("M", "R")
    assert by_m.static == 567_716_352  # slim's own total, the classifier left out
    assert by_m.mixing == 8 * (3_053_824 + 1_024_000)
    assert by_r.multiply_adds > by_m.multiply_adds
    assert by_r.macs == by_m.macs == by_m.static + 1_024_000 + by_m.mixing + by_m.routing


@pytest.mark.parametrize(
    ("width", "num_experts", "millions"),
    [(0.25, 8, 44.4), (0.25, 32, 55.4), (0.5, 32, 190.2), (0.75, 4, 334.6), (1.0, 32, 698.4)],
)
def test_the_count_follows_width_and_experts(width, num_experts, millions):
    cost = count("mobilenet_v1", width=width, num_experts=num_experts)
    assert cost.multiply_adds / 1e6 == pytest.approx(millions, abs=0.1)


# Of a MobileNetV1 of width 0.25 with 32 experts, in millions: convolutions and classifier, then
# half of what TensorFlow's profiler would see. Derived, not printed in the paper.
ROUTING = [
    ({}, 55.61, 55.72),
    ({"activation": "softmax"}, 55.61, 55.72),
    ({"shared_by": "all"}, 55.57, 55.60),
    ({"hidden": 1 / 8}, 55.60, 55.71),
    ({"hidden": 1}, 55.84, 55.96),
    ({"hidden": 8}, 57.78, 57.89),
    ({"hierarchical": True}, 55.62, 55.73),
]
PLACEMENT = [
    ({"first_condconv_block": 0}, 55.9, 56.4),  # the paper's layer 1, for the stem is the first
    ({"first_condconv_block": 4}, 55.8, 56.0),  # 5
    ({"first_condconv_block": 6}, 55.6, 55.7),  # 7
    ({"first_condconv_block": 12}, 52.5, 52.5),  # 13
    ({"first_condconv_block": 14}, 49.2, 49.2),  # the classifier alone
    ({"condconv_classifier": False}, 47.4, 47.5),
    ({"num_experts": 0}, 41.0, 41.0),
]


def both_counts(**arguments: Any) -> tuple[int, int]:
    """Returns MACs and, by rule R, multiply-adds but for the mixing of the classifier's bias.

    The derivation left that out.
    """
    arguments = {"width": 0.25, "num_experts": 32, **arguments}
    cost = count("mobilenet_v1", rule="R", **arguments)
    static = not arguments["num_experts"] or not arguments.get("condconv_classifier", True)
    mixed = 0 if static else 32 * 1000
    assert not cost.uncounted
    return cost.macs, cost.multiply_adds - mixed


def some_quick(rows: list[tuple], quick: tuple[int, ...]) -> list[Any]:
    """Leaves the other rows to the slow tests."""
    marks = [() if i in quick else pytest.mark.slow for i in range(len(rows))]
    return [pytest.param(*row, marks=m) for row, m in zip(rows, marks, strict=True)]


@pytest.mark.parametrize(("knobs", "macs", "profiler"), some_quick(ROUTING, (2, 5)))
def test_the_ablation_of_routing_costs_what_was_derived(knobs, macs, profiler):
    counts = both_counts(routing=knobs)
    assert counts[0] / 1e6 == pytest.approx(macs, abs=0.005)
    # It is open whether biases of hidden layers were counted: 8·c of them weigh 0.005.
    assert counts[1] / 1e6 == pytest.approx(profiler, abs=0.0057 if "hidden" in knobs else 0.005)


@pytest.mark.parametrize(("arguments", "macs", "profiler"), some_quick(PLACEMENT, (0,)))
def test_the_ablation_of_placement_costs_what_was_derived(arguments, macs, profiler):
    counts = both_counts(**arguments)
    assert [round(count / 1e6, 1) for count in counts] == [macs, profiler]


def functional(*stack: keras.Layer, shape: tuple = (8, 8, 3)) -> keras.Model:
    inputs = x = keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    ("layer", "macs", "multiply_adds"),
    [
        (layers.Conv2D(5, 3), 36 * 27 * 5, 36 * 27 * 5 + 36 * 5 / 2),
        (layers.Conv2D(6, 3, groups=3, use_bias=False), 36 * 9 * 6, 36 * 9 * 6),
        (layers.Conv2D(4, 1, strides=2, use_bias=False, activation="silu"), 192, 192 + 32),
        (layers.Conv2DTranspose(5, 3, use_bias=False), 64 * 27 * 5, 64 * 27 * 5),
        (layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), 36 * 9 * 6, 36 * 9 * 6),
        (layers.SeparableConv2D(5, 3, use_bias=False), 36 * (27 + 15), 36 * (27 + 15)),
        (layers.Dense(7, use_bias=False), 64 * 21, 64 * 21),
        (layers.GlobalAveragePooling2D(), 0, 64 * 3 / 2),
        (layers.MaxPooling2D(2), 0, 4 * 16 * 3 / 2),
        (layers.Activation("silu"), 0, 96),
        (layers.Activation("relu"), 0, 0),
        (layers.BatchNormalization(), 0, 0),
        (layers.Rescaling(2.0), 0, 0),
        # Mixing n·|W|; the layer's own routing c·n, its pooling 64·3/2 and its bias n/2.
        (CondConv2D(5, 3, 4, use_bias=False), 36 * 135 + 4 * 135 + 12, 5400 + 12 + 96 + 2),
        (
            DepthwiseCondConv2D(3, 4, use_bias=False),
            36 * 27 + 4 * 27 + 12,
            36 * 27 + 4 * 27 + 12 + 96 + 2,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_single_layers_by_hand(layer, macs, multiply_adds):
    cost = count_cost(functional(layer))
    assert cost.macs == macs
    assert cost.multiply_adds == multiply_adds
    assert cost.rule == "R"


def test_a_conditional_dense_layer_by_hand():
    cost = count_cost(functional(CondDense(5, 4), shape=(6,)))
    assert (cost.macs_static, cost.macs_mixing, cost.macs_routing) == (30, 4 * 30, 24)
    # The bias: mixed from four, then added; the routing's own bias.
    assert (cost.static, cost.mixing, cost.routing) == (30 + 2, 4 * 30 + 4 * 5, 24 + 2)


def test_a_residual_sum_costs_a_half_each_as_layer_and_as_operator():
    inputs = keras.Input((4, 4, 2))
    by_layer = keras.Model(inputs, layers.Add()([inputs, inputs, inputs]))
    by_operator = keras.Model(inputs, inputs + inputs)
    assert count_cost(by_layer).multiply_adds == 32
    assert count_cost(by_operator).multiply_adds == 16


def test_a_layer_used_twice_costs_twice_and_has_its_parameters_once():
    conv = layers.Conv2D(3, 3, padding="same", use_bias=False)
    inputs = keras.Input((8, 8, 3))
    cost = count_cost(keras.Model(inputs, conv(conv(inputs))))
    assert cost.macs == 2 * 64 * 81
    assert cost.parameters == 81
    assert [row.parameters for row in cost.rows] == [81]


def test_models_in_models_are_counted_by_their_parts():
    inner = functional(CondConv2D(3, 3, 2, padding="same"))
    outer = keras.Sequential([keras.Input((8, 8, 3)), inner, layers.Flatten(), layers.Dense(2)])
    cost = count_cost(outer)
    assert cost.macs == count_cost(inner).macs + 192 * 2
    assert not cost.uncounted
    assert f"{inner.name}/{inner.layers[-1].name}" in [row.layer for row in cost.rows]


class Stranger(keras.Model):
    def __init__(self):
        super().__init__()
        self.routing = Routing(4)
        self.conv = CondConv2D(8, 3, 4, padding="same", use_bias=False)
        self.head = layers.Dense(3, use_bias=False)

    def call(self, inputs):
        x = self.conv(inputs, self.routing(inputs))
        return self.head(ops.mean(x, axis=(1, 2)))


def test_a_strangers_subclassed_model_is_counted_and_what_cannot_be_seen_is_named():
    model = Stranger()
    with pytest.raises(ValueError, match="not built"):
        count_cost(model)
    model(np.zeros((2, 8, 8, 3), "float32"))
    with pytest.warns(UserWarning, match="arithmetic in the call of Stranger"):
        cost = count_cost(model)
    assert cost.macs == 64 * 27 * 8 + 4 * 27 * 8 + 12 + 24
    assert cost.uncounted == ("arithmetic in the call of Stranger itself",)
    with pytest.warns(UserWarning, match="not counted"):
        larger = count_cost(model, image_size=16)
    assert larger.macs_static == 4 * 64 * 27 * 8 + 24


def test_an_unknown_layer_is_never_silently_free():
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs))
    with pytest.warns(UserWarning, match="MultiHeadAttention"):
        cost = count_cost(model)
    assert any("EinsumDense" in entry for entry in cost.uncounted)


class Twice(layers.Conv2D):
    def call(self, inputs):
        return super().call(super().call(inputs))


class Standardised(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel, axis=(0, 1, 2)))


class Attentive(CondConv2D):
    def apply_experts(self, x, routing_weights, training):
        return super().apply_experts(x, ops.softmax(routing_weights), training)


class Renamed(layers.Conv2D):
    """Changes nothing of what a convolution does."""


@pytest.mark.parametrize(
    "layer", [Twice(3, 3, padding="same"), Standardised(3, 3), Attentive(3, 3, 2)], ids=repr
)
def test_a_subclass_that_computes_its_own_way_is_not_counted_by_its_parents(layer):
    with pytest.warns(UserWarning, match=type(layer).__name__):
        cost = count_cost(functional(layer))
    assert f"{layer.name} ({type(layer).__name__})" in cost.uncounted[0]
    assert layer.name not in [row.layer for row in cost.rows]


def test_a_subclass_that_computes_as_its_parent_is_counted():
    assert count_cost(functional(Renamed(5, 3))).macs == 36 * 27 * 5


class Doubled(keras.Model):
    def call(self, inputs):
        return super().call(inputs) * 2


class DoubledSequential(keras.Sequential):
    def call(self, inputs):
        return super().call(inputs) * 2


def test_arithmetic_in_a_subclassed_graph_is_named():
    inputs = keras.Input((6,))
    models = (
        Doubled(inputs, layers.Dense(2, use_bias=False)(inputs)),
        DoubledSequential([inputs, layers.Dense(2, use_bias=False)]),
    )
    for model in models:
        with pytest.warns(UserWarning, match="arithmetic in the call of Doubled"):
            cost = count_cost(model)
        assert cost.macs == 12
        assert len(cost.uncounted) == 1


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_a_quantised_layer_does_as_many_multiply_adds_and_its_scales_are_named(mode):
    model = functional(layers.Dense(7), layers.Dense(2), shape=(6,))
    plain, dense = count_cost(model), model.layers[1]
    dense.quantize(mode)
    with pytest.warns(UserWarning, match="quantisation"):
        cost = count_cost(model)
    assert (cost.macs, cost.multiply_adds) == (plain.macs, plain.multiply_adds)
    assert cost.uncounted == (f"quantisation of {dense.name} (Dense)",)
    assert cost.parameters == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert not {"call", "quantized_call"} & set(vars(dense))


def test_lora_is_named_and_its_factors_are_parameters():
    model = functional(layers.Dense(7, use_bias=False), shape=(6,))
    model.layers[1].enable_lora(2)
    with pytest.warns(UserWarning, match="LoRA"):
        cost = count_cost(model)
    assert (cost.macs, cost.parameters) == (6 * 7, 6 * 2 + 2 * 7)
    assert cost.uncounted == (f"LoRA of {model.layers[1].name} (Dense)",)


def test_open_sizes_tell_where_the_channels_are():
    conv = layers.Conv2D(5, 3, data_format="channels_first", use_bias=False)
    model = functional(conv, shape=(3, None, None))
    assert count_cost(model, image_size=8).macs == 36 * 27 * 5
    with pytest.raises(ValueError, match="pass image_size"):
        count_cost(model)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_an_impossible_image_size_is_refused(size):
    model = functional(layers.Flatten())
    with pytest.raises(ValueError, match="image_size takes an integer of at least 1, not"):
        count_cost(model, image_size=size)


def test_an_open_image_size_has_to_be_given():
    model = create_model("mobilenet_v1", width=0.25, image_size=None)
    with pytest.raises(ValueError, match="pass image_size"):
        count_cost(model)
    fixed = create_model("mobilenet_v1", width=0.25, image_size=128)
    assert count_cost(model, image_size=128) == count_cost(fixed)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule takes one of R, M, not 'X'"):
        count_cost(functional(layers.Flatten()), rule="X")


def test_counting_leaves_the_model_as_it_was():
    model = functional(CondConv2D(3, 3, 2, padding="same"))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    before = np.asarray(model(images))
    first, second = count_cost(model), count_cost(model)
    assert first == second
    np.testing.assert_array_equal(np.asarray(model(images)), before)
    assert not any("call" in vars(layer) for layer in model.layers)
    assert isinstance(first, condconv.Cost)
