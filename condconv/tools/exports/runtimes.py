"""Opens exported files through the runtimes that people use, and runs them in a process of its own.

A process that has just written a file holds state that the file may lack, so what it says of the
file proves little. ``run_apart`` asks a fresh interpreter: it runs this file as a program, which
imports the runtime and no more, so nothing of ours is imported above.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Images = np.ndarray
"""(N, H, W, 3) float32, 0–255."""

Logits = np.ndarray
"""(N, classes) float32."""

_ANY_SIZE = 64  # height and width of the images that a network of no fixed size is tried with


@dataclasses.dataclass(frozen=True)
class Opened:
    """A network in a file, as its runtime computes it: a map of images to logits.

    Attributes:
        run: the map.
        input_shape: of images, (N, H, W, C); None for a size that may be any.
        output_shape: of logits, (N, classes).
        model: the network itself, of a ``.keras`` file.
        texts: what is written into an ONNX file about it.
    """

    run: Callable[[Images], Logits]
    input_shape: tuple[int | None, ...]
    output_shape: tuple[int | None, ...]
    model: Any = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, images: Images) -> Logits:
        """Runs it."""
        return self.run(images)


def open_network(path: str) -> Opened:
    """Returns the network in a file.

    A damaged file of LiteRT's can take the whole process with it, so one is tried in another first.

    Args:
        path: of a ``.keras``, ``.onnx`` or ``.tflite`` file, or the folder of a SavedModel, which
            is a program, and runs as one.

    Raises:
        RunError: if the runtime does not survive it. What else is wrong, it says in its own way.
    """
    if path.endswith(".tflite"):
        done = _run_as_program(path)
        if done.returncode < 0:
            from condconv.engine.errors import RunError

            raise RunError(f"{path} is damaged: LiteRT crashes on it (signal {-done.returncode})")
    return _open(path)


def image_shape(input_shape: Sequence[int | None]) -> tuple[int, ...]:
    """Returns the shape of an image, (H, W, C), to try a network with: any size is made one."""
    return tuple(size or _ANY_SIZE for size in input_shape[1:])


def _open(path: str) -> Opened:
    return _OPEN.get(pathlib.PurePath(path).suffix, _open_saved_model)(path)


def _open_keras(path: str) -> Opened:
    from condconv.engine import keras_file

    model = keras_file.load(path)

    def run(images: Images) -> Logits:
        return np.asarray(model(images, training=False))

    return Opened(run, model.input_shape, model.output_shape, model)


def _open_saved_model(path: str) -> Opened:
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    images, logits = serve.structured_input_signature[1]["images"], serve.structured_outputs

    def run(images: Images) -> Logits:  # of `loaded`, for a signature keeps no variables alive
        return loaded.signatures["serving_default"](images=tf.constant(images))["logits"].numpy()

    return Opened(run, tuple(images.shape), tuple(logits["logits"].shape))


def _open_onnx(path: str) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ends = (session.get_inputs()[0], session.get_outputs()[0])
    shapes = (_sizes(end.shape) for end in ends)
    texts = session.get_modelmeta().custom_metadata_map

    def run(images: Images) -> Logits:
        return session.run(["logits"], {"images": images})[0]

    return Opened(run, *shapes, texts=texts)


def _open_litert(path: str) -> Opened:
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=path).get_signature_runner("serving_default")
    ends = (run.get_input_details()["images"], run.get_output_details()["logits"])
    shapes = (_sizes(end["shape_signature"]) for end in ends)
    return Opened(lambda images: run(images=images)["logits"], *shapes)


def _sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """Returns a shape with None where a runtime has a name, or −1."""
    return tuple(None if isinstance(n, str | None) or n < 0 else int(n) for n in shape)


_OPEN = {".keras": _open_keras, ".onnx": _open_onnx, ".tflite": _open_litert}


def run_apart(path: pathlib.Path, batches: Sequence[Images]) -> list[Logits]:
    """Returns what a file says of each batch, in a fresh process.

    Raises:
        RunError: if it cannot be opened or run there; the last line of the process says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", *batches)
        done = _run_as_program(str(path), folder)
        if done.returncode:
            from condconv.engine.errors import RunError

            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RunError(f"{path.name} does not run in a fresh process: {said[-1]}")
        with np.load(f"{folder}/logits.npz") as logits:
            return [logits[name] for name in logits]


def _run_as_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls ``main`` of this file in a fresh interpreter."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-P", __file__, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        errors="replace",
    )


def main(path: str, folder: str | None = None) -> None:
    """Runs a file on the batches in ``folder``/images.npz, and leaves logits.npz there.

    Without a folder, it runs it on one black image, for nobody.
    """
    network = _open(path)
    if folder is None:
        network(np.zeros((1, *image_shape(network.input_shape)), np.float32))
        return
    with np.load(f"{folder}/images.npz") as batches:
        logits = [network(batches[name]) for name in batches]
    np.savez(f"{folder}/logits.npz", *logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
