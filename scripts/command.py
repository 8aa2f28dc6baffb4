"""What every command begins with: flags, then the checks that need no Keras; errors in one line.

Whatever lies in ``condconv`` brings Keras along, which takes seconds. So a command's ``main`` first
refuses what cannot work, by flags and local paths alone, then calls ``import_backend``, and only
then imports what is ours. Paths of object stores, and what is in a file, are the engine's to judge.
"""

import contextlib
import ctypes
import difflib
import glob
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

from absl import app, flags

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h; the second takes 32 MiB at most


class WrongCall(Exception):
    """What changing flags or paths would cure, found before Keras is imported."""

    exit_code = 2


def run(main: Callable[[list[str]], int | None], arguments: str = "") -> None:
    """Parses the flags, runs ``main`` on what is left of the command line, and exits.

    Args:
        main: the command; gets the arguments that are no flags.
        arguments: what these are called; empty if there are none.

    Exit codes: 0 done (or what ``main`` returns); 1 a failed run; 2 a call that cannot work. An
    error of ours carries its own, ``exit_code``.
    """
    app.define_help_flags()
    try:
        _, *rest = flags.FLAGS(sys.argv)
    except SystemExit:  # absl answers --help itself, and calls that a failure
        sys.exit(0)
    except flags.Error as error:
        sys.exit(_fail(error, 2))
    logging.basicConfig(format="%(message)s")
    try:
        if rest and not arguments:
            raise WrongCall(f"takes flags only, not {rest[0]!r}; see --help")
        sys.exit(main(rest) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        sys.exit(_fail(error, error.exit_code))


def tell(line: str) -> None:
    """Prints a line of progress to stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def _fail(error: Exception, code: int) -> int:
    message = " ".join(str(error).split())  # one line, whatever a name or a library put into it
    tell(f"{os.path.basename(sys.argv[0])}: {message}")
    return code


def check_configs(names: Iterable[str]) -> None:
    """Refuses a config file that is not there, and names the nearest beside it."""
    for name in filter(_is_local, names):
        if not os.path.isfile(name):
            folder, file = os.path.split(name)
            siblings = glob.glob("*.gin", root_dir=folder or None)
            close = difflib.get_close_matches(file, siblings, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise WrongCall(f"there is no config file {name!r}{hint}")


def check_run(workdir: str | None) -> None:
    """Refuses a folder, if one is named, that is not that of a run."""
    if _is_local(workdir) and not os.path.isfile(os.path.join(workdir, "config.gin")):
        raise WrongCall(f"{workdir} is not the folder of a run: it has no config.gin")


def check_there(names: Iterable[str | None], flag: str = "") -> None:
    """Refuses files and folders, as far as they are named, that are not there."""
    for name in filter(_is_local, names):
        if not os.path.exists(name):
            raise WrongCall(f"{flag}{name}: there is no such file or folder")


def check_keras_file(source: str | None) -> None:
    """Refuses a ``--source``, if one is named, that is no ``.keras`` file."""
    if _is_local(source) and not (source.endswith(".keras") and os.path.isfile(source)):
        raise WrongCall(f"--source={source} is no .keras file: name one")


def check_output(flag: str, name: str | None, ending: str = "") -> None:
    """Refuses a file to be, if one is named, of another ending or that cannot be written."""
    if name and not name.lower().endswith(ending):
        raise WrongCall(f"{flag}={name} has to end in {ending}")
    if _is_local(name):
        if os.path.isdir(name):
            raise WrongCall(f"{flag}={name} is a folder: name a file")
        _make_folder_around(flag, name)


def check_new_folder(flag: str, name: str) -> None:
    """Refuses a folder to be that is not local, holds something or cannot be written."""
    if not _is_local(name):
        raise WrongCall(f"{flag}={name} is not local: name a folder here, and copy it")
    if os.listdir(name) if os.path.isdir(name) else os.path.lexists(name):
        raise WrongCall(f"{flag}={name} exists: name a new folder, or remove it")
    _make_folder_around(flag, name)


def _is_local(name: str | None) -> bool:
    return bool(name) and "://" not in name


def _make_folder_around(flag: str, name: str) -> None:
    folder = os.path.dirname(os.path.abspath(name))
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WrongCall(
            f"the folder of {flag}={folder} cannot be written to ({error.strerror}): "
            "name another folder"
        ) from error


def import_backend() -> None:
    """Imports Keras and its backend, in silence.

    Raises:
        WrongCall: if Keras cannot have the backend that the environment names.
    """
    keep_freed_memory()
    try:
        with quiet_tensorflow():
            import keras  # noqa: F401

            with contextlib.suppress(ImportError):  # on another backend networks do without
                import tensorflow  # noqa: F401
    except (ImportError, ValueError) as error:
        if not (name := os.environ.get("KERAS_BACKEND")):
            raise
        raise WrongCall(
            f"KERAS_BACKEND={name} cannot be used ({error}): leave it out, or set it to tensorflow"
        ) from error


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the process instead of giving it back.

    Images come and go by the thousand, and a page taken anew from the system for each of them can
    cost more than resizing them. Elsewhere than on glibc, does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, size in ((_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**30)):
            libc.mallopt(option, size)


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow's greeting off the screen; shows it after all if loading fails.

    Its first lines come before any log level is read, so only the file descriptor can be held.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(screen, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)
