"""The only gin plumbing: strict parsing, saving, comparing, and errors that name the cure.

gin lets a mistyped macro or scope, a binding that nobody uses and a value of the wrong type pass
in silence. Here each is an error, before anything is built.
"""

import contextlib
import difflib
import importlib.util  # noqa: F401  gin uses it and forgets to import it
import inspect
import logging
import math
import pathlib
import re
import tokenize
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
import keras
import typeguard
from etils import epath

from condconv.engine import files, optimization  # noqa: F401  registers the optimizers
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment
from condconv.engine.schedules import check_duration

_ROOT = "condconv.engine.experiment.Experiment"
_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

Bindings = dict[str, str]

# What may change between two parts of a run, since nothing that it computes depends on them.
_FREE = {
    "Experiment.checkpoint_every",
    "Experiment.keep_checkpoints",
    "Experiment.keep_every",
    "Experiment.log_every",
    "Experiment.max_rollbacks",
    "Experiment.stall_seconds",
    "Experiment.steps_per_call",
    "pipeline.broken_are_wrong",
    "pipeline.max_broken",
}
_DURATION = "Experiment.duration"
CHANGEABLE = f"{', '.join(sorted(_FREE))} and {_DURATION} upwards"
"""Names what may change between two parts of a run, for people."""


def load(gin_files: Sequence[str], bindings: Sequence[str] = (), **unbound: Any) -> Experiment:
    """Parses config files and single bindings, later ones winning, into an experiment.

    Attributes that the config leaves out are taken from ``unbound``.

    Raises:
        UsageError: if a file is missing, or anything in it is unknown, unused or of a wrong type;
            if Keras has another backend than the one that experiments run on.
    """
    if (backend := keras.backend.backend()) != "tensorflow":
        raise UsageError(
            f"experiments run on Keras' TensorFlow backend, not on {backend}: leave KERAS_BACKEND "
            "out, or set it to tensorflow"
        )
    parse(gin_files, bindings)
    try:
        bound = gin.get_bindings(Experiment, resolve_references=False)
        missing = {name: value for name, value in unbound.items() if name not in bound}
        return gin.get_configurable(Experiment)(**missing)
    except UsageError as error:
        raise UsageError(str(error).split("\n")[0]) from error  # gin adds where it came from
    except TypeError as error:
        missing = re.findall(r"'(\w+)'", str(error).split("\n")[0])
        raise UsageError(
            f"the config leaves out what an experiment needs: "
            f"{', '.join(f'Experiment.{name}' for name in missing)}"
        ) from error


def load_run(workdir: epath.Path, bindings: Sequence[str] = ()) -> Experiment:
    """Returns the experiment of a run from its own ``config.gin``. Raises as ``load`` does."""
    path = workdir / "config.gin"
    if not files.is_file(path):
        raise UsageError(f"{workdir} is not the folder of a run: it has no config.gin")
    return load([str(path)], bindings)


def parse(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """Makes gin hold these files and bindings, and nothing else. Raises as ``load`` does."""
    _forget()
    paths = [_find(file) for file in gin_files]
    with _without_gin_noise():
        for path in paths:
            _search_beside(path)
            _parse(lambda path=path: gin.parse_config_file(str(path)), str(path))
        for binding in bindings:
            _parse(lambda binding=binding: gin.parse_config(binding), f"--gin_param={binding}")
    _check_macros()
    bound = _reachable_bindings()
    for (scope, selector), parameters in bound.items():
        for name, value in parameters.items():
            _check_type(scope, selector, name, value)
    _check_all_are_used(bound)


def save(directory: epath.Path) -> None:
    """Writes ``config.gin``, all bindings in force, which parses to the same experiment again."""
    files.write_text(directory / "config.gin", gin.config_str())


def save_operative(directory: epath.Path) -> None:
    """Writes ``operative_config.gin``, all values used, with defaults."""
    files.write_text(directory / "operative_config.gin", gin.operative_config_str())


def differences(text: str) -> list[str]:
    """Returns what another config binds differently from the one in force, a line each.

    What a run's outcome does not depend on may differ, and the training may get longer (see
    ``CHANGEABLE``), of which a line in the log warns.
    """
    ours = _statements(gin.config_str())
    try:
        theirs = _statements(text)
    except (ValueError, SyntaxError, tokenize.TokenError):
        return ["its config.gin cannot be read"]
    differing = {k for k in {*theirs, *ours} - _FREE if theirs.get(k) != ours.get(k)}
    if differing == {_DURATION} and _is_longer(ours.get(_DURATION, ""), theirs.get(_DURATION, "")):
        logging.warning(
            "%s grows from %s to %s: a schedule that ends with the run is stretched from here on",
            _DURATION,
            theirs[_DURATION],
            ours[_DURATION],
        )
        return []
    return [
        f"{key}: {theirs.get(key, 'not bound')} there, {ours.get(key, 'not bound')} here"
        for key in sorted(differing)
    ]


def _is_longer(duration: str, than: str) -> bool:
    """Whether a duration is the longer one, as far as that can be seen without the data."""
    try:
        (amount, unit), (other_amount, other_unit) = (
            check_duration(each, _DURATION) for each in (duration, than)
        )
    except UsageError:
        return False
    return unit == other_unit and amount > other_amount


class _AsText(gin.config_parser.ParserDelegate):
    """Reads references as the text they are, so that configs compare without being run."""

    def configurable_reference(self, name: str, evaluate: bool) -> str:
        return f"@{name}{'()' if evaluate else ''}"

    def macro(self, name: str) -> str:
        return f"%{name}"


def _statements(text: str) -> Bindings:
    statements = gin.config_parser.ConfigParser(text, _AsText())
    return {
        "/".join(filter(None, (s.scope, ".".join(filter(None, (s.selector, s.arg_name)))))): str(
            s.value
        )
        for s in statements
        if isinstance(s, gin.config_parser.BindingStatement)
    }


def _forget() -> None:
    with gin.unlock_config():
        gin.clear_config()


def _find(file: str) -> epath.Path:
    path = files.path(file)
    if not files.is_file(path):
        siblings = [p.name for p in path.parent.glob("*.gin")] if path.parent.exists() else []
        raise UsageError(f"there is no config file {file!r}{_did_you_mean(path.name, siblings)}")
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


def _parse(parse_it: Any, source: str) -> None:
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
            message = _explain_syntax(error.msg)
            places = [f"line {error.lineno}"] if error.lineno else []
        elif isinstance(error, tokenize.TokenError):
            message, places = _explain_syntax(error.args[0]), []
        line = next((m[0] for p in places if (m := re.search(r"line \d+", p))), "")
        where = f"{source}, {line}" if line else source
        raise UsageError(_one_line(f"{where}: {_explain(message)}")) from error


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _explain_syntax(message: str) -> str:
    if match := re.search(r"Failed to parse token '(.*)'$", message, re.DOTALL):
        return (
            f"{match[1]!r} is no value: take a number, 'text', (a, b), True, None, @name or %NAME"
        )
    return f"not a binding of the form name.parameter = value ({message})"


def _explain(message: str) -> str:
    if match := re.search(r"No configurable matching.*?'(.*?)'", message):
        name = match[1].lstrip("@").rsplit("/", 1)[-1]
        known = _known()
        names = [name for group in known.values() for name in group]
        groups = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in known.items())
        return f"unknown name {name!r}{_did_you_mean(name, names)} (known are {groups})"
    pattern = r"'(?:\S*\.)?(\w+)' (?:doesn't have a parameter named|has denylisted kwarg) '(\w+)'"
    if match := re.search(pattern, message):
        name, parameter = match.groups()
        selector = next(s for s in _registered() if s.split(".")[-1] == name)
        parameters = list(_signature(selector))
        if parameter in parameters:
            return f"{name}.{parameter} is set by the run itself: remove the binding"
        hint = _did_you_mean(parameter, parameters)
        return f"{name} has no parameter {parameter!r}{hint} (known are {', '.join(parameters)})"
    return message.rstrip(".")


def _registered() -> list[str]:
    """Returns the full names of all that gin knows; it has no public list of them."""
    return [selector for selector, _ in gin.config._REGISTRY.items()]


def _known() -> dict[str, list[str]]:
    """Returns the short names that a config may use, by kind."""
    kinds = {"models.": "models", "data.": "data", "condconv.engine.": "training"}
    known: dict[str, list[str]] = {}
    for selector in sorted(_registered()):
        for prefix, kind in kinds.items():
            if selector.startswith(prefix):
                known.setdefault(kind, []).append(selector.split(".")[-1])
    return known


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_macros() -> None:
    for (scope, selector), parameters in gin.config._CONFIG.items():
        for name, value in parameters.items():
            for macro in _macros_in(value):
                if not _macro_value(macro):
                    user = _display(scope, selector, name)
                    known = [s for s, kind in gin.config._CONFIG if _is_macro(kind)]
                    hint = _did_you_mean(macro, known)
                    raise UsageError(f"{user} refers to %{macro}, which nothing binds{hint}")
    for scope, selector in gin.config._CONFIG:
        if _is_macro(selector):
            _check_it_ends(scope, ())


def _check_it_ends(macro: str, path: tuple[str, ...]) -> None:
    """Raises a UsageError if a macro's value leads back to one of ``path``."""
    if macro in path:
        ring = " → ".join(f"%{each}" for each in (*path[path.index(macro) :], macro))
        raise UsageError(f"{ring}: a macro cannot refer to itself, bind it to a value")
    for each in _macros_in(_macro_value(macro)):
        _check_it_ends(each, (*path, macro))


def _macros_in(value: Any) -> list[str]:
    references = gin.config.iterate_references(value)
    return ["/".join(r.scopes) for r in references if _is_macro(r.configurable.selector)]


def _is_macro(selector: str) -> bool:
    return selector == "gin.macro"


def _macro_value(name: str) -> dict[str, Any]:
    return gin.config._CONFIG.get((name, "gin.macro"), {})


def _reachable_bindings() -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the bindings that the experiment uses, found by following references from it."""
    config, found, todo = gin.config._CONFIG, {}, [([], _ROOT)]
    while todo:
        scopes, selector = todo.pop()
        # A function takes the bindings of all scopes around it, a macro has but its own name.
        for depth in range(len(scopes) if _is_macro(selector) else 0, len(scopes) + 1):
            key = ("/".join(scopes[:depth]), selector)
            if key not in config or key in found:
                continue
            found[key] = config[key]
            for reference in gin.config.iterate_references(config[key]):
                todo.append((list(reference.scopes), reference.configurable.selector))
    return found


def _check_all_are_used(bound: dict[tuple[str, str], dict[str, Any]]) -> None:
    unused = [key for key in gin.config._CONFIG if key not in bound]
    if not unused:
        return
    scope, selector = unused[0]
    name = next(iter(gin.config._CONFIG[unused[0]]), "")
    scopes = [s for s, kind in bound if s and kind == selector]
    more = f" (nor {len(unused) - 1} more)" if len(unused) > 1 else ""
    hint = _did_you_mean(scope, scopes) if scope else ""
    raise UsageError(
        f"nothing uses {_display(scope, selector, name)}{more}: remove the binding{hint}"
    )


def _check_type(scope: str, selector: str, name: str, value: Any) -> None:
    if _is_macro(selector):
        return  # checked where it is used
    hint = _hints(selector).get(name)
    value = _resolved(value)
    if hint is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{_display(scope, selector, name)} takes finite numbers, not {value}")
    try:
        typeguard.check_type(value, hint)
    except typeguard.TypeCheckError:
        factory = typing.get_origin(hint) is Callable
        allowed = "a factory, written @name without ()" if factory else _readable(hint)
        got = value if factory else f"{value!r}, of type {type(value).__name__}"
        name = _display(scope, selector, name)
        raise UsageError(f"{name} takes {allowed}, not {got}") from None


def _readable(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _resolved(value: Any) -> Any:
    """Returns what a bound value will be: a macro's value, a factory, or the literal itself."""
    if isinstance(value, list | tuple):
        return type(value)(_resolved(each) for each in value)
    if not isinstance(value, gin.config.ConfigurableReference):
        return value
    if _is_macro(value.configurable.selector):
        return _resolved(_macro_value("/".join(value.scopes))["value"])
    return value if value.evaluate else value.configurable.wrapped


def _wrapped(selector: str) -> Any:
    return gin.config._REGISTRY[selector].wrapped


def _signature(selector: str) -> Any:
    return inspect.signature(_wrapped(selector)).parameters


def _hints(selector: str) -> dict[str, Any]:
    return typing.get_type_hints(
        function.__init__ if inspect.isclass(function := _wrapped(selector)) else function
    )


def _display(scope: str, selector: str, name: str) -> str:
    if _is_macro(selector):
        return f"%{scope}"
    return f"{scope + '/' if scope else ''}{selector.split('.')[-1]}.{name}"
