"""Forward and backward of the layers against plain numpy, and against the authors' own layers."""

import ast
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
from layer_cases import (
    CHANNELS,
    DTYPES,
    MODES,
    TRAINING,
    Array,
    Case,
    Ignoring,
    check,
    error,
    forward_and_gradients,
    numbers,
    slow_on_jax,
    to_numpy,
)
from pairwise import Level, pairwise

from condconv import CondConv2D, DepthwiseCondConv2D, Routing

GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_pairwise_covers_what_is_allowed_and_nothing_else():
    factors = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2, 3, 4), "d": "xyz"}

    def allowed(row: Mapping[str, Level]) -> bool:
        return not (row.get("a") == 2 and row.get("c") == 4) and not (
            row.get("b") == 1 and row.get("d") == "z"
        )

    rows = pairwise(factors, allowed)
    whole = [
        row
        for levels in itertools.product(*factors.values())
        if allowed(row := dict(zip(factors, levels, strict=True)))
    ]
    assert all(row in whole for row in rows)
    assert len(rows) < len(whole) / 2
    assert {p for row in rows for p in itertools.combinations(row.items(), 2)} == {
        p for row in whole for p in itertools.combinations(row.items(), 2)
    }


WINDOWS = {"kernel": (1, 3, 5), "stride": (1, 2), "dilation": (1, 2), "padding": ("same", "valid")}
REST = {
    "experts": (1, 5, 32),
    "batch": (1, 3, 5),
    "dtype": DTYPES,
    "mode": MODES,
    "training": TRAINING,
}
# The two smallest maps are below the size at which a depthwise convolution in training leaves
# the compiled taps for the folded form; the others are odd and not square.
SIZES = ((2, 2), (3, 3), (9, 12), (7, 5))
POSITIONS = ((), (5,), (3, 2))


def fits(row: Mapping[str, Level]) -> bool:
    """Whether a convolution may have this geometry, as far as it is known."""
    if row.get("stride", 1) > 1 and row.get("dilation", 1) > 1:
        return False
    if row.get("padding") == "same" or not {"kernel", "dilation", "size"} <= row.keys():
        return True
    return (row["kernel"] - 1) * row["dilation"] < min(row["size"])


SAMPLE = [
    *(Case("conv", **row) for row in pairwise({**WINDOWS, "size": SIZES, **REST}, fits)),
    *(
        Case("depthwise", **row)
        for row in pairwise({**WINDOWS, "size": SIZES, "multiplier": (1, 2), **REST}, fits)
    ),
    *(Case("dense", **row) for row in pairwise({"size": POSITIONS, **REST}, lambda row: True)),
]
UNEQUAL_AXES = [
    Case(layer, 2, 3, (7, 6), "float32", mode, **window)
    for layer in ("conv", "depthwise")
    for mode in MODES
    for window in (
        {"kernel": (3, 5), "stride": (2, 1), "padding": "same"},
        {"kernel": (2, 4), "dilation": (2, 1), "padding": "valid"},
    )
]


@pytest.mark.parametrize("case", slow_on_jax(SAMPLE, 3), ids=str)
def test_forward_and_gradients_equal_numpy(case: Case):
    check(case)


@pytest.mark.parametrize("case", slow_on_jax(UNEQUAL_AXES, 4), ids=str)
def test_forward_and_gradients_equal_numpy_where_the_axes_differ(case: Case):
    check(case)


# Batches of one example and several, experts of all numbers, and maps of both kinds. XLA has one
# formulation for all maps, and never gives back the memory maps of what it compiled, some fifty a
# program: a process that asks for more than Linux grants, 65,530, is killed.
ROWS = ((1, 1, (3, 3)), (5, 3, (9, 10)), (32, 3, (3, 3)), (32, 1, (9, 10)))
ROWS_OF_XLA = ((1, 3, (9, 10)), (32, 1, (7, 6)))


def matrix(modes: Sequence[str], rows: Sequence[tuple]) -> Iterator[Case]:
    """Every window in every mode and precision, with one of the rows that fit it, in turn."""
    layers = (("conv", 1), ("depthwise", 1), ("depthwise", 2))
    strides = ((1, 1), (2, 1), (1, 2))  # with the dilation
    windows = itertools.product(layers, WINDOWS["kernel"], strides, WINDOWS["padding"])
    for i, ((layer, multiplier), kernel, (stride, dilation), padding) in enumerate(windows):
        window = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
        fitting = [row for row in rows if fits({**window, "size": row[-1]})]
        for turn, (mode, dtype) in enumerate(itertools.product(modes, DTYPES), i):
            row = fitting[turn % len(fitting)]
            yield Case(layer, *row, dtype, mode, multiplier=multiplier, **window)


MATRIX = [
    *matrix([mode for mode in MODES if mode != "jit"], ROWS),
    *matrix(["jit"], ROWS_OF_XLA),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_whole_matrix_of_convolutions(case: Case):
    check(case)


@pytest.mark.parametrize("mode", MODES)
def test_every_window_meets_every_precision_and_every_precision_every_row(mode: str):
    cases = [case for case in MATRIX if case.mode == mode]
    windows = {(c.layer, c.multiplier, c.kernel, *c.geometry, c.dtype) for c in cases}
    assert len(windows) == len(cases) == 54 * len(DTYPES)
    met = {(case.experts, case.batch, case.size, case.dtype) for case in cases}
    rows = ROWS_OF_XLA if mode == "jit" else ROWS
    assert met == {(*row, dtype) for row, dtype in itertools.product(rows, DTYPES)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", POSITIONS, ids=str)
def test_whole_matrix_of_dense(size: tuple[int, ...], dtype: str, mode: str):
    turn = POSITIONS.index(size) + DTYPES.index(dtype) + MODES.index(mode)
    for i, experts in enumerate(REST["experts"]):
        batch = REST["batch"][(turn + i) % 3]
        check(Case("dense", experts, batch, size, dtype, mode))


def test_the_sample_meets_every_level():
    for layer in ("conv", "depthwise", "dense"):
        cases = [case for case in SAMPLE if case.layer == layer]
        factors = {**REST, **(WINDOWS if layer != "dense" else {})}
        factors["size"] = POSITIONS if layer == "dense" else SIZES
        for name, levels in factors.items():
            assert {getattr(case, name) for case in cases} == set(levels)
        assert len(cases) < 40


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", [(3, 4, 5, CHANNELS), (3, CHANNELS)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_routing_equals_numpy(mode: str, shape: tuple[int, ...], activation: str):
    layer = Routing(4, activation=activation)
    x, gradient = numbers(*shape, seed=1), numbers(3, 4, seed=3)
    layer.build(x.shape)
    for weight in layer.trainable_weights:
        weight.assign(numbers(*weight.shape, seed=2))
    # The harness hands a second argument on, which a routing does not take.
    y, (d_x, _, d_kernel, d_bias) = forward_and_gradients(
        Ignoring(layer), x, np.zeros((3, 1), "float32"), gradient, mode, False
    )
    arguments = (to_numpy(x), *map(to_numpy, layer.trainable_weights))
    assert error(y, reference.routing(*arguments, activation)) <= 1e-5
    expected = reference.routing_backward(*arguments, activation, to_numpy(gradient))
    for actual, wanted in zip((d_x, d_kernel, d_bias), expected, strict=True):
        assert error(actual, wanted) <= 1e-4


@pytest.mark.parametrize("size", [(7, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("layer", ["conv", "depthwise"])
def test_gradients_reach_the_inputs_through_a_layers_own_routing(layer: str, size: tuple[int, int]):
    case = Case(layer, 3, 2, size, "float32", MODES[len(MODES) // 2], kernel=3)
    layer = case.make()
    x = numbers(2, *size, CHANNELS, seed=1)
    layer.build(x.shape)
    for weight in layer.trainable_weights:
        weight.assign(numbers(*weight.shape, seed=2))
    y_shape = layer.compute_output_shape(x.shape)
    gradient = numbers(*y_shape, seed=3)

    outer = Ignoring(layer)
    y, (d_x, _, *_) = forward_and_gradients(
        outer, x, np.zeros((2, 1, 1, 1), "float32"), gradient, case.mode, True
    )

    x, gradient = to_numpy(x), to_numpy(gradient)
    routing_weights = [to_numpy(w) for w in (layer.routing.kernel, layer.routing.bias)]
    routing = reference.routing(x, *routing_weights, "sigmoid")
    forward = reference.conv2d if case.layer == "conv" else reference.depthwise_conv2d
    arguments = (x, routing, to_numpy(layer.kernel), to_numpy(layer.bias), *case.geometry)
    backward = getattr(reference, f"{forward.__name__}_backward")
    directly, d_routing, *_ = backward(*arguments, gradient)
    through_routing, *_ = reference.routing_backward(x, *routing_weights, "sigmoid", d_routing)
    assert error(y, forward(*arguments)) <= 1e-5
    assert error(d_x, directly + through_routing) <= 1e-4
    assert np.abs(through_routing).max() > 0.01 * np.abs(directly).max()


# The authors' own layers.


def golden_layers() -> list[tuple[str, dict[str, Any], dict[str, Array]]]:
    """Class, arguments and arrays (x, r, y, w/...) of each recorded layer."""
    with np.load(GOLDEN / "condconv_layers.npz") as file:
        records = {name: file[name] for name in file}
    layers = []
    for i in sorted({name.split("/")[0] for name in records}):
        arrays = {k.removeprefix(f"{i}/"): v for k, v in records.items() if k.startswith(f"{i}/")}
        config = ast.literal_eval(str(arrays.pop("cfg")))
        layers.append((str(arrays.pop("cls")), config, arrays))
    return layers


@pytest.mark.parametrize(("name", "config", "arrays"), slow_on_jax(golden_layers(), 5))
def test_outputs_equal_those_of_the_authors_layers(
    name: str, config: dict[str, Any], arrays: dict[str, Array]
):
    layer = {"CondConv2D": CondConv2D, "DepthwiseCondConv2D": DepthwiseCondConv2D}[name](**config)
    layer.build(arrays["x"].shape, arrays["r"].shape)
    kernel = next(v for k, v in arrays.items() if k.endswith("condconv_kernel"))
    layer.kernel.assign(kernel.reshape(layer.kernel.shape))
    if layer.use_bias:
        layer.bias.assign(arrays["w/condconv_bias"])
    assert error(layer(arrays["x"], arrays["r"]), arrays["y"]) <= 1e-5
    assert error(layer(arrays["x"], arrays["r"], training=True), arrays["y"]) <= 1e-5


def test_six_layers_of_the_authors_are_recorded():
    assert len(golden_layers()) == 6
