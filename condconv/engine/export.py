"""Exports a network: writes each format, and has each file run before it is called done."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from condconv import fold_batch_norm
from condconv.engine import export_card, export_formats, export_runtimes, files
from condconv.engine.errors import RunError, UsageError
from condconv.engine.export_source import Source

FORMATS = ("keras", "saved_model", "onnx", "litert")
PRECISIONS = ("float32", "float16")

_PACKAGES = {"onnx": ("onnx", "onnxruntime", "tf2onnx"), "litert": ("ai_edge_litert",)}
_BATCHES = (1, 5)
_ANY_SIZE = 64  # height and width of the images that a network of no fixed size is tried with


@dataclasses.dataclass(frozen=True)
class _Artifact:
    """A file, or folder, to write.

    Attributes:
        name: of the file.
        write: the network, folded or not, to the path.
        tolerance: largest difference of a logit, in shares of the largest.
    """

    name: str
    write: Callable[[keras.Model, pathlib.Path], None]
    tolerance: float


def check_packages(formats: Sequence[str]) -> None:
    """Raises a UsageError if what writes or runs a format is not installed."""
    for name in formats:
        missing = [p for p in _PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            raise UsageError(
                f"--format={name} needs {', '.join(missing)}: pip install 'condconv[export]'"
            )


def check_output(name: str) -> pathlib.Path:
    """Returns the folder to be written.

    Raises:
        UsageError: if it holds something already, is not local or cannot be made.
    """
    if "://" in name:
        raise UsageError(f"--output={name} is not local: export to a folder here, and copy it")
    output = pathlib.Path(name)
    with contextlib.suppress(OSError):  # not there, which is well, or not to be read, told below
        if output.is_file() or any(output.iterdir()):
            raise UsageError(f"--output={name} exists: name a new folder, or remove it")
    files.make_writable(files.path(str(output.absolute().parent)), "the folder of --output")
    return output


def export(
    source: Source,
    formats: Sequence[str],
    output: pathlib.Path,
    *,
    precisions: Sequence[str] = ("float32",),
    fold: bool = True,
) -> list[dict[str, Any]]:
    """Writes a network into a folder, which is there once every file in it has been checked.

    Each file is opened by the runtime that people use, in a fresh process, and compared with the
    source at batches of 1 and 5.

    Args:
        source: to write.
        formats: some of ``FORMATS``.
        output: folder, from ``check_output``.
        precisions: of the LiteRT files, some of ``PRECISIONS``.
        fold: whether batch normalisations become part of the convolutions.

    Returns:
        A row for each file: ``file``, ``bytes``, ``difference`` (largest of a logit, in shares of
        the largest) and ``tolerance``.

    Raises:
        UsageError: if the network cannot be folded.
        RunError: if a file cannot be written, or says something else than the source.
    """
    model = _folded(source.model) if fold else source.model
    metadata = export_card.metadata(source, fold)
    batches = _batches(source.model)
    expected = {n: np.asarray(source.model(x, training=False)) for n, x in batches.items()}
    with _whole_or_not_there(output) as folder:
        rows = []
        for artifact in _artifacts(source, formats, precisions, metadata):
            path = folder / artifact.name
            print(f"writing {artifact.name}", file=sys.stderr)
            with export_formats.one_line(artifact.name):
                artifact.write(model, path)
            found = _difference(path, batches, expected, artifact.tolerance)
            sizes = {"bytes": _bytes(path), "difference": found, "tolerance": artifact.tolerance}
            rows.append({"file": artifact.name} | sizes)
        checksums = _checksums(folder)
        (folder / "metadata.json").write_text(
            json.dumps(metadata | {"sha256": checksums}, indent=2, ensure_ascii=False) + "\n"
        )
        (folder / "README.md").write_text(export_card.card(source, fold, rows, checksums))
    return rows


def _folded(model: keras.Model) -> keras.Model:
    try:
        return fold_batch_norm(model)
    except ValueError as error:
        raise UsageError(f"{error}; or leave it as it is with --nofold") from error


def _artifacts(
    source: Source,
    formats: Sequence[str],
    precisions: Sequence[str],
    metadata: Mapping[str, Any],
) -> Iterator[_Artifact]:
    def saved_model(model: keras.Model, path: pathlib.Path) -> None:
        export_formats.write_saved_model(model, path, serving(model, source))

    def onnx(model: keras.Model, path: pathlib.Path) -> None:
        texts = {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
        export_formats.write_onnx(model, path, texts)

    def litert(precision: str) -> Callable[[keras.Model, pathlib.Path], None]:
        return lambda model, path: export_formats.write_litert(model, path, precision)

    if "keras" in formats:
        yield _Artifact("model.keras", export_formats.write_keras, 1e-4)
    if "saved_model" in formats:
        yield _Artifact("saved_model", saved_model, 1e-4)
    if "onnx" in formats:
        yield _Artifact("model.onnx", onnx, 1e-4)
    for precision in dict.fromkeys(precisions) if "litert" in formats else ():
        tolerance = {"float32": 1e-3, "float16": 1e-2}[precision]
        yield _Artifact(f"model_{precision}.tflite", litert(precision), tolerance)


def serving(model: keras.Model, source: Source) -> export_formats.ServeEncoded | None:
    """Returns the map of encoded images (N,) to their best classes; None if it is not known how.

    It gives ``classes`` (N, 5) int32, best first, ``probabilities`` (N, 5) float32 and, where
    classes have names, ``names`` (N, 5); as many as there are classes, if these are fewer.
    """
    if source.evaluate is None:
        return None
    best = min(5, model.output_shape[-1])
    shape = tf.TensorSpec(model.input_shape[1:], tf.float32)

    def image(encoded: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.cast(source.evaluate(encoded), tf.float32), shape.shape)

    def serve(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.map_fn(image, encoded, fn_output_signature=shape)
        probabilities = tf.nn.softmax(model(images, training=False))
        values, classes = tf.math.top_k(probabilities, best)
        answer = {"classes": classes, "probabilities": values}
        if source.class_names:
            answer["names"] = tf.gather(tf.constant(list(source.class_names)), classes)
        return answer

    return serve


def _batches(model: keras.Model) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = [size or _ANY_SIZE for size in model.input_shape[1:]]
    return {n: rng.uniform(0, 255, (n, *shape)).astype(np.float32) for n in _BATCHES}


def _difference(
    path: pathlib.Path,
    batches: Mapping[int, np.ndarray],
    expected: Mapping[int, np.ndarray],
    tolerance: float,
) -> float:
    found = export_runtimes.run_apart(path, batches)
    differences = [
        np.max(np.abs(found[n] - logits)) / max(np.max(np.abs(logits)), 1e-30)
        for n, logits in expected.items()
    ]
    worst = float(np.max(differences))
    if not worst <= tolerance:  # NaN is not
        raise RunError(
            f"{path.name} differs from the source by {worst:.2g} of the largest logit, more than "
            f"the {tolerance:.0e} that are allowed: nothing was written"
        )
    return worst


@contextlib.contextmanager
def _whole_or_not_there(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder beside ``output`` to write to, and moves it there in the end."""
    beside = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        beside.chmod(0o755)  # a temporary folder is for its owner alone
        yield beside
        beside.replace(output)
    except OSError as error:
        raise RunError(f"{output} cannot be written ({files.reason(error)}): make room") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bytes(path: pathlib.Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in every if file.is_file())


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a folder, by its path there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
