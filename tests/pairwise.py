"""Every combination of two levels, out of a matrix too large to run whole each time."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Level = Any


def pairwise(
    factors: Mapping[str, Sequence[Level]], allowed: Callable[[Mapping[str, Level]], bool]
) -> list[dict[str, Level]]:
    """Rows in which any two levels of two factors meet that ``allowed`` lets meet at all.

    ``allowed`` is asked about unfinished rows too, and accepts those that it cannot judge yet.
    """
    names = list(factors)

    def pairs(row: Mapping[str, Level]) -> Iterable[tuple]:
        return itertools.combinations([(name, row[name]) for name in names if name in row], 2)

    def complete(row: dict[str, Level]) -> dict[str, Level] | None:
        if not allowed(row):
            return None
        name = next((name for name in names if name not in row), None)
        if name is None:
            return row
        options = [{**row, name: level} for level in factors[name]]
        options.sort(key=lambda option: -sum(pair in missing for pair in pairs(option)))
        return next(filter(None, map(complete, options)), None)

    # A dictionary for its order: a set of strings differs from process to process.
    missing = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows = []
    while missing:
        wanted = next(iter(missing))
        row = complete(dict(wanted))
        if row is None:  # these two may not meet
            del missing[wanted]
            continue
        rows.append({name: row[name] for name in names})
        for pair in pairs(row):
            missing.pop(pair, None)
    return rows
