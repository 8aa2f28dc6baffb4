"""The one path layer: local folders and object stores alike, and nothing half-written."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from condconv.engine.errors import UsageError


def make_writable(folder: epath.Path, flag: str) -> None:
    """Makes a folder and makes sure that it can be written to.

    Raises:
        UsageError: if not; ``flag`` says who named it.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"{flag}={folder} cannot be written to ({reason}): name another folder"
        ) from error


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file beside its place and moves it there, so that it is whole or not there."""
    beside = path.parent / f".{path.name}.part"
    beside.write_text(text)
    beside.replace(path)


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        UsageError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove or restore it") from error
