"""Factories as gin describes them, frozen: called later, they need nothing of gin's state."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gin

Bindings = dict[tuple[str, str], dict[str, Any]]
"""Values by parameter, of each scope and full name."""


class Factory:
    """A function with the arguments that a config gives it, which a caller's own replace.

    Args:
        function: to be called.
        arguments: of it, which may be factories to be called themselves (``Called``).
    """

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._arguments = function, arguments

    def __call__(self, *positional: Any, **given: Any) -> Any:
        """Calls the function."""
        named = inspect.signature(self._function).parameters
        taken = {*given, *list(named)[: len(positional)]}
        bound = {name: v for name, v in self._arguments.items() if name not in taken}
        return self._function(*positional, **copy.deepcopy(bound), **given)

    def __deepcopy__(self, memo: Any) -> "Factory":
        return self

    def __repr__(self) -> str:
        return f"@{self.__name__}"


@dataclasses.dataclass(frozen=True)
class Called:
    """What a config writes with (): the factory is called anew for each use, which is a copy."""

    factory: Factory

    def __deepcopy__(self, memo: Any) -> Any:
        return self.factory()


def freeze(value: Any, bindings: Bindings, scopes: tuple[str, ...] = ()) -> Any:
    """Returns a bound value without references: macros by value, configurables as factories.

    Args:
        value: as gin holds it.
        bindings: all of the config.
        scopes: around the value, which references without one of their own are in.
    """
    if isinstance(value, gin.config.ConfigurableReference):
        if is_macro(value.configurable.selector):
            return freeze(bindings["/".join(value.scopes), "gin.macro"]["value"], bindings, scopes)
        inner = tuple(value.scopes) or scopes
        selector = value.configurable.selector
        arguments = dict(_bound(selector, bindings, inner))
        factory = Factory(value.configurable.wrapped, arguments)
        return Called(factory) if value.evaluate else factory
    if isinstance(value, list | tuple):
        return type(value)(freeze(each, bindings, scopes) for each in value)
    if isinstance(value, dict):
        return {k: freeze(v, bindings, scopes) for k, v in value.items()}
    return value


def arguments_of(selector: str, bindings: Bindings) -> dict[str, Any]:
    """Returns the frozen arguments of what a config begins from."""
    return dict(_bound(selector, bindings, ()))


def _bound(selector: str, bindings: Bindings, scopes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields what a configurable is bound to, those of inner scopes last."""
    for depth in range(len(scopes) + 1):
        for name, value in bindings.get(("/".join(scopes[:depth]), selector), {}).items():
            yield name, freeze(value, bindings, scopes)


def is_macro(selector: str) -> bool:
    """Returns whether a full name is that of gin's macros."""
    return selector == "gin.macro"
