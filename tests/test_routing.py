"""Routing with hidden units, with others' weights in sight, and shared: in layers and networks."""

import dataclasses
import functools
from typing import Any

import keras
import numpy as np
import pytest
from keras import initializers

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing, count_cost
from condconv import fold_batch_norm as folded
from models import create_model, list_models
from models.blocks import Stage, inverted_bottleneck, separable
from models.network import Network

Array = np.ndarray

EXPERTS = 3
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0])

KNOBS = {
    "default": {},
    "softmax": {"activation": "softmax"},
    "hidden": {"hidden": 4},
    "pairs": {"shared_by": 2},
    "all": {"shared_by": "all"},
    "hierarchical": {"hierarchical": True},
    "together": {"activation": "tanh", "hidden": 2, "shared_by": 3, "hierarchical": True},
}
EACH = [pytest.param(k, marks=() if k == "together" else pytest.mark.slow) for k in KNOBS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Network):
    """Has six conditional parts: stem, three blocks, head and classifier."""

    name = "small"
    stages = (
        Stage(block=separable, repeats=2, filters=8),
        Stage(block=inverted_bottleneck, repeats=1, filters=8, expansion=2),
    )
    stem_filters = 8
    head_filters = 8

    num_classes: int = 3
    num_experts: int = EXPERTS
    image_size: int | None = 16
    dropout: float = 0.1
    first_condconv_block: int = 0
    condconv_head: bool = True
    condconv_classifier: bool = True


def small(knobs: dict[str, Any], **arguments: Any) -> keras.Model:
    return disturbed(Small(routing=knobs, **arguments).build())


def disturbed(model: keras.Model) -> keras.Model:
    """Gives every weight a value that matters."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.path.endswith("moving_variance"):
            weight.assign(rng.uniform(0.5, 2, weight.shape))
        elif weight.path.split("/")[-1] not in ("seed_generator_state", "kernel"):
            weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    return model


@functools.cache
def example(knobs: str) -> keras.Model:
    return small(KNOBS[knobs])


def numpy(tensor: Any) -> Array:
    return keras.ops.convert_to_numpy(tensor)


def logits(model: keras.Model) -> Array:
    return numpy(model(IMAGES))


def routings(model: keras.Model) -> list[Routing]:
    return [layer for layer in model.layers if isinstance(layer, Routing)]


def conditional(model: keras.Model) -> list[keras.Layer]:
    kinds = (CondConv2D, DepthwiseCondConv2D, CondDense)
    return [layer for layer in model.layers if isinstance(layer, kinds)]


def near(actual: Array, expected: Array) -> bool:
    return bool(np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max())


def dense(x: Array, kernel: Array, bias: Array | None) -> Array:
    return x @ kernel + (0 if bias is None else bias)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("previous", [0, 2])
@pytest.mark.parametrize("hidden_units", [0, 5])
def test_hidden_units_and_weights_before_equal_numpy(hidden_units, previous, use_bias):
    layer = Routing(EXPERTS, hidden_units=hidden_units, use_bias=use_bias)
    rng = np.random.default_rng(2)
    x, seen = rng.normal(size=(3, 4, 5, 6)), rng.uniform(size=(3, previous))
    arguments = [a.astype("float32") for a in (x, seen)[: 2 if previous else 1]]
    layer(*arguments)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    weights = {w.name: numpy(w) for w in layer.weights}
    y = np.concatenate([x.mean((1, 2)), seen], axis=1)
    if hidden_units:
        y = np.maximum(dense(y, weights["hidden_kernel"], weights.get("hidden_bias")), 0)
    expected = 1 / (1 + np.exp(-dense(y, weights["kernel"], weights.get("bias"))))
    assert near(numpy(layer(*arguments)), expected)
    assert len(weights) == (1 + bool(hidden_units)) * (1 + use_bias)


def test_the_two_kernels_start_unlike_each_other():
    layer = Routing(6, hidden_units=6, kernel_initializer=initializers.GlorotUniform(seed=3))
    layer.build((None, 6))
    assert np.abs(numpy(layer.hidden_kernel) - numpy(layer.kernel)).min() > 1e-6
    plain = Routing(6, kernel_initializer=initializers.GlorotUniform(seed=3))
    plain.build((None, 6))
    np.testing.assert_array_equal(numpy(plain.kernel), numpy(layer.kernel))


def test_weights_before_are_seen_in_every_call_or_in_none():
    x, seen = np.ones((2, 4), "float32"), np.ones((2, 3), "float32")
    with_them, without = Routing(2), Routing(2)
    with_them(x, seen)
    without(x)
    for layer, *arguments in ((with_them, x), (with_them, x, seen[:, :2]), (without, x, seen)):
        with pytest.raises(ValueError, match=r"sees (3|no) weights of a routing before it"):
            layer(*arguments)
        with pytest.raises(ValueError, match=r"sees (3|no) weights of a routing before it"):
            layer(*(keras.KerasTensor(a.shape) for a in arguments))
    with pytest.raises(ValueError, match=r"takes the weights .* Received: shape \(2, 3, 1\)"):
        Routing(2)(x, seen[..., None])


def test_what_was_saved_before_there_were_hidden_units_loads():
    description = keras.saving.serialize_keras_object(Routing(2, name="mine"))
    assert description["registered_name"] == "condconv>Routing"
    del description["config"]["hidden_units"]
    description["module"] = "condconv.layers"  # where it lived then
    assert keras.saving.deserialize_keras_object(description).hidden_units == 0


def test_a_hierarchical_routing_by_hand():
    inputs = keras.Input((4, 4, 6))
    first = Routing(3, use_bias=False)(inputs)
    second = Routing(2, hidden_units=5)(inputs, first)
    cost = count_cost(keras.Model(inputs, second), rule="R")
    assert cost.macs == cost.macs_routing == 6 * 3 + (6 + 3) * 5 + 5 * 2
    assert cost.multiply_adds == cost.macs + 2 * 96 / 2 + (5 + 2) / 2 - 0.5  # of halves, whole
    assert not cost.uncounted


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ("default", ["stem", "block1", "block2", "block3", "head", "classifier"]),
        ("pairs", ["stem", "block2", "head"]),
        ("all", ["stem"]),
    ],
)
def test_parts_in_a_row_follow_one_router(knobs, names):
    model = example(knobs)
    assert [layer.name for layer in routings(model)] == [f"{name}_routing" for name in names]
    share = 6 // len(names)
    parts = ["stem", "block1", "block2", "block3", "head", "classifier"]
    for layer in conditional(model):
        part = parts.index(layer.name.split("_")[0])
        assert layer.input[1] is model.get_layer(f"{names[part // share]}_routing").output


def test_a_router_sees_its_first_part_and_the_router_before():
    first, second = routings(example("together"))
    assert (first.name, second.name) == ("stem_routing", "block3_routing")
    assert second.input[0] is example("together").get_layer("block3_expand").input[0]
    assert second.input[1] is first.output
    assert (first.hidden_units, second.hidden_units) == (6, 16)
    assert second.hidden_kernel.shape == (8 + EXPERTS, 16)
    assert {layer.activation for layer in (first, second)} == {keras.activations.tanh}


@pytest.mark.parametrize("knobs", EACH)
def test_a_saved_network_keeps_its_routers_and_its_cost(knobs, tmp_path):
    model = example(knobs)
    model.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras", safe_mode=True)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert [v.path for v in again.weights] == [v.path for v in model.weights]
    configs = [[layer.get_config() for layer in routings(m)] for m in (again, model)]
    assert configs[0] == configs[1]
    cost = count_cost(model)
    assert count_cost(again) == cost
    assert not cost.uncounted
    kernels = [v for layer in routings(model) for v in layer.weights if "kernel" in v.name]
    assert cost.macs_routing == sum(int(np.prod(v.shape)) for v in kernels)


@pytest.mark.parametrize("knobs", EACH)
def test_a_step_changes_every_weight(knobs):
    model = small(KNOBS[knobs], expert_dropout=0.1)
    before = [numpy(v).copy() for v in model.trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss, run_eagerly=True)
    assert np.isfinite(model.train_on_batch(IMAGES, LABELS))
    for variable, old in zip(model.trainable_variables, before, strict=True):
        assert np.abs(numpy(variable) - old).max() > 1e-3, variable.path


def permute_experts(model: keras.Model, orders: dict[str, Array]) -> None:
    """Puts the experts of each router's parts in that router's order, and what leads to them."""
    for layer in routings(model):
        order = orders[layer.name]
        layer.kernel.assign(numpy(layer.kernel)[:, order])
        layer.bias.assign(numpy(layer.bias)[order])
        if isinstance(layer.input, list):  # it sees the weights of another
            first = layer.kernel if layer.hidden_kernel is None else layer.hidden_kernel
            rows = numpy(first).copy()
            before = orders[layer.input[1]._keras_history.operation.name]
            rows[-EXPERTS:] = rows[-EXPERTS:][before]
            first.assign(rows)
    for layer in conditional(model):
        order = orders[layer.input[1]._keras_history.operation.name]
        for weight in layer.weights:
            weight.assign(numpy(weight)[order])


@pytest.mark.parametrize("knobs", EACH)
def test_the_order_of_the_experts_does_not_matter(knobs):
    model = small(KNOBS[knobs])
    before = logits(model)
    rng = np.random.default_rng(3)
    orders = {layer.name: np.roll(range(EXPERTS), rng.integers(1, 3)) for layer in routings(model)}
    permute_experts(model, orders)
    assert near(logits(model), before)
    permute_experts(model, {**orders, "stem_routing": np.arange(EXPERTS)})
    router = routings(model)[0]
    router.bias.assign(numpy(router.bias)[::-1])
    assert not near(logits(model), before)


@pytest.mark.parametrize("knobs", EACH)
def test_a_folded_network_says_the_same(knobs):
    model = example(knobs)
    copy = folded(model)
    assert np.abs(logits(copy) - logits(model)).max() <= 1e-4 * np.abs(logits(model)).max()
    assert count_cost(copy).multiply_adds == count_cost(model).multiply_adds
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in copy.layers)


@pytest.mark.parametrize("knobs", EACH)
def test_mixed_precision_routes_in_float32(knobs):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small(KNOBS[knobs])
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.output.dtype for layer in routings(model)} == {"float32"}
    assert logits(model).dtype == "float32"
    model.set_weights(example(knobs).get_weights())
    expected = logits(example(knobs))
    assert np.abs(logits(model) - expected).max() < 0.05 * np.abs(expected).max()


def test_parts_that_share_a_router_share_the_draw_and_routers_see_none_of_it():
    model = small(KNOBS["together"], expert_dropout=0.25)
    for layer in conditional(model):
        assert layer.input[1]._keras_history.operation.name in (
            "stem_expert_dropout",
            "block3_expert_dropout",
        )
    first, second = routings(model)
    assert second.input[1] is first.output


@pytest.mark.slow
@pytest.mark.parametrize("knobs", ["all", "together"])
@pytest.mark.parametrize("form", ["saved_model", "onnx", "litert"])
def test_an_exported_network_says_the_same(form, knobs, tmp_path):
    tf = pytest.importorskip("tensorflow")
    from condconv.tools.exports import export
    from condconv.tools.exports.trained_network import TrainedNetwork

    decode = functools.partial(tf.io.decode_png, channels=3)
    names = [f"class {i}" for i in range(3)]
    source = TrainedNetwork(example(knobs), "tests", decode, [], names)
    (row,) = export.export(source, [form], tmp_path / "out")
    assert row["difference"] < 1e-3


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ("softmax", "takes a dict of activation, .*, not 'softmax'"),
        (
            {"hiden": 1},
            "dict of activation, hidden, shared_by, hierarchical, kernel_initializer, not 'hiden'",
        ),
        ({"activation": "sigmund"}, "activation takes one of Keras'.*not 'sigmund'"),
        ({"hidden": -1}, "hidden takes a multiple of the channels, or 0, not -1"),
        ({"hidden": "big"}, "hidden takes a multiple of the channels, or 0, not 'big'"),
        ({"shared_by": 0}, "shared_by takes a positive integer or 'all', not 0"),
        ({"shared_by": "each"}, "shared_by takes a positive integer or 'all', not 'each'"),
        ({"hierarchical": 1}, "hierarchical takes True or False, not 1"),
        ({"shared_by": "all", "hierarchical": True}, "hierarchical takes several routings"),
        ({"kernel_initializer": "zeroes"}, "kernel_initializer takes the name .*not 'zeroes'"),
        ({"kernel_initializer": 0}, "kernel_initializer takes the name .*not 0"),
        ({"kernel_initializer": "zeros", "hidden": 1}, "a hidden layer .* never learns"),
    ],
)
def test_bad_knobs_of_every_network_are_named(name, knobs, message):
    with pytest.raises(ValueError, match=f"^routing.*{message}") as error:
        create_model(name, num_experts=2, routing=knobs)
    assert "\n" not in str(error.value)


def test_routers_of_zeros_mix_all_experts_alike_and_learn():
    model = create_model(
        "mobilenet_v1",
        num_experts=EXPERTS,
        num_classes=3,
        image_size=32,
        width=0.1,
        routing={"kernel_initializer": "zeros"},
    )
    outputs = [layer.output for layer in routings(model)]
    images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype("float32")
    for weights in keras.Model(model.input, outputs)(images):
        np.testing.assert_array_equal(numpy(weights), np.full((4, EXPERTS), 0.5))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True))
    model.train_on_batch(images, np.array([0, 1, 2, 0]))
    assert all(np.any(numpy(layer.kernel)) for layer in routings(model))


def test_knobs_leave_a_static_network_as_it_is():
    assert not routings(small(KNOBS["all"], num_experts=0))


def test_a_config_binds_knobs_and_those_of_a_wrong_type_are_refused(monkeypatch):
    pytest.importorskip("gin")
    from condconv.engine import config
    from condconv.engine.errors import UsageError

    file = "configs/imagenet/mobilenet_v1_condconv8.gin"
    monkeypatch.setattr(Network, "build", lambda network: network)
    knobs = {"hidden": 0.125, "shared_by": "all"}
    network = config.load([file], [f"mobilenet_v1.routing = {knobs}"]).model(num_classes=5)
    assert network.routing == knobs
    with pytest.raises(UsageError, match="mobilenet_v1.routing takes"):
        config.load([file], ["mobilenet_v1.routing = 'softmax'"])
