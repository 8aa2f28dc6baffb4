"""How every command runs: flags first, then the heavy imports, in silence; errors in one line."""

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app, flags

from condconv.engine.errors import RunError, UsageError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h; the second takes 32 MiB at most


def run(main: Callable[[list[str]], int | None], arguments: str = "", backend: bool = True) -> None:
    """Parses the flags, runs ``main`` on what is left of the command line, and exits.

    Args:
        main: the command; gets the arguments that are no flags.
        arguments: what these are called; empty if there are none.
        backend: whether ``main`` needs Keras and TensorFlow at once; else it may import them by
            ``import_backend`` when it does.

    Exit codes: 0 done (or what ``main`` returns); 1 a failed run; 2 a call that cannot work.
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
            raise UsageError(f"takes flags only, not {rest[0]!r}; see --help")
        keep_freed_memory()
        if backend:
            import_backend()
        sys.exit(main(rest) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        sys.exit(_fail(error, 2))
    except RunError as error:
        sys.exit(_fail(error, 1))


def tell(line: str) -> None:
    """Prints a line of progress to stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def _fail(error: Exception, code: int) -> int:
    message = " ".join(str(error).split())  # one line, whatever a name or a library put into it
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    return code


def import_backend() -> None:
    """Imports what most commands need, in silence.

    Raises:
        UsageError: if Keras cannot have the backend that the environment names.
    """
    try:
        with quiet_tensorflow():
            import keras  # noqa: F401
            import tensorflow  # noqa: F401
    except (ImportError, ValueError) as error:
        if not (name := os.environ.get("KERAS_BACKEND")):
            raise
        raise UsageError(
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
