"""What a network says of single images: from the bytes of a file to the names of classes."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, gist, in_one_line
from condconv.engine.experiment import Experiment
from condconv.engine.restore import restore

_BATCH = 32
_ENDINGS = (".jpeg", ".jpg", ".png", ".gif", ".bmp")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")  # of such files


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network, with what lies before and behind it.

    Attributes:
        name: of the network, for people.
        logits: images (N, H, W, 3) float32, 0–255, to (N, classes).
        input_shape: of the images, (N, H, W, 3); None for a size that may be any.
        evaluate: an encoded image to (H, W, 3), as evaluation would see it.
        class_names: of all classes, or none.
    """

    name: str
    logits: Callable[[np.ndarray], np.ndarray]
    input_shape: Sequence[int | None]
    evaluate: Callable[[bytes], Any]
    class_names: Sequence[str] = ()

    def image(self, path: epath.Path) -> np.ndarray:
        """Returns an image as the network sees it, (H, W, 3) float32.

        Raises:
            UsageError: if ``evaluate`` cuts it to another size than the network takes.
            RunError: if it cannot be read.
        """
        with in_one_line(RunError, errors=files.path_errors()):
            image = np.asarray(self.evaluate(path.read_bytes()), np.float32)
        wanted = tuple(self.input_shape[1:])
        if any(size not in (None, cut) for size, cut in zip(wanted, image.shape, strict=True)):
            raise UsageError(
                f"{self.name} takes images of {wanted}, its preprocessing cuts {image.shape}"
            )
        return image

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns the probability of each class, (N, classes) float64.

        Raises:
            RunError: if the network gives something else than numbers.
        """
        logits = np.asarray(self.logits(images), np.float64)
        if not np.isfinite(logits).all():
            raise RunError(
                f"{self.name} gives logits that are no numbers: nothing can be predicted"
            )
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)


def of_run(
    experiment: Experiment, workdir: epath.Path, checkpoint: str = "last", ema: bool | None = None
) -> Classifier:
    """Returns the network of a run; arguments and errors are those of ``restore``."""
    restored = restore(experiment, workdir, checkpoint, ema, stand_in=True, in_float32=True)
    model, data = restored.model, restored.data
    return Classifier(
        str(workdir), model, model.input_shape, data.preprocessing.evaluate, data.class_names
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The best classes of an image.

    Attributes:
        path: of the image.
        classes: (top,) best first.
        probabilities: (top,) of them, among all classes.
        names: (top,) of them, or None for each.
    """

    path: epath.Path
    classes: Sequence[int]
    probabilities: Sequence[float]
    names: Sequence[str | None]

    def rows(self, exact: bool) -> list[dict[str, Any]]:
        """Returns ``image``, ``class``, ``name`` and ``probability`` of each class.

        Args:
            exact: if not, for people: probabilities of four digits, the image in the first row.
        """
        rows = [
            {"image": str(self.path), "class": number, "name": name, "probability": share}
            for number, name, share in zip(
                self.classes, self.names, self.probabilities, strict=True
            )
        ]
        if exact:
            return rows
        readable = [row | {"probability": f"{row['probability']:.4f}"} for row in rows]
        return readable[:1] + [row | {"image": ""} for row in readable[1:]]


def find_images(names: Sequence[str]) -> list[epath.Path]:
    """Returns the images that are named, and those in folders that are named.

    Raises:
        UsageError: if there is no such file or folder, a file is no image, or a folder has none.
    """
    return [path for name in names for path in _images_at(files.path(name))]


def _images_at(path: epath.Path) -> list[epath.Path]:
    if files.is_dir(path):
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if not (images := [p for p in inside if p.suffix.lower() in _ENDINGS]):
            raise UsageError(f"{path} holds no images ({', '.join(_ENDINGS)})")
        return images
    if not files.is_file(path):
        raise UsageError(f"there is no image {path}")
    if not _first_bytes(path).startswith(_BEGINNINGS):
        raise UsageError(f"{path} is no image: take a JPEG, PNG, GIF or BMP file")
    return [path]


def _first_bytes(path: epath.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except files.path_errors() as error:
        raise UsageError(f"{path} cannot be read ({gist(error)})") from error


def predict(
    classifier: Classifier, paths: Sequence[epath.Path], top: int = 5
) -> Iterator[Prediction]:
    """Yields the ``top`` classes of each image; one that cannot be read is named, and left out."""
    for start in range(0, len(paths), _BATCH):
        read = [(path, _image_or_none(classifier, path)) for path in paths[start : start + _BATCH]]
        whole = [(path, image) for path, image in read if image is not None]
        if not whole:
            continue
        every = classifier.probabilities(np.stack([image for _, image in whole]))
        for (path, _), shares in zip(whole, every, strict=True):
            best = np.argsort(-shares, kind="stable")[:top].tolist()
            names = [classifier.class_names[i] if classifier.class_names else None for i in best]
            yield Prediction(path, best, shares[best].tolist(), names)


def _image_or_none(classifier: Classifier, path: epath.Path) -> np.ndarray | None:
    try:
        return classifier.image(path)
    except RunError as error:
        print(f"{path} cannot be read: {error}", file=sys.stderr)
        return None
