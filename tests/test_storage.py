"""Experts in half precision, and the ways to mix them."""

import keras
import numpy as np
import pytest
from keras import ops

import condconv
from condconv import formulations
from condconv import ops as conditional

BACKEND = keras.backend.backend()
WAYS = [formulations.mix_by_matmul, formulations.mix_in_loop]
WAYS += [formulations.mix_in_compiled_loop, formulations.mix_for_training][: 2 * (BACKEND != "jax")]


def small_network() -> keras.Model:
    """Functional, with a model in it, routing shared and not, and layers of all kinds."""
    inner = keras.Sequential(
        [keras.Input((8, 8, 6)), condconv.CondConv2D(5, 1, num_experts=3)], name="inner"
    )
    x = inputs = keras.Input((8, 8, 4))
    weights = condconv.Routing(3)(x)
    x = condconv.CondConv2D(6, 3, num_experts=3, padding="same")(x, weights)
    x = condconv.DepthwiseCondConv2D(3, num_experts=3, padding="same")(x, weights)
    x = keras.layers.Conv2D(6, 1)(keras.layers.BatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(inner(x))
    return keras.Model(inputs, condconv.CondDense(7, num_experts=3)(x))


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 8, 8, 4)).astype("float32")


def outputs(model: keras.Model, batch: int) -> np.ndarray:
    return model.predict(images(batch), verbose=0)


def convolutions(model: keras.Model) -> list:
    kinds = (condconv.CondConv2D, condconv.DepthwiseCondConv2D)
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_experts", [1, 8, 20])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_mix_is_the_same_sum(way, num_experts, batch, dtype):
    draw = np.random.default_rng(0)
    experts = ops.cast(draw.standard_normal((num_experts, 60)), dtype)
    weights = draw.random((batch, num_experts)).astype("float32")
    expected = weights.astype("float64") @ ops.convert_to_numpy(experts).astype("float64")
    mixed = way(ops.convert_to_tensor(weights), experts)
    assert keras.backend.standardize_dtype(mixed.dtype) == "float32"
    np.testing.assert_allclose(ops.convert_to_numpy(mixed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch, num_experts, narrow, training, graph, xla", [
    (1, 8, False, False, "mix_by_matmul", "mix_in_loop"),
    (1, 32, False, False, "mix_by_matmul", "mix_by_matmul"),
    (2, 8, False, False, "mix_by_matmul", "mix_by_matmul"),
    (1, 8, True, False, "mix_in_compiled_loop", "mix_in_loop"),
    (1, 32, True, False, "mix_in_compiled_loop", "mix_in_loop"),
    (None, 8, True, False, "mix_by_matmul", "mix_in_loop"),
    (1, 8, True, True, "mix_for_training", "mix_by_matmul"),
    (16, 8, False, True, "mix_for_training", "mix_by_matmul"),
])  # fmt: skip
def test_how_experts_are_mixed(monkeypatch, batch, num_experts, narrow, training, graph, xla):
    case = (batch, num_experts, narrow, training)
    monkeypatch.setattr(conditional, "has_accelerator", lambda: False)
    for compiled, expected in ((False, graph), (True, xla)):
        if BACKEND == "jax" and not compiled:
            continue
        monkeypatch.setattr(conditional, "in_xla", lambda compiled=compiled: compiled)
        assert conditional._way_to_mix(*case).__name__ == expected
    monkeypatch.setattr(conditional, "has_accelerator", lambda: True)
    assert conditional._way_to_mix(*case).__name__ in ("mix_by_matmul", "mix_for_training")


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_only_the_rounding_of_the_experts_changes_the_result(dtype, tolerance):
    model = small_network()
    stored = condconv.store_experts(model, dtype)
    assert {layer.kernel.dtype for layer in convolutions(stored)} == {dtype}
    assert {layer.kernel.dtype for layer in convolutions(model)} == {"float32"}
    rounded = condconv.store_experts(stored, "float32")
    assert {layer.kernel.dtype for layer in convolutions(rounded)} == {"float32"}
    for batch in (1, 2, 5):
        expected, got = outputs(model, batch), outputs(stored, batch)
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())
        assert not np.array_equal(got, expected)
        same = outputs(rounded, batch)
        np.testing.assert_allclose(got, same, atol=1e-5 * np.abs(expected).max())


def test_it_saves_and_loads_with_half_the_bytes_of_the_experts(tmp_path):
    model = condconv.store_experts(small_network())
    model.save(tmp_path / "stored.keras")
    loaded = keras.models.load_model(tmp_path / "stored.keras")
    assert {layer.kernel.dtype for layer in convolutions(loaded)} == {"float16"}
    np.testing.assert_array_equal(outputs(loaded, 3), outputs(model, 3))
    cost, expected = condconv.count_cost(loaded), condconv.count_cost(small_network())
    assert (cost.parameters, cost.multiply_adds) == (expected.parameters, expected.multiply_adds)


def test_the_copy_outlives_what_is_done_to_the_original():
    model = small_network()
    copies = [condconv.store_experts(model), condconv.fold_batch_norm(model)]
    expected = [outputs(copy, 2) for copy in copies]
    model.compile("sgd", "mse")
    model.fit(images(2), np.ones((2, 7)), verbose=0)
    for copy, before in zip(copies, expected, strict=True):
        np.testing.assert_array_equal(outputs(copy, 2), before)


def test_what_cannot_be_stored_is_refused():
    model = small_network()
    with pytest.raises(ValueError, match="dtype of float16, bfloat16, .*, not 'int8'"):
        condconv.store_experts(model, "int8")
    kernel = convolutions(model)[0].kernel
    kernel.assign(kernel * 0 + 1e6)
    with pytest.raises(ValueError, match="too large for float16.* take bfloat16"):
        condconv.store_experts(model)
    condconv.store_experts(model, "bfloat16")


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "jax", reason="the whole run is on JAX already")
def test_this_file_passes_on_jax():
    pytest.importorskip("jax")
    from test_jax import passed_on_jax

    assert passed_on_jax(["test_storage.py"], timeout=300) > 20
