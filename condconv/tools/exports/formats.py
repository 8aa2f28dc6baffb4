"""Writes a network in the formats that people deploy; of ONNX, see ``condconv.write_onnx``.

All take ``images`` (N, H, W, 3) float32, 0–255, for any N, and give ``logits``. TensorFlow runs
whichever form of a convolution ``condconv`` picks, LiteRT what ``condconv.portable`` makes of it.
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

from condconv import portable
from condconv.tools.exports.trained_network import TrainedNetwork

# A map of encoded images (N,) to what the signature returns.
ServeEncoded = Callable[[tf.Tensor], Mapping[str, tf.Tensor]]


def serve_encoded(model: keras.Model, network: TrainedNetwork) -> ServeEncoded | None:
    """Returns the map of encoded images (N,) to their best classes; None if it is not known how.

    It gives ``classes`` (N, 5) int32, best first, ``probabilities`` (N, 5) float32 and, where
    classes have names, ``names`` (N, 5); as many as there are classes, if these are fewer.

    Args:
        model: of the network, folded or not.
        network: whose images are to be cut, and whose classes to be named.
    """
    if network.evaluate is None:
        return None
    best = min(5, model.output_shape[-1])
    shape = tf.TensorSpec(model.input_shape[1:], tf.float32)

    def image(encoded: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.cast(network.evaluate(encoded), tf.float32), shape.shape)

    def serve(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.map_fn(image, encoded, fn_output_signature=shape)
        probabilities = tf.nn.softmax(model(images, training=False))
        values, classes = tf.math.top_k(probabilities, best)
        answer = {"classes": classes, "probabilities": values}
        if network.class_names:
            answer["names"] = tf.gather(tf.constant(list(network.class_names)), classes)
        return answer

    return serve


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
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[images])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": model(images, training=False)}

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


@contextlib.contextmanager
def silenced_converters() -> Iterator[None]:
    """Keeps off the screen what converters write to the descriptor behind stderr, past Python."""
    screen = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
