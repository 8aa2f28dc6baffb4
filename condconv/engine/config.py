"""The only gin plumbing: configs become experiments, and gin's state is of no use from then on.

gin lets a mistyped macro or scope, a binding that nobody uses and a value of the wrong type pass
in silence. Here each is an error, before anything is built (``strictness``).
"""

import contextlib
import dataclasses
import importlib.util  # noqa: F401  gin uses it and forgets to import it
import logging
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from etils import epath

from condconv.engine import factories, files, optimization, strictness  # noqa: F401  registers
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment, Written
from condconv.engine.factories import Bindings
from condconv.engine.written import CONFIG

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(gin_files: Sequence[str], bindings: Sequence[str] = (), **unbound: Any) -> Experiment:
    """Parses config files and single bindings, later ones winning, into an experiment.

    Attributes that the config leaves out are taken from ``unbound``.

    Raises:
        UsageError: if a file is missing, or anything in it is unknown, unused or of a wrong type.
    """
    parse(gin_files, bindings)
    bound: Bindings = dict(gin.config._CONFIG)
    try:
        experiment = Experiment(**unbound | factories.arguments_of(strictness.ROOT, bound))
    except TypeError as error:
        missing = re.findall(r"'(\w+)'", str(error))
        raise UsageError(
            f"the config leaves out what an experiment needs: "
            f"{', '.join(f'Experiment.{name}' for name in missing)}"
        ) from error
    values = {
        field.name: getattr(experiment, field.name) for field in dataclasses.fields(Experiment)
    }
    written = Written(gin.config_str(), strictness.operative(), values)
    return dataclasses.replace(experiment, written=written)


def load_run(workdir: epath.Path, bindings: Sequence[str] = ()) -> Experiment:
    """Returns the experiment of a run from its own ``config.gin``. Raises as ``load`` does."""
    path = workdir / CONFIG
    if not files.is_file(path):
        raise UsageError(f"{workdir} is not the folder of a run: it has no {CONFIG}")
    return load([str(path)], bindings)


def parse(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """Makes gin hold these files and bindings, and nothing else. Raises as ``load`` does."""
    with gin.unlock_config():
        gin.clear_config()
    paths = [_find(file) for file in gin_files]
    with _without_gin_noise():
        for path in paths:
            _search_beside(path)
            _parse(lambda path=path: gin.parse_config_file(str(path)), str(path))
        for binding in bindings:
            _parse(lambda binding=binding: gin.parse_config(binding), f"--gin_param={binding}")
    strictness.check()


def _find(file: str) -> epath.Path:
    path = files.path(file)
    if not files.is_file(path):
        siblings = [p.name for p in path.parent.glob("*.gin")] if path.parent.exists() else []
        raise UsageError(
            f"there is no config file {file!r}{strictness.did_you_mean(path.name, siblings)}"
        )
    return path


def _search_beside(path: epath.Path) -> None:
    """Has gin look for included files beside this one, then in ``configs/``.

    gin only ever adds a place to its list, at the end: a file of the same name in the folder of
    an earlier config would be taken.
    """
    # In full: gin takes a relative one for a Python package, and stumbles over one without files.
    gin.config._LOCATION_PREFIXES[:] = ["", str(path.parent.resolve()), str(_CONFIGS)]
    gin.config.register_file_reader(
        lambda name: epath.Path(name).open(), lambda name: epath.Path(name).is_file()
    )


@contextlib.contextmanager
def _without_gin_noise() -> Iterator[None]:
    """Holds back what gin logs: an error for each place without an included file."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _parse(parse_it: Callable[[], Any], source: str) -> None:
    """Turns what gin raises, a message and the place behind it, into one line."""
    try:
        parse_it()
    except RecursionError:
        raise UsageError(f"{source}: includes itself, directly or through others") from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        ImportError,
        tokenize.TokenError,
        *files.path_errors(),
    ) as error:
        message, *places = [line.strip() for line in str(error).split("\n") if line.strip()]
        if isinstance(error, SyntaxError):
            message = strictness.explain_syntax(error.msg)
            places = [f"line {error.lineno}"] if error.lineno else []
        elif isinstance(error, tokenize.TokenError):
            message, places = strictness.explain_syntax(error.args[0]), []
        line = next((m[0] for p in places if (m := re.search(r"line \d+", p))), "")
        where = f"{source}, {line}" if line else source
        explained = " ".join(strictness.explain(message).split())
        raise UsageError(f"{where}: {explained}") from error
