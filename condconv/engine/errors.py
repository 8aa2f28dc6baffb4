"""The two ways in which a command ends badly, and how a library's complaint becomes one line."""

import contextlib
import re
from collections.abc import Iterator


class UsageError(Exception):
    """What changing flags, config or paths would cure; found before the first step."""

    exit_code = 2


class RunError(Exception):
    """A failure after the first step, told in one line."""

    exit_code = 1


_AROUND = (
    *("Exception encountered when calling", "Graph execution error", "Detected at node"),
    *("<stack traces", " ", "\t", "[["),
)


def gist(error: BaseException) -> str:
    """Returns the one line of an error that says what is wrong, whichever library raised it.

    Keras tells first in which layer it was, TensorFlow in which operation of a graph or line of
    traced code; what the file system says has the path in it, which is known to whoever asks.
    """
    said = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    said = said.split("Exception encountered: ")[-1]
    said = re.sub(r"{{.*?}}|\[Op:.*|\x1b\[\d*m", "", said)  # nodes, operations, bold type
    lines = [line for line in said.splitlines() if line.strip()]
    if not lines:
        return repr(error)
    if lines[0].startswith("in user code:"):
        raised = (line.strip() for line in lines if re.match(r"\s*(Value|Type)Error: ", line))
        return re.sub(r"^\w+Error: ", "", next(raised, lines[-1].strip()))
    if hasattr(error, "op") and (raised := re.findall(r"^\w+Error: (.+)$", said, re.MULTILINE)):
        return raised[-1]
    return next((line for line in lines if not line.startswith(_AROUND)), lines[0]).strip()


@contextlib.contextmanager
def in_one_line(
    kind: type[UsageError] | type[RunError],
    what: str = "",
    errors: tuple[type[BaseException], ...] = (Exception,),
) -> Iterator[None]:
    """Turns what a library raises into an error of one line.

    Args:
        kind: of the error.
        what: comes before the gist of what the library said, with a colon.
        errors: that are turned; ours pass as they are.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except errors as error:
        raise kind(f"{what}: {gist(error)}" if what else gist(error)) from error


def blaming_the_config() -> contextlib.AbstractContextManager[None]:
    """Turns what a factory has against its arguments into a UsageError."""
    return in_one_line(UsageError, errors=(ValueError, TypeError))
