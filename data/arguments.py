"""What an argument of the input may be, and the one line for what it may not."""


def check(where: str, *rows: tuple[str, object, bool, str]) -> None:
    """Raises a ValueError for the first of (name, value, whether it fits, what is allowed)."""
    for name, value, fits, allowed in rows:
        if not fits:
            raise ValueError(f"{where}{name} takes {allowed}, not {value!r}")
