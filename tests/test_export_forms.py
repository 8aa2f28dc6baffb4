"""A stranger's own model in the forms that are exported, and in ONNX."""

import pathlib
import sys

import keras
import numpy as np
import pytest
from keras import layers

import condconv

MIXED = "mixed_bfloat16"


def own(size: int | None = None, dtype: str | None = None) -> keras.Model:
    """A network of somebody's own: conditional layers of every kind, maps of any size."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 2), name="pixels")
    routing_weights = condconv.Routing(3, dtype=dtype)(inputs)
    x = condconv.CondConv2D(4, 3, 3, strides=2, padding="same", dtype=dtype)(
        inputs, routing_weights
    )
    x = condconv.DepthwiseCondConv2D(3, 3, strides=2, padding="same", dtype=dtype)(x)
    x = layers.BatchNormalization(dtype=dtype)(condconv.CondConv2D(5, 1, 3, dtype=dtype)(x))
    x = layers.GlobalAveragePooling2D(dtype=dtype)(layers.ReLU(dtype=dtype)(x))
    return keras.Model(inputs, condconv.CondDense(6, 3, dtype=dtype)(x, routing_weights))


def images(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(batch).normal(size=(batch, height, width, 2)).astype("float32")


def assert_alike(actual: np.ndarray, model: keras.Model, x: np.ndarray) -> None:
    expected = np.asarray(model(x, training=False))
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_a_model_of_ones_own_runs_in_onnx_runtime(tmp_path: pathlib.Path):
    pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = own()
    condconv.write_onnx(model, tmp_path / "own.onnx", {"author": "somebody"})
    session = onnxruntime.InferenceSession(str(tmp_path / "own.onnx"))
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_modelmeta().custom_metadata_map == {"author": "somebody"}
    for batch, height, width in ((1, 8, 8), (5, 9, 7), (3, 7, 10)):
        x = images(batch, height, width)
        (logits,) = session.run(["logits"], {"images": x})
        assert_alike(logits, model, x)


@pytest.mark.slow
def test_the_portable_form_is_exported_by_keras_itself(tmp_path: pathlib.Path):
    interpreters = pytest.importorskip("ai_edge_litert.interpreter")
    model, x = own(9), images(4, 9, 9)
    condconv.portable(model).export(str(tmp_path / "own.tflite"), format="litert", verbose=False)
    interpreter = interpreters.Interpreter(str(tmp_path / "own.tflite"))
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, x)
    interpreter.invoke()
    assert_alike(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), model, x)


def test_the_portable_form_is_a_copy_that_computes_the_same():
    model = own(9)
    portable = condconv.portable(model)
    forms = {getattr(layer, "formulation", None) for layer in portable.layers}
    assert forms == {None, "shifts", "taps", "matmul"}
    assert {getattr(layer, "formulation", None) for layer in model.layers} == {None}
    x = images(4, 9, 9)
    assert_alike(np.asarray(portable(x)), model, x)


def test_the_float32_form_computes_in_float32_with_the_same_weights():
    mixed, plain = own(9, MIXED), own(9)
    found = condconv.in_float32(mixed)
    assert {layer.compute_dtype for layer in found.layers} == {"float32"}
    assert mixed.layers[-1].compute_dtype == "bfloat16"
    assert condconv.in_float32(plain) is plain
    plain.set_weights(mixed.get_weights())
    x = images(4, 9, 9)
    assert_alike(np.asarray(found(x)), plain, x)


def test_what_is_missing_is_said_in_one_line(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r"^write_onnx needs tf2onnx: pip install 'condconv\["):
        condconv.write_onnx(own(9), tmp_path / "own.onnx")


def test_models_and_backends_that_onnx_is_not_written_of(tmp_path: pathlib.Path, monkeypatch):
    one, other = keras.Input((3,)), keras.Input((3,))
    two = keras.Model([one, other], layers.Add()([one, other]), name="two")
    with pytest.raises(ValueError, match=r"one input and one output.*'two', a Functional of 2 and"):
        condconv.write_onnx(two, tmp_path / "two.onnx")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="TensorFlow backend, not 'jax'"):
        condconv.write_onnx(own(9), tmp_path / "own.onnx")
