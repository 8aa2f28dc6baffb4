"""Routing weights given to a layer, and a routing of the layer's own."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy_reference as reference
import pytest
from layer_cases import (
    CHANNELS,
    LAYERS,
    OUT,
    error,
    inputs_of,
    make,
    mixture_of,
    sequential,
    slow_on_jax,
    to_numpy,
)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.layer = make("conv")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = make("dense")

    def call(self, inputs: Any) -> Any:
        return self.head(self.pool(self.layer(inputs)))


def functional() -> keras.Model:
    inputs = keras.Input((5, 4, CHANNELS))
    x = make("depthwise")(make("conv")(inputs))
    return keras.Model(inputs, make("dense")(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_routes_for_itself(layer: str):
    instance, x = make(layer), inputs_of(layer)
    y = instance(x)
    of_kernel = {"conv": 9 * CHANNELS * OUT, "depthwise": 9 * CHANNELS * 2, "dense": CHANNELS * OUT}
    assert instance.count_params() == 4 * (of_kernel[layer] + y.shape[-1] + CHANNELS + 1)
    assert [w.path.split("/", 1)[1] for w in instance.weights] == [
        "kernel",
        "bias",
        "routing/kernel",
        "routing/bias",
    ]
    assert len(instance.trainable_weights) == 4
    assert error(y, instance(x, instance.routing(x))) <= 1e-6
    expected = reference.routing(
        to_numpy(x), to_numpy(instance.routing.kernel), to_numpy(instance.routing.bias), "sigmoid"
    )
    assert error(instance.routing(x), expected) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_routing_weights_owns_no_routing(layer: str):
    instance = make(layer)
    instance(inputs_of(layer), mixture_of(3, 4))
    assert [w.path.split("/", 1)[1] for w in instance.weights] == ["kernel", "bias"]
    assert instance.routing is None


@pytest.mark.parametrize(
    "model", slow_on_jax([Subclassed, functional, sequential], 3), ids=lambda m: m.__name__
)
def test_layers_route_for_themselves_in_every_kind_of_model(model: Callable[[], keras.Model]):
    model, x = model(), inputs_of("conv")
    y = model(x)
    assert tuple(y.shape) == (3, OUT)
    count = 2 if isinstance(model, Subclassed) else 3
    assert len(model.trainable_weights) == 4 * count
    model.compile("sgd", "mse")
    before = [to_numpy(weight) for weight in model.trainable_weights]
    model.fit(x, np.ones((3, OUT), "float32"), verbose=0)
    after = [to_numpy(weight) for weight in model.trainable_weights]
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_leaving_the_routing_weights_out_later_is_an_error(layer: str):
    instance = make(layer)
    instance(inputs_of(layer), mixture_of(3, 4))
    with pytest.raises(ValueError, match="first called with routing weights"):
        instance(inputs_of(layer))


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 1), (4,)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_routing_weights_of_a_wrong_shape_are_an_error(
    layer: str, shape: tuple[int, ...], symbolic: bool
):
    x, routing = inputs_of(layer), np.ones(shape, "float32")
    if symbolic:
        x, routing = (keras.KerasTensor(value.shape) for value in (x, routing))
    with pytest.raises(ValueError, match=r"routing weights of shape \(batch, 4\)"):
        make(layer)(x, routing)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_routing_weights_of_another_batch_are_an_error(layer: str, batch: int, symbolic: bool):
    x, routing = inputs_of(layer), np.ones((batch, 4), "float32")
    if symbolic:
        x, routing = (keras.KerasTensor(value.shape) for value in (x, routing))
    with pytest.raises(ValueError, match=r"each of its 3 examples.*\(3, .*of shape \(., 4\)"):
        make(layer)(x, routing)
