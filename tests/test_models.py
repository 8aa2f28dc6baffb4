"""The networks: equal to the authors' graphs, and to the published numbers of parameters."""

import dataclasses
import functools
import inspect
import pickle
import typing

import authors_graph
import keras
import numpy as np
import pytest
import timm_names

import condconv
from condconv.layers import Logits
from models import MODELS, create_model, list_models, released
from models.blocks import Stage, separable
from models.factory import factory
from models.network import Network
from models.paper import PAPER

PARAMETERS = {
    ("mobilenet_v1", 0): 4_231_976,
    ("mobilenet_v2", 0): 3_504_872,
    ("mnasnet_a1", 0): 3_887_038,
    ("efficientnet_b0", 0): 5_288_548,
    ("resnet50", 0): 25_557_032,
    ("efficientnet_b0", 4): 13_314_116,
    ("efficientnet_b0", 8): 24_013_284,
    ("efficientnet_b0_depth", 0): 7_794_184,
    ("efficientnet_b0_depth", 8): 39_715_968,
}

TINY = {"width": 0.1, "num_classes": 7, "image_size": 32}


@functools.cache
def tiny(name: str, num_experts: int) -> keras.Model:
    return create_model(name, num_experts=num_experts, **TINY)


def trainable(model: keras.Model) -> int:
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.mark.parametrize(("name", "num_experts"), PARAMETERS)
def test_parameters_are_those_published(name, num_experts):
    model = create_model(name, num_experts=num_experts)
    assert trainable(model) == PARAMETERS[name, num_experts]
    timm_names.assert_names_and_shapes_are_timms(model, num_experts)


def test_every_static_network_has_a_golden_number():
    assert {name for name, num_experts in PARAMETERS if num_experts == 0} == set(list_models())


GRAPHS = {
    "efficientnet-b0": ("efficientnet_b0", {}),
    "efficientnet-condconv-b0-4e": ("efficientnet_b0", {"num_experts": 4}),
    "mobilenet-v1-25": ("mobilenet_v1", {"width": 0.25, "num_classes": 1001}),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_logits_are_those_of_the_authors_graph(graph):
    name, arguments = GRAPHS[graph]
    authors = authors_graph.load(graph)
    model = create_model(name, **arguments)
    names = released.tf1_names(model, authors.scope)
    released.assign(model, authors.variables, names)
    largest = np.abs(authors.logits).max()
    pixels = np.asarray(model(authors.images))
    floats = np.asarray(model(authors.images.astype("float32")))
    assert np.abs(pixels - authors.logits).max() <= 1e-4 * largest
    np.testing.assert_array_equal(pixels, floats)
    for block, weights in authors.routing.items():
        routing = model.get_layer(f"block{block + 1}_routing").output
        got = np.asarray(keras.Model(model.input, routing)(authors.images))
        np.testing.assert_allclose(got, weights, atol=1e-5)


def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why():
    authors = authors_graph.load("mobilenet-v1-25")
    model = create_model("mobilenet_v1", width=0.25, num_classes=1000)
    before = [np.asarray(v) for v in model.variables]
    values = dict(authors.variables)
    del values["MobilenetV1/Conv2d_0/weights"]
    values["MobilenetV1/Conv2d_0/weihgts"] = np.zeros(1, "float32")
    with pytest.raises(ValueError) as error:
        released.assign(model, values, released.tf1_names(model, authors.scope))
    message = str(error.value)
    assert "missing: MobilenetV1/Conv2d_0/weights" in message
    assert "left over: MobilenetV1/Conv2d_0/weihgts" in message
    assert "misshapen: MobilenetV1/Logits/Conv2d_1c_1x1/weights has (1, 1, 256, 1001)" in message
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)


@pytest.mark.parametrize("num_experts", [0, 2])
@pytest.mark.parametrize("name", list_models())
def test_every_network_maps_pixels_to_float32_logits_and_every_weight_matters(name, num_experts):
    tf = pytest.importorskip("tensorflow")
    # At 64 pixels the last maps are 2×2; on a single pixel batch norm would hide what it gets.
    model = create_model(name, **TINY | {"image_size": 64}, num_experts=num_experts)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = tf.reduce_sum(logits**2)
    assert logits.shape == (3, 7)
    assert logits.dtype == "float32"
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert all(gradient is not None for gradient in gradients)
    conditional = [layer for layer in model.layers if isinstance(layer, condconv.Routing)]
    assert bool(conditional) == bool(num_experts)


def conditional_layers(model: keras.Model) -> set[str]:
    kinds = (condconv.CondConv2D, condconv.DepthwiseCondConv2D, condconv.CondDense)
    return {layer.name for layer in model.layers if isinstance(layer, kinds)}


def blocks(model: keras.Model) -> set[int]:
    names = conditional_layers(model)
    return {int(n.split("_")[0].removeprefix("block")) for n in names if n.startswith("block")}


@pytest.mark.parametrize(
    ("name", "first", "last", "others"),
    [
        ("mobilenet_v1", 6, 13, {"classifier"}),
        ("mobilenet_v2", 2, 17, {"head_conv", "classifier"}),
        ("mnasnet_a1", 11, 16, set()),
        ("efficientnet_b0", 9, 16, set()),
        ("efficientnet_b0_depth", 13, 23, set()),
        ("resnet50", 14, 16, set()),
    ],
)
def test_conditional_layers_are_where_the_paper_has_them(name, first, last, others):
    model = tiny(name, 2)
    assert blocks(model) == set(range(first, last + 1))
    assert {n for n in conditional_layers(model) if not n.startswith("block")} == others


def test_all_convolutions_of_a_block_share_one_routing_of_its_input():
    model = tiny("efficientnet_b0", 2)
    routing = model.get_layer("block10_routing")
    assert routing.input is model.get_layer("block10_expand").input[0]
    for part in ("expand", "depthwise", "project"):
        assert model.get_layer(f"block10_{part}").input[1] is routing.output


def test_the_stem_the_head_and_no_block_can_be_conditional():
    stem = create_model("mobilenet_v1", num_experts=2, first_condconv_block=0, **TINY)
    assert "stem_conv" in conditional_layers(stem)
    assert blocks(stem) == set(range(1, 14))
    only_classifier = create_model("mobilenet_v1", num_experts=2, first_condconv_block=14, **TINY)
    assert conditional_layers(only_classifier) == {"classifier"}
    head = create_model("efficientnet_b0", num_experts=2, condconv_head=True, **TINY)
    assert "head_conv" in conditional_layers(head)


def test_a_conditional_classifier_routes_before_dropout():
    model = tiny("mobilenet_v2", 2)
    assert model.get_layer("classifier_routing").input is model.get_layer("pool").output
    assert model.get_layer("classifier").input[0] is model.get_layer("dropout").output


def test_survival_falls_linearly_by_the_official_rule():
    model = tiny("efficientnet_b0", 0)
    assert model.get_layer("block16_project")
    for block, survival in ((3, 0.975), (10, 0.8875), (15, 0.825)):
        assert model.get_layer(f"block{block}_survival").survival == pytest.approx(survival)


@pytest.mark.parametrize(
    ("name", "num_experts", "mean", "deviation"),
    [
        ("efficientnet_b0", 0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("efficientnet_b0", 2, (127,) * 3, (128,) * 3),
        ("mobilenet_v1", 2, (127.5,) * 3, (127.5,) * 3),
        ("mobilenet_v2", 0, (127.5,) * 3, (127.5,) * 3),
        ("mnasnet_a1", 2, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("resnet50", 2, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ],
)
def test_the_network_normalises_as_its_recipe_does(name, num_experts, mean, deviation):
    layer = tiny(name, num_experts).get_layer("normalization")
    assert (layer.mean, layer.deviation) == (mean, deviation)


def test_a_normalisation_of_ones_own():
    model = create_model("resnet50", normalization=((1, 2, 3), (4, 5, 6)), **TINY)
    assert model.get_layer("normalization").mean == (1, 2, 3)


def test_mixed_precision_keeps_pixels_and_logits_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = create_model("mobilenet_v1", num_experts=2, **TINY)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("normalization").output.dtype == "float32"
    assert model.get_layer("block8_pointwise").output.dtype == "bfloat16"
    assert model.get_layer("block8_routing").output.dtype == "float32"
    assert model.output.dtype == "float32"
    assert np.asarray(model(np.zeros((2, 32, 32, 3), np.uint8))).dtype == "float32"


def test_a_saved_network_is_the_same_and_keeps_its_rule(tmp_path):
    model = tiny("mobilenet_v1", 2)
    model.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras", safe_mode=True)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(model(images)), np.asarray(again(images)))
    assert condconv.count_cost(again) == condconv.count_cost(model)
    assert [v.path for v in again.weights] == [v.path for v in model.weights]


def test_an_open_image_size():
    model = create_model("mobilenet_v1", **TINY | {"image_size": None})
    assert model(np.zeros((1, 40, 48, 3), np.uint8)).shape == (1, 7)


@pytest.mark.parametrize("padding", ["same", "symmetric", "fixed"])
def test_paddings_differ_only_where_strides_are(padding):
    model = create_model("resnet50", padding=padding, **TINY)
    pads = {layer.name: layer.padding for layer in model.layers if layer.name.endswith("_pad")}
    if padding == "same":
        assert not pads
    else:
        assert pads["stem_conv_pad"] == ((3, 3), (3, 3))
        assert pads["block4_conv_pad"] == ((1, 1), (1, 1))
        assert ("stem_pool_pad" in pads) == (padding == "symmetric")
    assert model.get_layer("stem_pool").output.shape[1:3] == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mobilenet_v9"}, "unknown model 'mobilenet_v9'; did you mean 'mobilenet_v"),
        ({"widht": 2}, "mobilenet_v1 has no argument 'widht'; did you mean 'width'"),
        ({"num_experts": -1}, r"num_experts takes 0 \(static\) or a positive integer, not -1"),
        ({"first_condconv_block": 15}, "first_condconv_block takes a block from 1 to 13"),
        ({"num_classes": 0}, "num_classes takes"),
        ({"dropout": 1.0}, "dropout takes"),
        ({"normalization": "imagnet"}, "normalization takes one of imagenet, condconv"),
        ({"padding": "valid"}, "padding takes one of same, symmetric, fixed"),
        ({"image_size": 0}, "image_size takes"),
        ({"batch_norm_momentum": 1.0}, "batch_norm_momentum takes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "mobilenet_v1", **TINY, **arguments})


ALL_HAVE = {
    "num_classes": 3,
    "num_experts": 2,
    "image_size": 40,
    "width": 0.1,
    "dropout": 0.3,
    "first_condconv_block": 0,
    "condconv_classifier": True,
    "routing": {"activation": "tanh"},
    "expert_dropout": 0.1,
    "batch_norm_momentum": 0.5,
    "batch_norm_epsilon": 0.1,
    "normalization": "condconv",
    "padding": "symmetric",
}
SOME_HAVE = {
    "survival": (0.5, {*MODELS} - {"mobilenet_v1"}),
    "condconv_head": (True, {*MODELS} - {"mobilenet_v1", "resnet50"}),
    "depth": (1.5, {"efficientnet_b0", "efficientnet_b0_depth"}),
}


@pytest.mark.parametrize("name", list_models())
def test_every_argument_that_a_network_can_have_is_taken_and_told_of(name):
    some = {argument: value for argument, (value, have) in SOME_HAVE.items() if name in have}
    parameters = inspect.signature(MODELS[name]).parameters
    assert {*parameters} == {*ALL_HAVE, *some}
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters.values())
    hints = typing.get_type_hints(MODELS[name])
    assert hints.pop("return") is keras.Model
    assert hints == {each.name: each.annotation for each in parameters.values()}
    documentation = inspect.getdoc(MODELS[name])
    for argument in parameters:
        assert documentation.count(f"\n    {argument}: ") == 1
    assert " % top-1" in documentation.split("\n")[0]

    model, usual = create_model(name, **ALL_HAVE, **some), tiny(name, 2)
    layers = {layer.name: layer for layer in model.layers}
    assert model.input.shape == (None, 40, 40, 3)
    assert model.output.shape == (None, 3)
    assert {"stem_conv", "classifier"} <= conditional_layers(model)
    assert ("head_conv" in conditional_layers(model)) == ("condconv_head" in some)
    assert layers["dropout"].rate == 0.3
    assert layers["stem_routing"].activation is keras.activations.tanh
    dropped = [layer for layer in model.layers if layer.name.endswith("_expert_dropout")]
    routings = [layer for layer in model.layers if isinstance(layer, condconv.Routing)]
    assert [layer.input for layer in dropped] == [layer.output for layer in routings]
    assert {layer.rate for layer in dropped} == {0.1}
    assert (layers["stem_conv_bn"].momentum, layers["stem_conv_bn"].epsilon) == (0.5, 0.1)
    assert layers["normalization"].mean == (127,) * 3
    assert "stem_conv_pad" in layers
    assert any(name.endswith("_survival") for name in layers) == ("survival" in some)
    assert (max(blocks(model)) > max(blocks(usual))) == ("depth" in some)


def test_factories_are_functions_of_the_file_that_describes_their_network():
    for name, build in MODELS.items():
        assert pickle.loads(pickle.dumps(build)) is build
        assert inspect.isfunction(build)
        assert (build.__name__, build.__qualname__) == (name, name)
        assert getattr(inspect.getmodule(build), name) is build
    with pytest.raises(TypeError, match=r"resnet50\(\) takes 0 positional arguments"):
        MODELS["resnet50"](1000)
    with pytest.raises(TypeError, match="unexpected keyword argument 'condconv_head'"):
        MODELS["resnet50"](condconv_head=True)


def test_a_record_whose_defaults_would_not_count_is_refused():
    class Forgotten(Own):
        num_classes: int = 5

    assert factory(Own)(width=2.0).count_params() > factory(Own)().count_params()
    with pytest.raises(TypeError, match=r"Forgotten has no @dataclasses.dataclass\(frozen=True"):
        factory(Forgotten)


def test_the_paper_is_quoted_for_every_network():
    assert {row.model for row in PAPER} == set(list_models())


def test_only_registered_layers_are_used():
    """A saved network loads with Keras and condconv alone."""
    for name in list_models():
        for layer in tiny(name, 2).layers:
            assert type(layer).__module__.split(".")[0] in ("keras", "condconv")
    assert keras.saving.get_registered_name(Logits) == "condconv>Logits"


@pytest.mark.parametrize("num_experts", [0, 2])
@pytest.mark.parametrize("name", list_models())
def test_no_two_layers_start_alike(name, num_experts):
    """Blocks that repeat have layers of one shape, which one initializer would fill alike."""
    weights = tiny(name, num_experts).trainable_variables
    kernels = [w.numpy() for w in weights if "kernel" in w.path.split("/")[-1]]
    experts = [e for k in kernels for e in (k if k.ndim == 5 else [k])]
    assert len({expert.tobytes() for expert in experts}) == len(experts) > 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Network):
    """A network of one's own."""

    name = "own"
    stages = (Stage(block=separable, repeats=1, filters=8),)
    stem_filters = 8

    image_size: int | None = 8


def test_a_network_takes_an_initializer_that_keras_does_not_know():
    class Threes(keras.initializers.Initializer):
        def __init__(self, value: float):
            self.value = value

        def __call__(self, shape, dtype=None):
            return keras.ops.full(shape, self.value, dtype)

    class OfThrees(Own):
        def initializers(self):
            return Threes(3.0), Threes(3.0)

    model = OfThrees().build()
    kernels = [w for w in model.trainable_variables if w.path.endswith("kernel")]
    assert len(kernels) == 4
    assert all(np.all(keras.ops.convert_to_numpy(kernel) == 3) for kernel in kernels)


@pytest.mark.parametrize("name", ["mnasnet_a1", "efficientnet_b0"])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_the_classifier_starts_alike_with_any_number_of_classes(name, num_classes):
    """Within ±1/√1000, the authors' range on ImageNet; theirs for 10 classes is ±1/√10."""
    model = create_model(name, **TINY | {"num_classes": num_classes})
    kernel = model.get_layer("classifier").kernel.numpy()
    assert np.abs(kernel).max() <= 1000**-0.5
    np.testing.assert_allclose(kernel.std(), 3000**-0.5, rtol=0.1)
