"""From the record of an architecture to the function that builds its network."""

import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from typing import Any

import keras

from models.network import Network


def factory(record: type[Network]) -> Callable[..., keras.Model]:
    """Returns the function that builds a network, called by its name.

    Its arguments are the fields of the record, with their types and defaults. Of each it tells what
    ``Network`` says, and behind it what the record adds.

    Args:
        record: a subclass of ``Network``.

    Raises:
        TypeError: if the defaults that it sets would not count, since it is no dataclass itself.
    """
    if "__dataclass_fields__" not in vars(record):
        needed = "@dataclasses.dataclass(frozen=True, kw_only=True)"
        raise TypeError(f"{record.__name__} has no {needed} of its own: put it above the class")
    types, parameters = typing.get_type_hints(record), inspect.signature(record).parameters
    typed = [each.replace(annotation=types[name]) for name, each in parameters.items()]

    def build(**arguments: Any) -> keras.Model:
        return record(**arguments).build()

    build.__name__ = build.__qualname__ = record.name
    build.__module__ = record.__module__
    build.__doc__ = _description(record, list(parameters))
    build.__annotations__ = {each.name: each.annotation for each in typed} | {"return": keras.Model}
    build.__signature__ = inspect.Signature(typed, return_annotation=keras.Model)
    return build


def _description(record: type[Network], arguments: list[str]) -> str:
    """Returns what a record says of itself, and what its bases and it say of each argument."""
    meanings = dict.fromkeys(arguments, "")
    for each in reversed(record.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        for name, meaning in re.findall(r"^    (\w+):(.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            meanings[name] = f"{meanings.get(name, '')} {' '.join(meaning.split())}"
    summary, _, _ = inspect.cleandoc(record.__doc__ or "").partition("\n\nAttributes:\n")
    wrap = textwrap.TextWrapper(96, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return "\n".join([f"{summary}\n\nArgs:", *(wrap.fill(f"{n}:{meanings[n]}") for n in arguments)])
