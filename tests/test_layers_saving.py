"""Layers by their configurations and out of files."""

import inspect
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import initializers, regularizers
from layer_cases import (
    CHANNELS,
    FORWARD,
    Array,
    dtype_of,
    error,
    make,
    numbers,
    sequential,
    slow_on_jax,
    tf_only,
    to_numpy,
)
from on_jax import HASTY

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, Routing
from condconv.layers import Logits
from condconv.normalization import BatchNormalization
from condconv.stochastic import Dropout, StochasticDepth

ROOT = pathlib.Path(__file__).resolve().parent.parent


SHARED = {
    "activation": "relu",
    "use_bias": False,
    "kernel_initializer": initializers.HeNormal(seed=3),
    "bias_initializer": initializers.Constant(0.5),
    "kernel_regularizer": regularizers.L2(0.1),
    "bias_regularizer": regularizers.L1(0.2),
}
CONDITIONAL = {
    **SHARED,
    "activity_regularizer": regularizers.L2(0.3),
    "kernel_constraint": keras.constraints.MaxNorm(2.0, axis=[0, 1]),
    "bias_constraint": keras.constraints.NonNeg(),
    "num_experts": 3,
}
WINDOW = {
    "kernel_size": (3, 2),
    "strides": (2, 1),
    "padding": "same",
    "data_format": "channels_first",
    "dilation_rate": 1,
}
CONFIGURATIONS = [
    (Routing, {**SHARED, "num_experts": 3, "data_format": "channels_first", "hidden_units": 5}),
    (CondConv2D, {**CONDITIONAL, **WINDOW, "filters": 5, "groups": 1}),
    (DepthwiseCondConv2D, {**CONDITIONAL, **WINDOW, "depth_multiplier": 2}),
    (
        DepthwiseCondConv2D,
        {
            **CONDITIONAL,
            **WINDOW,
            "strides": 1,
            "padding": "valid",
            "depth_multiplier": 1,
            "dilation_rate": (1, 2),
        },
    ),
    (CondDense, {**CONDITIONAL, "units": 5}),
]


def parameters_of(layer_class: type) -> set[str]:
    """The arguments that a layer takes besides those of all Keras layers."""
    classes = itertools.takewhile(lambda c: c is not keras.layers.Layer, layer_class.__mro__)
    names = {name for c in classes for name in inspect.signature(c).parameters} - {"kwargs"}
    return names - ({"data_format"} if layer_class is CondDense else set())


@pytest.mark.parametrize(("layer_class", "arguments"), slow_on_jax(CONFIGURATIONS, 5))
def test_configuration_round_trip(layer_class: type, arguments: dict[str, Any]):
    parameters = parameters_of(layer_class)
    assert parameters == set(arguments)
    layer = layer_class(**arguments, name="mine", dtype="mixed_bfloat16", trainable=False)

    description = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    copy = keras.saving.deserialize_keras_object(description)

    assert type(copy) is layer_class
    assert copy.get_config() == layer.get_config()
    assert layer_class.from_config(layer.get_config()).get_config() == layer.get_config()
    assert set(layer.get_config()) >= parameters - {"groups"}
    assert (copy.name, copy.dtype_policy.name, copy.trainable) == ("mine", "mixed_bfloat16", False)
    for name, value in arguments.items():
        if name == "groups":
            continue
        kept = getattr(copy, name)
        if isinstance(value, str) and callable(kept):
            assert kept is keras.activations.get(value)
        elif hasattr(value, "get_config"):
            assert type(kept) is type(value)
            assert kept.get_config() == value.get_config()
        else:
            assert kept in (value, (value, value))
    rank_4 = layer_class is not CondDense
    x = numbers(2, CHANNELS, 6, 5) if rank_4 else numbers(2, CHANNELS)
    y = layer(x)
    copy.build(x.shape)
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(to_numpy(copy(x)), to_numpy(y))


def test_logits_configuration_round_trip():
    layer = Logits(cost_rule="M", name="mine")
    copy = Logits.from_config(layer.get_config())
    assert (copy.cost_rule, copy.name, copy.dtype_policy.name) == ("M", "mine", "float32")


def shared_routing_model(dtype: str | None = None) -> keras.Model:
    inputs = keras.Input((8, 7, CHANNELS), name="image")
    routing = Routing(4, dtype=dtype)(inputs)
    x = make("conv", dtype=dtype, kernel_initializer=initializers.HeNormal(seed=1))(inputs, routing)
    x = BatchNormalization(dtype=dtype)(x)
    y = make("depthwise", dtype=dtype, depth_multiplier=1, activation="swish")(x, routing)
    x = keras.layers.Add()([x, StochasticDepth(0.8)(y)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = make("dense", dtype=dtype)(Dropout(0.2)(x), routing)
    return keras.Model(inputs, Logits(cost_rule="M")(x))


SAVED = {
    "shared": shared_routing_model,
    "mixed": lambda: shared_routing_model("mixed_bfloat16"),
    "sequential": lambda: keras.Sequential([keras.Input((8, 7, CHANNELS)), *sequential().layers]),
}
LOAD = """
import sys
if "{backend}" != "tensorflow":
    sys.modules["tensorflow"] = None
import condconv, keras, numpy
for name in sys.argv[1].split(","):
    model = keras.saving.load_model(name + ".keras", safe_mode=True)
    y = model(numpy.load(name + ".npy"))
    numpy.save(f"{{name}}-{backend}.npy", keras.ops.convert_to_numpy(y).astype("float32"))
"""


def save(name: str, folder: pathlib.Path) -> Array:
    """Saves a model of known weights and its inputs, and returns its outputs."""
    model, x = SAVED[name](), numbers(3, 8, 7, CHANNELS)
    for i, weight in enumerate(model.weights):
        weight.assign(np.abs(numbers(*weight.shape, seed=i)))
    model.save(folder / f"{name}.keras")
    np.save(folder / f"{name}.npy", x)
    return to_numpy(model(x))


@tf_only  # starts both backends itself
def test_new_processes_of_both_backends_load_the_models(tmp_path: pathlib.Path):
    pytest.importorskip("jax")
    expected = {name: save(name, tmp_path) for name in SAVED}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = {}
    for backend in ("tensorflow", "jax"):
        processes[backend] = subprocess.Popen(
            [sys.executable, "-c", LOAD.format(backend=backend), ",".join(SAVED)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": backend, "XLA_FLAGS": HASTY},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for backend, process in processes.items():
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, f"on {backend}:\n{said}"
        for name, y in expected.items():
            assert y.std() > 1e-3
            # Backends round sums in bfloat16 each in their way.
            tolerance = (
                1e-6
                if backend == "tensorflow"
                else FORWARD["bfloat16" if name == "mixed" else "float32"]
            )
            assert error(np.load(tmp_path / f"{name}-{backend}.npy"), y) <= tolerance


@pytest.mark.parametrize("model", slow_on_jax(SAVED, 3))
def test_loading_keeps_outputs_and_weights(tmp_path: pathlib.Path, model: str):
    expected = save(model, tmp_path)
    loaded = keras.saving.load_model(tmp_path / f"{model}.keras", safe_mode=True)
    assert error(loaded(np.load(tmp_path / f"{model}.npy")), expected) <= 1e-6
    original = SAVED[model]()
    assert [tuple(w.shape) for w in loaded.weights] == [tuple(w.shape) for w in original.weights]
    for i, weight in enumerate(loaded.weights):
        np.testing.assert_array_equal(to_numpy(weight), np.abs(numbers(*weight.shape, seed=i)))
        assert dtype_of(weight) == "float32"
