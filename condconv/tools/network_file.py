"""Networks in files, as ``scripts/export.py`` writes them, for whoever is given one."""

import dataclasses
import importlib.util
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, in_one_line
from condconv.engine.evaluation import COST, cost_of
from condconv.tools.exports.runtimes import Images, Logits, Opened, open_network

_RUNTIMES = {".keras": "keras", ".onnx": "onnxruntime", ".tflite": "ai_edge_litert"}
_MOST_TEXT = 2**24  # bytes of JSON


@dataclasses.dataclass(frozen=True)
class NetworkFile:
    """A network in a file.

    Attributes:
        name: path of the file.
        opened: computes it.
        metadata: what is written in it or beside it, or nothing; see ``card.metadata``.
    """

    name: str
    opened: Opened
    metadata: Mapping[str, Any]

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Of images, (N, H, W, C); None for a size that may be any."""
        return self.opened.input_shape

    @property
    def num_classes(self) -> int:
        """How many logits it gives."""
        return int(self.opened.output_shape[-1])

    @property
    def labels(self) -> list[str]:
        """Names of all classes, or none."""
        labels = self.metadata.get("labels")
        known = isinstance(labels, list) and len(labels) == self.num_classes
        return [str(label) for label in labels] if known else []

    @property
    def preprocessing(self) -> list[str]:
        """The lines of a config that say how images are cut, or none."""
        lines = self.metadata.get("preprocessing")
        return [str(line) for line in lines] if isinstance(lines, list) else []

    def __call__(self, images: Images) -> Logits:
        """Runs it.

        Raises:
            RunError: if its runtime fails.
        """
        with in_one_line(RunError, f"--source={self.name} cannot be run"):
            return self.opened(images)

    def cost(self, image_size: int) -> dict[str, int | None]:
        """Returns ``parameters``, ``multiply_adds`` and ``macs``, or None where it does not tell.

        Args:
            image_size: height and width to count for, where the file leaves them open.
        """
        if all(isinstance(self.metadata.get(key), int) for key in COST):
            return {key: self.metadata[key] for key in COST}
        if (model := self.opened.model) is None:
            return dict.fromkeys(COST)
        return cost_of(model, None if self.input_shape[1] else image_size)


def open_file(path: str) -> NetworkFile:
    """Opens a ``.keras``, ``.onnx`` or ``.tflite`` file, or the folder of a SavedModel.

    Nothing in a ``.keras`` file is executed: Keras' safe mode is on.

    Raises:
        UsageError: if there is no such file, its runtime is not installed, or its network is not
            one of images to logits.
        RunError: if it cannot be opened.
    """
    _check_path(path)
    with in_one_line(RunError, f"--source={path} cannot be loaded"):
        opened = open_network(path)
    shapes = (opened.input_shape, opened.output_shape)
    if [len(shape) for shape in shapes] != [4, 2] or opened.output_shape[-1] is None:
        raise UsageError(
            f"--source={path} maps {shapes[0]} to {shapes[1]}, not images (N, H, W, C) to logits "
            "(N, classes)"
        )
    return NetworkFile(path, opened, _metadata(path, opened))


def _check_path(name: str) -> None:
    path = files.path(name)
    if "://" in name:
        raise UsageError(f"--source={name} is not local: copy it to this machine")
    if not path.exists():
        raise UsageError(f"--source={name}: there is no such file or folder")
    known = path.suffix in _RUNTIMES and files.is_file(path)
    if not known and not files.is_file(path / "saved_model.pb"):
        raise UsageError(
            f"--source={name} is no {', '.join(_RUNTIMES)} file, nor the folder of a SavedModel"
        )
    if known and importlib.util.find_spec(_RUNTIMES[path.suffix]) is None:
        raise UsageError(
            f"--source={name} needs {_RUNTIMES[path.suffix]}: pip install 'condconv[export]'"
        )


def _metadata(name: str, opened: Opened) -> Mapping[str, Any]:
    """Returns what a file says of itself, or else what ``metadata.json`` beside it says of it."""
    with in_one_line(RunError, f"--source={name} says what cannot be read"):
        path = pathlib.Path(name)
        inside = {key: json.loads(text) for key, text in opened.texts.items()}
        inside = inside or json.loads(_metadata_inside(path) or "{}")
        beside = path.absolute().parent / "metadata.json"
        found = inside or (json.loads(beside.read_text()) if beside.is_file() else {})
        described = found.get("sha256", {path.name: ""})  # what is inside knows of no files
        return found if any(key.split("/")[0] == path.name for key in described) else {}


def _metadata_inside(path: pathlib.Path) -> bytes | None:
    """Returns the metadata in the folder of a SavedModel, or behind a LiteRT file."""
    extra = path / "assets.extra" / "metadata.json"
    if extra.is_file():
        return extra.read_bytes()
    if path.suffix != ".tflite" or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        if sizes.get("metadata.json", 0) > _MOST_TEXT:
            raise ValueError(f"its metadata.json would take {sizes['metadata.json']:,} bytes")
        return archive.read("metadata.json") if "metadata.json" in sizes else None
