"""What a network has to be before it is exported, and the format that ONNX Runtime reads.

How a convolution with a kernel for each example is put together differs: TensorFlow runs what
``condconv.ops`` picks; ONNX Runtime and LiteRT have neither its loop over examples nor depthwise
convolutions whose number of channels depends on the batch, so these get matrix products and sums
of shifted inputs.
"""

import os
from collections.abc import Mapping
from typing import Any

import keras

from condconv.layers import CondConv2D, DepthwiseCondConv2D

_OPSET = 18  # of ONNX Runtime 1.14, of February 2023, and all since


def portable(model: keras.Model) -> keras.Model:
    """Returns a copy whose conditional convolutions are made of operations that all runtimes have.

    It is to be traced or exported, as by ``portable(model).export(path, format="litert")``, not to
    be saved: what it differs in is no part of a layer's config.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy._flatten_layers():
        if isinstance(layer, CondConv2D):
            layer.formulation = "matmul" if layer.kernel_size == (1, 1) else "shifts"
        elif isinstance(layer, DepthwiseCondConv2D):
            layer.formulation = "taps"
    if getattr(copy, "inputs", None):
        copy(copy.input)  # Keras exports what has been called
    return copy


def in_float32(model: keras.Model) -> keras.Model:
    """Returns a model that computes in float32: itself, or a copy with the same weights."""
    if all(layer.compute_dtype == "float32" for layer in model._flatten_layers()):
        return model

    def clone(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(layer.get_config() | {"dtype": "float32"})

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def write_onnx(
    model: keras.Model, path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes an ONNX file, which takes ``images`` and gives ``logits`` for a batch of any size.

    Needs the extra ``export`` (``pip install 'condconv[export]'``) and Keras on TensorFlow.

    Args:
        model: of one float32 input and one output, conditional layers or none in it.
        path: of the file.
        metadata: texts by name; they become its ``metadata_props``.

    Raises:
        ImportError: if the extra is not installed.
        ValueError: if Keras runs on another backend, or the model is not of this kind.
    """
    _check_can_write_onnx(model)
    try:
        import onnx
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            f"write_onnx needs {error.name}: pip install 'condconv[export]'", name=error.name
        ) from error
    signature = [tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32, name="images")]
    network = portable(model)

    def serve(images: Any) -> dict[str, Any]:
        return {"logits": network(images, training=False)}

    serve = tf.function(serve, input_signature=signature)
    proto, _ = tf2onnx.convert.from_function(serve, signature, opset=_OPSET)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    onnx.save(proto, path)


def _check_can_write_onnx(model: keras.Model) -> None:
    if (backend := keras.backend.backend()) != "tensorflow":
        raise ValueError(
            f"write_onnx runs on Keras' TensorFlow backend, not {backend!r}: save the model, and "
            "load it there (KERAS_BACKEND=tensorflow)"
        )
    ends = [len(getattr(model, name, None) or ()) for name in ("inputs", "outputs")]
    if ends != [1, 1]:
        raise ValueError(
            "write_onnx takes a Functional or built Sequential model of one input and one output. "
            f"Received: {model.name!r}, a {type(model).__name__} of {ends[0]} and {ends[1]}"
        )
