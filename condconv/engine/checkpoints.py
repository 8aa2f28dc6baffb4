"""Checkpoints: complete or not there, named arrays, checked when they are read.

A checkpoint is a folder ``checkpoints/STEP`` with ``state.safetensors`` and ``manifest.json``. The
manifest, with the state's size, the run's notes and a checksum of both, is written last: a folder
without one is not a checkpoint. That holds on object stores too, where a rename is not atomic and
a write is.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import safetensors.numpy
from etils import epath

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, gist

Arrays = dict[str, np.ndarray]

_FOLDER, _STATE, _MANIFEST = "checkpoints", "state.safetensors", "manifest.json"
_DAMAGED = "manifest.damaged.json"  # of a checkpoint that has been set aside


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a run remembers beside its arrays.

    Attributes:
        score: on the selection split, if it was evaluated there.
        skipped: by how many steps the data is ahead of the steps done.
        rollbacks: how often the run went back.
    """

    score: float | None = None
    skipped: int = 0
    rollbacks: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read."""

    step: int
    state: Arrays
    notes: Notes

    @property
    def name(self) -> str:
        """For people."""
        return f"the checkpoint of step {self.step}"

    def weights(self, ema: bool | None = None) -> tuple[Arrays, str]:
        """Returns a network's variables by path, and "ema" if they are averages, else "raw".

        Args:
            ema: whether to take the averages; if None, wherever there are any.

        Raises:
            UsageError: if there are none to take.
        """
        averaged = any(name.startswith("average/") for name in self.state)
        if ema and not averaged:
            raise UsageError(
                f"--ema: the checkpoint of step {self.step} has no averaged weights; its "
                "Experiment.ema_decay is 0"
            )
        which, prefix = ("ema", "average/") if averaged and ema is not False else ("raw", "model/")
        named = {n.removeprefix(prefix): v for n, v in self.state.items() if n.startswith(prefix)}
        return named, which


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        workdir: of the run.
        keep: how many of the last to keep, besides the best.
        keep_every: steps between two that are kept for good, or None.
    """

    workdir: epath.Path
    keep: int = 3
    keep_every: int | None = None

    def save(self, step: int, state: Mapping[str, np.ndarray], notes: Notes) -> None:
        """Writes a checkpoint, then removes those that are no longer to be kept.

        Raises:
            RunError: if it cannot be written; nothing of it stays, and the others do.
        """
        folder = self._folder(step)
        content = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in state.items()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _MANIFEST).unlink(missing_ok=True)
            (folder / _STATE).write_bytes(content)
            files.write_text(folder / _MANIFEST, _manifest(step, content, notes))
        except (*files.path_errors(), RunError) as error:
            with contextlib.suppress(*files.path_errors()):
                folder.rmtree()
            raise RunError(self._unwritten(step, len(content), error)) from error
        self._remove_old()

    def _unwritten(self, step: int, size: int, error: Exception) -> str:
        cause = error.__cause__ or error
        reason = gist(cause)
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.workdir).free
            reason += f": it takes {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        last = self.steps()[-1:]
        return (
            f"the checkpoint of step {step} cannot be written to {self.workdir} ({reason}); the "
            f"last one is of step {last[0] if last else 'none'}. Make room, and the same command "
            "goes on from there"
        )

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the last one last."""
        return sorted(int(f.name) for f in self._folders() if _complete(f))

    def load_last(self, set_aside: bool = False) -> Checkpoint | None:
        """Returns the last checkpoint that can be read, or None.

        A damaged one is named in the log and passed over; ``set_aside`` also takes it out of the
        count, as who goes on from an earlier one must.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except UsageError as error:
                logging.warning("%s; trying the one before", error)
                if set_aside:
                    folder = self._folder(step)
                    (folder / _MANIFEST).rename(folder / _DAMAGED)
        return None

    def load(self, step: int) -> Checkpoint:
        """Returns one checkpoint.

        Raises:
            UsageError: if there is none, or it is not what its manifest says.
        """
        folder = self._folder(step)
        if not _complete(folder):
            have = ", ".join(map(str, self.steps())) or "none"
            raise UsageError(f"{self.workdir} has no checkpoint of step {step}; it has {have}")
        return _read(folder)

    def best(self) -> tuple[int, float] | None:
        """Returns step and score of the best checkpoint, the first of several, or None."""
        scores = ((step, _score(self._folder(step))) for step in self.steps())
        scored = [(step, score) for step, score in scores if score is not None]
        return max(scored, key=lambda each: (each[1], -each[0]), default=None)

    def resolve(self, name: str) -> Checkpoint:
        """Returns "last", "best", a step, or the path of a checkpoint.

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
            return self.load(best[0])
        return self.load(int(name)) if name.isdecimal() else read(name)

    def _folder(self, step: int) -> epath.Path:
        return self.workdir / _FOLDER / f"{step:09d}"

    def _folders(self) -> list[epath.Path]:
        root = self.workdir / _FOLDER
        return [f for f in root.iterdir() if f.name.isdecimal()] if root.exists() else []

    def _remove_old(self) -> None:
        best, steps = self.best(), self.steps()
        kept = {*steps[-self.keep :], *(best[:1] if best else ())}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        for folder in self._folders():
            if int(folder.name) in kept or (folder / _DAMAGED).exists():
                continue
            (folder / _MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, then nothing
            folder.rmtree()


def read(path: str) -> Checkpoint:
    """Returns the checkpoint in a folder such as ``WORKDIR/checkpoints/000001000``.

    Raises:
        UsageError: if it is none, or is damaged.
    """
    folder = epath.Path(path)
    if not folder.name.isdecimal() or not _complete(folder):
        raise UsageError(
            f"there is no checkpoint {path!r}: give 'last', 'best', a step or a folder of {_FOLDER}"
        )
    return _read(folder)


def is_finite(state: Mapping[str, np.ndarray]) -> bool:
    """Returns whether all floating-point numbers of a state are finite."""
    return all(np.isfinite(v).all() for v in state.values() if np.issubdtype(v.dtype, np.inexact))


def _complete(folder: epath.Path) -> bool:
    return (folder / _MANIFEST).exists()


def _score(folder: epath.Path) -> float | None:
    try:
        return _notes(json.loads((folder / _MANIFEST).read_text())).score
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # whoever loads it is told


def _notes(manifest: dict[str, Any]) -> Notes:
    """Returns the notes of a manifest.

    Raises:
        ValueError: if they are not what was written.
    """
    score = manifest.get("score")
    skipped, rollbacks = (manifest.get(name, 0) for name in ("skipped", "rollbacks"))
    whole = all(isinstance(n, int) and n >= 0 for n in (skipped, rollbacks))
    if not whole or not (score is None or math.isfinite(score)):
        raise ValueError("its notes are no numbers")
    return Notes(score, skipped, rollbacks)


def _read(folder: epath.Path) -> Checkpoint:
    try:
        text = (folder / _MANIFEST).read_text()
        content = (folder / _STATE).read_bytes()
        manifest = json.loads(text)
        notes = _notes(manifest)
        # As it was written, to the letter: a flipped bit in a note is as bad as one in a weight.
        intact = text == _manifest(int(folder.name), content, notes)
        state = safetensors.numpy.load(content) if intact else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"the checkpoint {folder} cannot be read: {error}") from error
    if not intact:
        raise UsageError(f"the checkpoint {folder} is damaged: it is not what its manifest says")
    return Checkpoint(int(folder.name), state, notes)


def _manifest(step: int, content: bytes, notes: Notes) -> str:
    values = {"step": step, "bytes": len(content), **dataclasses.asdict(notes)}
    checksum = hashlib.sha256(content + json.dumps(values).encode()).hexdigest()
    return json.dumps(values | {"sha256": checksum}, indent=2) + "\n"


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
