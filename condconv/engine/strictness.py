"""What gin lets pass, refused: every binding has to be known, used and of the right type."""

import difflib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
import typeguard

from condconv.engine.errors import UsageError
from condconv.engine.factories import is_macro
from condconv.engine.optimization import ENGINES_OWN, WRAPPERS

ROOT = "condconv.engine.experiment.Experiment"


def check() -> None:
    """Raises a UsageError if anything that gin holds is unknown, unused or of a wrong type."""
    _check_macros()
    config = gin.config._CONFIG
    used = [key for place in _reached() for key in _keys(*place) if key in config]
    for scope, selector in used:
        for name, value in config[scope, selector].items():
            _check_type(scope, selector, name, value)
    _check_all_are_used(used)


def operative() -> str:
    """Returns all values that the experiment uses, with defaults, as a config."""
    used = {}
    for scopes, selector in _reached():
        if not is_macro(selector):
            values = used.setdefault(("/".join(scopes), selector), _defaults(selector))
            for key in _keys(scopes, selector):
                values |= gin.config._CONFIG.get(key, {})
    return gin.config._config_str(used)


def _defaults(selector: str) -> dict[str, Any]:
    it = gin.config._REGISTRY[selector]
    defaults = gin.config._get_default_configurable_parameter_values
    return defaults(it.wrapped, it.allowlist, it.denylist)


def explain_syntax(message: str) -> str:
    """Returns what is wrong with a line that gin cannot parse."""
    if match := re.search(r"Failed to parse token '(.*)'$", message, re.DOTALL):
        return (
            f"{match[1]!r} is no value: take a number, 'text', (a, b), True, None, @name or %NAME"
        )
    return f"not a binding of the form name.parameter = value ({message})"


def explain(message: str) -> str:
    """Returns what gin has against a binding, with the names that it could have meant."""
    if match := re.search(r"No configurable matching.*?'(.*?)'", message):
        name = match[1].lstrip("@").rsplit("/", 1)[-1]
        known = _known()
        names = [name for group in known.values() for name in group]
        if name in WRAPPERS:
            return f"{name} cannot be a run's optimizer: {WRAPPERS[name]}"
        groups = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in known.items())
        return f"unknown name {name!r}{did_you_mean(name, names)} (known are {groups})"
    pattern = r"'(?:\S*\.)?(\w+)' (?:doesn't have a parameter named|has denylisted kwarg) '(\w+)'"
    if match := re.search(pattern, message):
        name, parameter = match.groups()
        selector = next(s for s in _registered() if s.split(".")[-1] == name)
        parameters = list(_signature(selector))
        if parameter in parameters:
            return f"{name}.{parameter} is set by the run itself: remove the binding"
        if parameter in ENGINES_OWN and selector.startswith("keras."):
            return f"{name}.{parameter} is the engine's own matter: set {ENGINES_OWN[parameter]}"
        hint = did_you_mean(parameter, parameters)
        return f"{name} has no parameter {parameter!r}{hint} (known are {', '.join(parameters)})"
    return message.rstrip(".")


def _registered() -> list[str]:
    """Returns the full names of all that gin knows; it has no public list of them."""
    return [selector for selector, _ in gin.config._REGISTRY.items()]


def _known() -> dict[str, list[str]]:
    """Returns the short names that a config may use, by kind."""
    kinds = {
        "models.": "models",
        "data.": "data",
        "condconv.engine.": "training",
        "keras.optimizers.": "Keras' optimizers",
    }
    known: dict[str, list[str]] = {}
    for selector in sorted(_registered()):
        for prefix, kind in kinds.items():
            if selector.startswith(prefix):
                known.setdefault(kind, []).append(selector.split(".")[-1])
    return known


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Returns a hint at the nearest of some names, or nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_macros() -> None:
    for (scope, selector), parameters in gin.config._CONFIG.items():
        for name, value in parameters.items():
            for macro in _macros_in(value):
                if not _macro_value(macro):
                    user = _display(scope, selector, name)
                    known = [s for s, kind in gin.config._CONFIG if is_macro(kind)]
                    hint = did_you_mean(macro, known)
                    raise UsageError(f"{user} refers to %{macro}, which nothing binds{hint}")
    for scope, selector in gin.config._CONFIG:
        if is_macro(selector):
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
    return ["/".join(r.scopes) for r in references if is_macro(r.configurable.selector)]


def _macro_value(name: str) -> dict[str, Any]:
    return gin.config._CONFIG.get((name, "gin.macro"), {})


def _reached() -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the scopes and the full name of all that the experiment refers to, itself first."""
    named = {it.wrapped: selector for selector, it in gin.config._REGISTRY.items()}
    todo, seen = [((), ROOT, ())], set()
    while todo:
        place = scopes, selector, around = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        yield scopes, selector
        values = {}
        for key in _keys(scopes, selector):
            values |= gin.config._CONFIG.get(key, {})
        around = around if is_macro(selector) else scopes
        for reference in gin.config.iterate_references(values):
            own, kind = tuple(reference.scopes), reference.configurable.selector
            todo.append((own, kind, around) if is_macro(kind) else (own or around, kind, ()))
        for name, parameter in _signature(selector).items():
            if name not in values and inspect.isfunction(parameter.default):
                todo += [((), named[parameter.default], ())] if parameter.default in named else []


def _keys(scopes: Sequence[str], selector: str) -> list[tuple[str, str]]:
    """Returns where the bindings are: of all scopes around a function, of its own for a macro."""
    depths = range(len(scopes) if is_macro(selector) else 0, len(scopes) + 1)
    return [("/".join(scopes[:depth]), selector) for depth in depths]


def _check_all_are_used(used: Sequence[tuple[str, str]]) -> None:
    unused = [key for key in gin.config._CONFIG if key not in used]
    if not unused:
        return
    scope, selector = unused[0]
    name = next(iter(gin.config._CONFIG[unused[0]]), "")
    scopes = [s for s, kind in used if s and kind == selector]
    more = f" (nor {len(unused) - 1} more)" if len(unused) > 1 else ""
    hint = did_you_mean(scope, scopes) if scope else ""
    raise UsageError(
        f"nothing uses {_display(scope, selector, name)}{more}: remove the binding{hint}"
    )


def _check_type(scope: str, selector: str, name: str, value: Any) -> None:
    if is_macro(selector):
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
    if is_macro(value.configurable.selector):
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
    if is_macro(selector):
        return f"%{scope}"
    return f"{scope + '/' if scope else ''}{selector.split('.')[-1]}.{name}"
