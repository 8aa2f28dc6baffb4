"""Writes a network in the formats that people deploy.

All take ``images`` (N, H, W, 3) float32, 0–255, for any N, and give ``logits``. How a convolution
with a kernel for each example is put together differs: TensorFlow runs what ``condconv.ops``
picks; ONNX Runtime and LiteRT have neither its loop over examples nor depthwise convolutions whose
number of channels depends on the batch, so these get matrix products and sums of shifted inputs.
"""

import contextlib
import os
import pathlib
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from condconv import CondConv2D, DepthwiseCondConv2D
from condconv.engine.errors import RunError

_OPSET = 18  # of ONNX Runtime 1.14, of February 2023, and all since

# A map of encoded images (N,) to what the signature returns.
ServeEncoded = Callable[[tf.Tensor], Mapping[str, tf.Tensor]]


def write_keras(model: keras.Model, path: pathlib.Path) -> None:
    """Writes a ``.keras`` file."""
    model.save(path)


def write_saved_model(
    model: keras.Model,
    path: pathlib.Path,
    serve_jpeg: ServeEncoded | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a SavedModel with the signature ``serving_default`` and, if given, ``serve_jpeg``.

    ``notes``, texts by name, become files in its folder ``assets.extra``, which TensorFlow leaves
    to its users.
    """
    serve = tf.function(_serve(model), input_signature=[_images(model)])
    signatures = {"serving_default": serve}
    if serve_jpeg:
        encoded = tf.TensorSpec((None,), tf.string, name="encoded")
        signatures["serve_jpeg"] = tf.function(serve_jpeg, input_signature=[encoded])
    module = tf.Module()  # Keras' own archive holds every weight twice
    module.weights = [variable.value for variable in model.variables]
    # Gradients, some of which XLA is to compile, are of no use in a file that serves.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(path), signatures, options)
    for name, text in (notes or {}).items():
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / name).write_text(text)


def write_onnx(
    model: keras.Model, path: pathlib.Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes an ONNX file; ``metadata`` becomes its ``metadata_props``."""
    import onnx
    import tf2onnx

    signature = [_images(model)]
    serve = tf.function(_serve(portable(model)), input_signature=signature)
    proto, _ = tf2onnx.convert.from_function(serve, signature, opset=_OPSET)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    onnx.save(proto, path)


def write_litert(
    model: keras.Model,
    path: pathlib.Path,
    precision: str = "float32",
    calibration: Iterable[np.ndarray] = (),
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a LiteRT file (``.tflite``) that needs nothing but its built-in operations.

    With "int8", weights and activations are integers of eight bits, but for images and logits,
    which stay float32. Kernels of static convolutions have a scale for each filter; matrices, the
    experts among them, have one each, since a scale for each number of a mixed kernel takes more
    room than the experts themselves.

    Args:
        model: to write.
        path: of the file.
        precision: "float32", "float16" (of the weights in the file; it computes in float32 where
            the device has nothing narrower) or "int8".
        calibration: for "int8", images (H, W, C) float32 such as it will see.
        notes: texts by name, appended as an archive that ``unzip`` finds and the runtime ignores.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The converter loses the variables of a function, and finds those of a SavedModel.
        write_saved_model(portable(model), pathlib.Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=["serving_default"]
        )
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            # Fails where an operation has no form in integers, instead of leaving it as it is.
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.representative_dataset = lambda: ({"images": x[None]} for x in calibration)
            converter._experimental_disable_per_channel_quantization_for_dense_layers = True
        with warnings.catch_warnings():  # of an interpreter that the converter itself takes
            warnings.simplefilter("ignore")
            path.write_bytes(converter.convert())
    with zipfile.ZipFile(path, "a") as archive:
        for name, text in (notes or {}).items():
            archive.writestr(name, text)


def _images(model: keras.Model) -> tf.TensorSpec:
    return tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")


def _serve(model: keras.Model) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    return lambda images: {"logits": model(images, training=False)}


def in_float32(model: keras.Model) -> keras.Model:
    """Returns a model that computes in float32: itself, or a copy with the same weights."""
    if all(layer.compute_dtype == "float32" for layer in model._flatten_layers()):
        return model

    def clone(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(layer.get_config() | {"dtype": "float32"})

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def portable(model: keras.Model) -> keras.Model:
    """Returns a copy whose conditional convolutions are made of operations that all runtimes have.

    It is to be traced, not to be saved: what it differs in is no part of a layer's config.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy._flatten_layers():
        if isinstance(layer, CondConv2D):
            layer.formulation = "matmul" if layer.kernel_size == (1, 1) else "shifts"
        elif isinstance(layer, DepthwiseCondConv2D):
            layer.formulation = "taps"
    return copy


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Keeps what converters say off the screen, and turns what they raise into a RunError.

    They write to the descriptor behind stderr, past Python.
    """
    screen = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    except Exception as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RunError(f"{what} cannot be written: {said[0]}") from error
    finally:
        os.dup2(screen, 2)
        os.close(screen)
