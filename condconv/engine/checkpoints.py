"""Checkpoints: complete or not there, named arrays, checked when they are read.

A checkpoint is a folder ``checkpoints/STEP`` with ``state.safetensors`` and ``manifest.json``. The
manifest, with size and checksum of the state, is written last: a folder without one is not a
checkpoint. That holds on object stores too, where a rename is not atomic and a write is.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import safetensors.numpy
from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError

Arrays = dict[str, np.ndarray]

_FOLDER, _STATE, _MANIFEST, _BEST = "checkpoints", "state.safetensors", "manifest.json", "best.json"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        workdir: of the run.
        keep: how many of the last to keep, besides the best.
    """

    workdir: epath.Path
    keep: int = 3

    def save(self, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Writes a checkpoint, then removes those that are no longer to be kept."""
        folder = self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        content = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in state.items()})
        (folder / _STATE).write_bytes(content)
        manifest = {"step": step, "bytes": len(content), "sha256": _checksum(content)}
        files.write_json(folder / _MANIFEST, manifest)
        self._remove_old()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the last one last."""
        root = self.workdir / _FOLDER
        folders = root.iterdir() if root.exists() else ()
        return sorted(int(f.name) for f in folders if f.name.isdecimal() and _complete(f))

    def load_last(self) -> tuple[int, Arrays] | None:
        """Returns step and state of the last checkpoint that can be read, or None.

        A damaged one is named in the log and passed over.
        """
        for step in reversed(self.steps()):
            try:
                return step, self.load(step)
            except UsageError as error:
                logging.warning("%s; trying the one before", error)
        return None

    def load(self, step: int) -> Arrays:
        """Returns the state of one checkpoint.

        Raises:
            UsageError: if there is none, or it is not what its manifest says.
        """
        folder = self._folder(step)
        if not _complete(folder):
            have = ", ".join(map(str, self.steps())) or "none"
            raise UsageError(f"{self.workdir} has no checkpoint of step {step}; it has {have}")
        return _read(folder)

    def mark_best(self, step: int, score: float) -> None:
        """Remembers ``step`` as the best so far; it is kept until a better one comes."""
        files.write_json(self.workdir / _FOLDER / _BEST, {"step": step, "score": score})

    def best(self) -> tuple[int, float] | None:
        """Returns step and score of the best checkpoint so far, or None."""
        path = self.workdir / _FOLDER / _BEST
        if not path.exists():
            return None
        best = files.read_json(path)
        try:
            return int(best["step"]), float(best["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} names no best checkpoint: remove it") from error

    def resolve(self, name: str) -> tuple[int, Arrays]:
        """Returns step and state of "last", "best", a step, or the path of a checkpoint.

        Raises:
            UsageError: if there is no such checkpoint, or it is damaged.
        """
        if name == "last":
            found = self.load_last()
            if found is None:
                raise UsageError(f"{self.workdir} has no checkpoint: train first")
            return found
        if name == "best":
            best = self.best()
            if best is None:
                raise UsageError(
                    f"{self.workdir} has no best checkpoint: its config sets no "
                    "Experiment.selection_split to choose one by; take 'last'"
                )
            return best[0], self.load(best[0])
        if name.isdecimal():
            return int(name), self.load(int(name))
        folder = epath.Path(name)
        if not folder.name.isdecimal() or not _complete(folder):
            raise UsageError(
                f"there is no checkpoint {name!r}: give 'last', 'best', a step or a folder "
                f"of {_FOLDER}"
            )
        return int(folder.name), _read(folder)

    def _folder(self, step: int) -> epath.Path:
        return self.workdir / _FOLDER / f"{step:09d}"

    def _remove_old(self) -> None:
        best = self.best()
        kept = {*self.steps()[-self.keep :], *(best[:1] if best else ())}
        for step in self.steps():
            if step not in kept:
                (self._folder(step) / _MANIFEST).unlink()  # no longer a checkpoint, then nothing
                self._folder(step).rmtree()


def _complete(folder: epath.Path) -> bool:
    return (folder / _MANIFEST).exists()


def _read(folder: epath.Path) -> Arrays:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        content = (folder / _STATE).read_bytes()
        intact = manifest["bytes"] == len(content) and manifest["sha256"] == _checksum(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the checkpoint {folder} cannot be read: {error}") from error
    if not intact:
        raise UsageError(f"the checkpoint {folder} is damaged: it is not what its manifest says")
    return safetensors.numpy.load(content)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns a model's variables by path, but for seeds, on which no step depends.

    Raises:
        UsageError: if two have the same path.
    """
    variables = [v for v in model.variables if not v.path.endswith("seed_generator_state")]
    named = {variable.path: variable for variable in variables}
    if len(named) < len(variables):
        raise UsageError(f"layers of {model.name} share names: a checkpoint needs them to differ")
    return named


def fit(state: Mapping[str, np.ndarray], variables: Mapping[str, Any], what: str) -> None:
    """Assigns a state to variables by name, or changes nothing.

    Raises:
        UsageError: if names or shapes differ; the first differences are named.
    """
    problems = [f"{n} is not in the checkpoint" for n in variables if n not in state]
    problems += [f"{n} is only in the checkpoint" for n in state if n not in variables]
    problems += [
        f"{n} is {state[n].shape} in the checkpoint and {tuple(v.shape)} here"
        for n, v in variables.items()
        if n in state and state[n].shape != tuple(v.shape)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(f"{what} does not fit this model: {'; '.join(problems[:3])}{more}")
    for name, variable in variables.items():
        variable.assign(state[name])
