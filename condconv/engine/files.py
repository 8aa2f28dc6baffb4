"""The one path layer: local folders and object stores alike, and nothing half-written."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from condconv.engine.errors import RunError, UsageError, gist


def path(name: str) -> epath.Path:
    """Returns the path of that name.

    Raises:
        UsageError: if it is neither local nor of an object store.
    """
    try:
        return epath.Path(name)
    except KeyError as error:
        raise UsageError(f"{name} is no path: take a local one or gs://…") from error


def path_errors() -> tuple[type[Exception], ...]:
    """Returns what reading or writing a path can raise.

    Paths of object stores go through TensorFlow, which has errors of its own; where nobody has
    loaded it, nothing can raise them.
    """
    tensorflow = sys.modules.get("tensorflow")
    return (OSError, tensorflow.errors.OpError) if tensorflow else (OSError,)


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
    except path_errors() as error:
        raise UsageError(
            f"{flag}={folder} cannot be written to ({gist(error)}): name another folder"
        ) from error


def check_output(path: epath.Path, flag: str) -> None:
    """Makes the folder of a file to be, and makes sure that the file can be written.

    Raises:
        UsageError: if not; ``flag`` says who named it.
    """
    if is_dir(path):
        raise UsageError(f"{flag}={path} is a folder: name a file")
    make_writable(path.parent, f"the folder of {flag}")


def is_file(path: epath.Path) -> bool:
    """Returns whether there is such a file.

    Raises:
        UsageError: if that cannot be seen.
    """
    try:
        return path.is_file()
    except path_errors() as error:
        raise _unreadable(path, error) from error


def is_dir(path: epath.Path) -> bool:
    """Returns whether there is such a folder. Raises as ``is_file`` does."""
    try:
        return path.is_dir()
    except path_errors() as error:
        raise _unreadable(path, error) from error


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that it is whole or not there.

    Raises:
        RunError: if it cannot be written; what the file system said is its cause.
    """
    beside = path.parent / f".{path.name}.part"
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except path_errors() as error:
        raise RunError(
            f"{path} cannot be written ({gist(error)}): make room or allow it, and repeat"
        ) from error


def write_text(path: epath.Path, text: str) -> None:
    """Writes a text file, whole or not at all. Raises as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all. Raises as ``write_bytes`` does."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_text(path: epath.Path) -> str:
    """Reads a text file.

    Raises:
        UsageError: if it cannot be read, or is no text.
    """
    try:
        return path.read_text()
    except (*path_errors(), UnicodeError) as error:
        raise _unreadable(path, error) from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no JSON object: remove or restore it")
    return values


def _unreadable(path: epath.Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read ({gist(error)}): allow, restore or remove it")
