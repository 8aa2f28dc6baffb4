"""A folder of folders of images: one for each split, and in it one for each class."""

import os
from collections.abc import Iterable, Sequence

import gin
import numpy as np
import tensorflow as tf
from etils import epath

from data.arguments import check
from data.source import Example, Source, Split, indexed

_ENDINGS = (".jpeg", ".jpg", ".png", ".gif", ".bmp")


@gin.register
def image_folder(data_dir: str, train: str = "train", minival_percent: int = 0) -> Source:
    """Images as files: DATA_DIR/SPLIT/CLASS/IMAGE, such as ``train/`` and ``val/`` of ImageNet.

    A class's label is its place among the sorted folders of the split ``train``. What a file
    holds is seen from its bytes, not from its name: JPEG (grey and CMYK too), PNG, GIF (the first
    frame) or BMP.

    Args:
        data_dir: holds a folder for each split, which gives the split its name.
        train: the split that says which classes there are.
        minival_percent: share of ``train`` to hold out: evenly spread over its sorted files,
            these become the split "minival", and ``train`` is without them.

    Raises:
        ValueError: if there are no images, or a split has classes that ``train`` does not have.
    """
    root = epath.Path(data_dir)
    names = _folders(root)
    if train not in names:
        raise ValueError(
            f"image_folder.data_dir={data_dir} has no folder {train!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    classes = _folders(root / train)
    files = {name: _files(root, name, classes) for name in names}
    if minival_percent:
        files |= _held_out(files[train], train, minival_percent)
    return Source(
        name=root.name,
        num_classes=len(classes),
        splits={name: _split(root, paths, classes) for name, paths in files.items()},
        class_names=classes,
    )


def _folders(path: epath.Path) -> list[str]:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(root: epath.Path, split: str, classes: Sequence[str]) -> list[str]:
    """Returns the images of a split as SPLIT/CLASS/IMAGE, sorted."""
    own = _folders(root / split)
    if unknown := sorted(set(own) - set(classes)):
        raise ValueError(
            f"{root / split} has {len(unknown)} classes that the training split does not have, "
            f"such as {unknown[0]!r}"
        )
    found = [f"{split}/{name}/{image}" for name in own for image in _images(root / split / name)]
    if not found:
        raise ValueError(f"{root / split} holds no images ({', '.join(_ENDINGS)}) in its folders")
    return found


def _images(folder: epath.Path) -> Iterable[str]:
    names = sorted(path.name for path in folder.iterdir())
    return (n for n in names if n.lower().endswith(_ENDINGS) and not n.startswith("."))


def _held_out(files: Sequence[str], train: str, percent: int) -> dict[str, list[str]]:
    check("image_folder.", ("minival_percent", percent, 0 < percent < 100, "0 to 99"))
    paths, places = np.array(files), np.arange(len(files))
    held = (places + 1) * percent // 100 > places * percent // 100
    return {train: paths[~held].tolist(), "minival": paths[held].tolist()}


def _split(root: epath.Path, files: Sequence[str], classes: Sequence[str]) -> Split:
    labels = {name: label for label, name in enumerate(classes)}
    all_files = tf.constant(files)
    all_labels = tf.constant([labels[file.split("/")[1]] for file in files], tf.int64)
    prefix = os.path.join(os.fspath(root), "")

    def example(index: tf.Tensor) -> Example:
        file = all_files[index]
        return {"image": tf.io.read_file(prefix + file), "label": all_labels[index], "id": file}

    return indexed(len(files), example)
