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

from condconv import fold_batch_norm, write_onnx
from condconv.engine.errors import RunError, UsageError, gist, in_one_line
from condconv.tools.exports import card, formats, runtimes
from condconv.tools.exports.calibration import Calibration
from condconv.tools.exports.trained_network import TrainedNetwork

FORMATS = ("keras", "saved_model", "onnx", "litert")
PRECISIONS = ("float32", "float16", "int8")

_PACKAGES = {"onnx": ("onnx", "onnxruntime", "tf2onnx"), "litert": ("ai_edge_litert",)}
_BATCHES = (1, 5)
_LEAST_AGREEMENT = 0.5  # in int8; a network that rounds badly keeps more, a broken one less


@dataclasses.dataclass(frozen=True)
class _Artifact:
    """A file, or folder, to write.

    Attributes:
        name: of the file.
        write: the network, folded or not, to the path.
        tolerance: largest difference of a logit, in shares of the largest; None for numbers so
            coarse that only the best class counts.
    """

    name: str
    write: Callable[[keras.Model, pathlib.Path], None]
    tolerance: float | None


def check_packages(formats: Sequence[str]) -> None:
    """Raises a UsageError if what writes or runs a format is not installed."""
    for name in formats:
        missing = [p for p in _PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            raise UsageError(
                f"--format={name} needs {', '.join(missing)}: pip install 'condconv[export]'"
            )


def export(
    network: TrainedNetwork,
    which: Sequence[str],
    output: pathlib.Path,
    *,
    precisions: Sequence[str] = ("float32",),
    fold: bool = True,
    calibration: Calibration | None = None,
) -> list[dict[str, Any]]:
    """Writes a network into a folder, which is there once every file in it has been checked.

    Each file is opened by the runtime that people use, in a fresh process, and compared with the
    network at batches of 1 and 5: on noise, or in int8 on images that it was not calibrated on.

    Args:
        network: to write.
        which: some of ``FORMATS``.
        output: folder, which is not there or empty, in one that is there.
        precisions: of the LiteRT files, some of ``PRECISIONS``.
        fold: whether batch normalisations become part of the convolutions.
        calibration: for "int8", the images it takes.

    Returns:
        A row for each file: ``file``, ``bytes``, ``difference`` (largest of a logit, in shares of
        the largest), ``tolerance`` (of it, or None), ``images`` (compared) and ``agreement`` (the
        share of them with the same best class).

    Raises:
        UsageError: if the network cannot be folded.
        RunError: if a file cannot be written, or says something else than the network.
    """
    model = _folded(network.model) if fold else network.model
    about = card.metadata(network, fold)
    on_noise = _with_logits(network.model, _noise(network.model))
    on_images = _with_logits(network.model, _held_out(calibration)) if calibration else ()
    with _whole_or_not_there(output) as folder:
        rows = []
        for artifact in _artifacts(network, which, precisions, about, calibration):
            path = folder / artifact.name
            print(f"writing {artifact.name}", file=sys.stderr)
            with (
                in_one_line(RunError, f"{artifact.name} cannot be written"),
                formats.silenced_converters(),
            ):
                artifact.write(model, path)
            expected = on_noise if artifact.tolerance else on_images
            compared = _compare(path, *expected, artifact.tolerance)
            rows.append({"file": artifact.name, "bytes": _bytes_in(path)} | compared)
        checksums = _checksums(folder)
        (folder / "metadata.json").write_text(_as_json(about | {"sha256": checksums}))
        origin = calibration.origin if calibration else ""
        (folder / "README.md").write_text(card.card(network, about, rows, checksums, origin))
    return rows


def _as_json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _folded(model: keras.Model) -> keras.Model:
    try:
        return fold_batch_norm(model)
    except ValueError as error:
        raise UsageError(f"{error}; or leave it as it is with --nofold") from error


def _artifacts(
    network: TrainedNetwork,
    which: Sequence[str],
    precisions: Sequence[str],
    about: Mapping[str, Any],
    calibration: Calibration | None,
) -> Iterator[_Artifact]:
    notes = {"metadata.json": _as_json(about)}
    if network.class_names:
        notes["labels.txt"] = "".join(f"{name}\n" for name in network.class_names)

    def saved_model(model: keras.Model, path: pathlib.Path) -> None:
        formats.write_saved_model(model, path, formats.serve_encoded(model, network), notes)

    def onnx(model: keras.Model, path: pathlib.Path) -> None:
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}
        write_onnx(model, path, texts)

    def litert(precision: str) -> Callable[[keras.Model, pathlib.Path], None]:
        images = calibration.images if calibration else ()
        return lambda model, path: formats.write_litert(model, path, precision, images, notes)

    if "keras" in which:
        yield _Artifact("model.keras", keras.Model.save, 1e-4)
    if "saved_model" in which:
        yield _Artifact("saved_model", saved_model, 1e-4)
    if "onnx" in which:
        yield _Artifact("model.onnx", onnx, 1e-4)
    for precision in dict.fromkeys(precisions) if "litert" in which else ():
        tolerance = {"float32": 1e-3, "float16": 1e-2, "int8": None}[precision]
        yield _Artifact(f"model_{precision}.tflite", litert(precision), tolerance)


def _noise(model: keras.Model) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = runtimes.image_shape(model.input_shape)
    return [rng.uniform(0, 255, (n, *shape)).astype(np.float32) for n in _BATCHES]


def _held_out(calibration: Calibration) -> list[np.ndarray]:
    images, (first, others) = calibration.held_out, _BATCHES
    return np.split(images, range(first, len(images), others))


def _with_logits(
    model: keras.Model, batches: Sequence[np.ndarray]
) -> tuple[Sequence[np.ndarray], np.ndarray]:
    """Returns the batches and the logits of all their images."""
    return batches, np.concatenate([np.asarray(model(x, training=False)) for x in batches])


def _compare(
    path: pathlib.Path,
    batches: Sequence[np.ndarray],
    expected: np.ndarray,
    tolerance: float | None,
) -> dict[str, Any]:
    found = np.concatenate(runtimes.run_apart(path, batches))
    share = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30)
    agreement = float(np.mean(found.argmax(-1) == expected.argmax(-1)))
    if tolerance is not None and not share <= tolerance:  # NaN is not
        raise RunError(
            f"{path.name} differs from the source by {share:.2g} of the largest logit, more than "
            f"the {tolerance:.0e} that are allowed: nothing was written"
        )
    if tolerance is None and not (agreement >= _LEAST_AGREEMENT and np.isfinite(share)):
        raise RunError(
            f"{path.name} gives {agreement:.0%} of {len(found)} images the class that the source "
            "gives: nothing was written; try --nofold, more --calibration_images or float16"
        )
    sizes = {"difference": float(share), "tolerance": tolerance}
    return sizes | {"images": len(found), "agreement": agreement}


@contextlib.contextmanager
def _whole_or_not_there(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder beside ``output`` to write to, and moves it there in the end."""
    beside = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        beside.chmod(0o755)  # a temporary folder is for its owner alone
        yield beside
        beside.replace(output)
    except OSError as error:
        raise RunError(f"{output} cannot be written ({gist(error)}): make room") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bytes_in(path: pathlib.Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in every if file.is_file())


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a folder, by its path there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
