"""Tables for people and for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def show(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Prints rows of the same keys to stdout: as JSON, or in columns under their names."""
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    cells = [list(rows[0])] + [[_text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(_is_number(row[name]) for row in rows) for name in rows[0]]
    for line in cells:
        aligned = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def show_measured(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints what a benchmark found: everything as JSON, or its tables and what they mean."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for rows in (result[name] for name in ("stages", "compared", "contenders") if name in result):
        show(rows, False)
        print()
    print("\n".join(result["conclusions"]))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
