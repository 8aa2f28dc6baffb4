"""Loads ``.keras`` files of anybody's, without running or unpacking what they bring along.

Keras' safe mode refuses code, and Keras refuses links out of the file and declared sizes of more
than 4 GiB that the file does not hold. What is left is a file that makes room for less than that,
many times over, or one whose layers are far larger than its weights.
"""

import concurrent.futures
import io
import json
import math
import os
import zipfile
import zlib
from typing import Any

import h5py
import keras

import condconv  # noqa: F401  registers the layers
from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, in_one_line

_WEIGHTS = "model.weights.h5"
_MEMBERS = {"config.json", "metadata.json", _WEIGHTS}
_MOST_TEXT = 2**26  # bytes of JSON; a network of a thousand layers has 2^20
_MOST_PACKED = 10  # times the size of the file; weights hardly get smaller by compression
_SPARE = 2**20  # numbers that a network has and its file need not: states of random generators


def load(path: str) -> keras.Model:
    """Returns the network in a local ``.keras`` file, whose layers are Keras' and ours.

    Raises:
        UsageError: if there is no such file.
        RunError: if it is damaged, larger inside than it can be, holds what no network of images
            needs, or is refused by Keras.
    """
    if not path.endswith(".keras") or not files.is_file(files.path(path)):
        raise UsageError(f"{path} is no .keras file: name one")
    damaged = (*files.path_errors(), EOFError, zipfile.BadZipFile, zlib.error)
    refused = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)
    with in_one_line(RunError, f"{path} cannot be loaded", (*damaged, *refused, MemoryError)):
        return _load(path)


def _load(path: str) -> keras.Model:
    with zipfile.ZipFile(path) as archive:
        _check_members(archive, os.path.getsize(path))
        config = json.loads(archive.read("config.json"))
        held = _numbers_in(archive.read(_WEIGHTS))
    # In a thread, Keras forgets behind it which variables it has promised to fill.
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        declared = apart.submit(_numbers_of, config).result()
    if declared > held + _SPARE:
        raise ValueError(f"its layers have {declared:,} numbers, and it holds {held:,}")
    return keras.saving.load_model(path, compile=False, safe_mode=True)


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    names = archive.namelist()
    if strange := sorted({*names} - _MEMBERS):
        raise ValueError(f"it holds {strange[0]!r}, which is no part of a network of images")
    if missing := sorted(_MEMBERS - {*names, "metadata.json"}):
        raise ValueError(f"it has no {missing[0]}")
    for member in archive.infolist():
        most = _MOST_PACKED * size if member.filename == _WEIGHTS else _MOST_TEXT
        if member.file_size > most:
            raise ValueError(f"its {member.filename} would take {member.file_size:,} bytes")


def _numbers_in(weights: bytes) -> int:
    """Returns how many numbers HDF5 holds.

    Raises:
        ValueError: if it declares more than that.
    """
    sizes: list[tuple[int, int]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append((math.prod(item.shape), item.nbytes))

    with h5py.File(io.BytesIO(weights)) as file:
        file.visititems(visit)
    numbers, stored = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    if stored > _MOST_PACKED * len(weights):
        raise ValueError(f"its weights would take {stored:,} bytes, and it has {len(weights):,}")
    return numbers


def _numbers_of(config: dict[str, Any]) -> int:
    """Returns how many numbers the variables of a network have, without making room for any."""
    untrained = {key: value for key, value in config.items() if key != "compile_config"}
    with keras.StatelessScope(initialize_variables=False):
        model = keras.saving.deserialize_keras_object(untrained, safe_mode=True)
        return sum(math.prod(variable.shape) for variable in model.variables)
