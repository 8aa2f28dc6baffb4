"""Checks of the arguments that the layers take."""

import keras


def at_least_one(value: int, name: str) -> int:
    """Returns ``value``.

    Raises:
        ValueError: if it is no integer of at least 1; ``name`` says which argument it was.
    """
    return _at_least(1, value, name)


def at_least_zero(value: int, name: str) -> int:
    """Returns ``value``. Raises as ``at_least_one`` does, for an integer below 0."""
    return _at_least(0, value, name)


def _at_least(least: int, value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` takes an integer of at least {least}. Received: {value!r}")
    return value


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Returns two integers for one or two.

    Raises:
        ValueError: if they are not positive; ``name`` says which argument it was.
    """
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2 or not all(type(v) is int and v >= 1 for v in both):
        raise ValueError(f"`{name}` takes a positive integer or two of them. Received: {value}")
    return both


def data_format(value: str | None) -> str:
    """Returns ``value``, or Keras' own setting for None.

    Raises:
        ValueError: if it is no data format.
    """
    value = value or keras.config.image_data_format()
    if value not in ("channels_last", "channels_first"):
        raise ValueError(
            f"`data_format` takes 'channels_last' or 'channels_first'. Received: {value!r}"
        )
    return value
