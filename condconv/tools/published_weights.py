"""Reads checkpoints that others have published: arrays by name, and what is said about them.

Nothing in a file is executed: TensorFlow's checkpoints and safetensors hold numbers alone, and
pickles are never opened.
"""

import dataclasses
import json
import math
import re
import tempfile
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, in_one_line

_AVERAGE = "/ExponentialMovingAverage"
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".pth.tar")
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; d = torch.load('IN', map_location='cpu', "
    "weights_only=True); d = d.get('state_dict', d); s.save_file({k: v.clone().contiguous() "
    "for k, v in d.items()}, 'OUT.safetensors')\""
)

_ENDING = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
_ENDINGS = (".index", ".data-00000-of-00001")

_COUNT = "num_batches_tracked"  # of batches, which is of no use
_DAMAGED = (safetensors.SafetensorError, ValueError, OverflowError, RecursionError)
_UNREADABLE = (ValueError, RuntimeError, LookupError, MemoryError)  # what TensorFlow raises

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    """What a published checkpoint holds.

    Attributes:
        values: of its network's variables, by their names there; float32.
        averaged: which of them are moving averages.
        is_timm: whether it is a state dict of timm's, and not of TensorFlow 1.
        architecture: timm's name of the network, if it is said.
        normalization: mean and deviation of its pixels, 0–255, if they are said.
    """

    values: dict[str, np.ndarray]
    averaged: frozenset[str] = frozenset()
    is_timm: bool = False
    architecture: str | None = None
    normalization: tuple[Triple, Triple] | None = None


def read(source: str, ema: bool | None = None) -> PublishedWeights:
    """Reads a checkpoint.

    Args:
        source: the prefix or the folder of a TensorFlow 1 checkpoint, or a ``.safetensors`` file
            of timm's, beside which its ``config.json`` may lie.
        ema: True or None for the average of each variable that has one; False for none.

    Raises:
        UsageError: if there is no such file, it is a pickle, or ``ema`` asks for averages that it
            does not have.
        RunError: if it is damaged.
    """
    path = files.path(source)
    if source.endswith(_PICKLES):
        raise UsageError(
            f"--source={source} is a pickle, which can run any code and is not opened; where you "
            f"trust it, convert it with {_CONVERT}"
        )
    if path.suffix == ".safetensors":
        if ema:
            raise UsageError(f"--source={source} has no averages: leave --ema out")
        return _read_timm(path)
    return _read_tf1(path, ema)


def _read_timm(path: epath.Path) -> PublishedWeights:
    """Reads a state dict."""
    if not files.is_file(path):
        raise UsageError(f"there is no file --source={path}")
    with in_one_line(RunError, f"{path} cannot be read", files.path_errors()):
        content = path.read_bytes()
    with in_one_line(RunError, f"{path} is damaged, or no safetensors file", _DAMAGED):
        values = _numbers_in(content, path)
        notes = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    beside = path.parent / "config.json"  # as on the Hugging Face Hub
    config = files.read_json(beside) if files.is_file(beside) else {}
    name = (notes.get("__metadata__") or {}).get("architecture") or config.get("architecture")
    return PublishedWeights(
        {n: v.astype(np.float32, copy=False) for n, v in values.items() if not n.endswith(_COUNT)},
        is_timm=True,
        architecture=name if isinstance(name, str) else None,
        normalization=_normalization(config.get("pretrained_cfg")),
    )


def _numbers_in(content: bytes, path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(content)
    except KeyError as error:
        raise UsageError(f"{path} holds numbers of type {error}: save them as F32") from error


def _normalization(config: Any) -> tuple[Triple, Triple] | None:
    if not isinstance(config, dict) or "mean" not in config or "std" not in config:
        return None
    try:
        mean, deviation = (
            tuple(round(255 * float(value), 6) for value in config[key]) for key in ("mean", "std")
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"config.json beside --source has mean {config['mean']!r} and std {config['std']!r}: "
            "they take three numbers each"
        ) from error
    return mean, deviation


def _read_tf1(path: epath.Path, ema: bool | None) -> PublishedWeights:
    import tensorflow as tf

    prefix = _prefix(path)
    what = f"the checkpoint {prefix} is damaged, or none; fetch it again"
    with in_one_line(RunError, what, (*files.path_errors(), *_UNREADABLE)):
        reader = tf.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        chosen = _choose(shapes, ema, prefix)
        _check_size(prefix, [shapes[stored] for stored in chosen.values()])
        values = {n: reader.get_tensor(stored).astype(np.float32) for n, stored in chosen.items()}
    averaged = frozenset(name for name, stored in chosen.items() if stored.endswith(_AVERAGE))
    return PublishedWeights(values, averaged)


def _check_size(prefix: str, shapes: list[list[int]]) -> None:
    """Checks that a checkpoint can hold what it declares, before room is made for it.

    Raises:
        ValueError: if not.
    """
    path = epath.Path(prefix)
    parts = [each for each in path.parent.iterdir() if each.name.startswith(path.name)]
    numbers, size = sum(map(math.prod, shapes)), sum(part.stat().length for part in parts)
    if min(map(math.prod, shapes), default=0) < 0 or 2 * numbers > size:
        raise ValueError(f"{numbers:,} numbers do not fit into {size:,} bytes")


def _prefix(path: epath.Path) -> str:
    """Returns the path of a checkpoint without the endings of its files.

    Raises:
        UsageError: if there is none, or a folder has several and does not say which is the last.
    """
    import tensorflow as tf

    if files.is_dir(path):
        parts = [str(each) for each in path.iterdir() if _ENDING.search(each.name)]
        found = sorted({_ENDING.sub("", part) for part in parts})
        last = tf.train.latest_checkpoint(str(path))
        if last not in found and len(found) != 1:
            names = ", ".join(epath.Path(each).name for each in found) or "none"
            raise UsageError(f"--source={path} is a folder of these checkpoints: {names}; name one")
        return last if last in found else found[0]
    prefix = _ENDING.sub("", str(path))
    if not any(files.is_file(epath.Path(prefix + ending)) for ending in ("", *_ENDINGS)):
        raise UsageError(
            f"there is no checkpoint --source={path}: name the prefix or the folder of a "
            "TensorFlow 1 checkpoint, unpacked, or a .safetensors file"
        )
    return prefix


def _choose(shapes: dict[str, list[int]], ema: bool | None, prefix: str) -> dict[str, str]:
    """Returns under which name to read each variable of a network.

    What an optimizer keeps lies under the variable that it is of, and counters are single numbers.
    """
    averages = {name for name in shapes if name.endswith(_AVERAGE)}
    if ema and not averages:
        raise UsageError(f"the checkpoint {prefix} has no averages: leave --ema out")
    names = {name.removesuffix(_AVERAGE) for name in shapes if shapes[name]}
    names = {name for name in names if name.rpartition("/")[0] not in names}
    averaged = {} if ema is False else {n: n + _AVERAGE for n in names if n + _AVERAGE in averages}
    return {name: name for name in sorted(names) if name in shapes} | averaged


def save(model: keras.Model, path: epath.Path) -> None:
    """Writes a network as a ``.keras`` file, whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    make_room = in_one_line(RunError, f"{path} cannot be written; make room", (OSError,))
    with make_room, tempfile.TemporaryDirectory() as folder:
        beside = epath.Path(folder) / path.name
        model.save(beside)
        content = beside.read_bytes()
    files.write_bytes(path, content)
