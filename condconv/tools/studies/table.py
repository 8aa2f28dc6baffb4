"""Tables of the paper as TOML files: what was published, and which runs reproduce it."""

import dataclasses
import decimal
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from condconv.engine import files
from condconv.engine.errors import UsageError

ROOT = pathlib.Path(__file__).parents[3]
TABLES = ("imagenet", "released", "frontier", "experts", "routing", "placement")
DATASETS = ("digits", "imagenet2012")

CERTAINTIES = {
    "verified": "read in the authors' code, abstract or tables",
    "secondary": "quoted from the paper by others",
    "derived": "by arithmetic from the architecture",
    "digitised": "read off a copy of the paper's figure, to 0.2 points",
    "recalled": "from memory of the paper, found in no source",
}


@dataclasses.dataclass(frozen=True)
class PublishedNumber:
    """A number of the paper: its value as printed, and one of ``CERTAINTIES``."""

    value: float
    certainty: str

    def agrees(self, value: float) -> bool:
        """Returns whether ``value``, in the same unit, is within one of the last printed digit.

        That is, whether it rounds or truncates to this one: the paper does either.
        """
        unit = decimal.Decimal(1).scaleb(decimal.Decimal(repr(self.value)).as_tuple().exponent)
        return abs(decimal.Decimal(repr(value)) - decimal.Decimal(repr(self.value))) < unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: a network and how it is trained.

    Attributes:
        name: also of its folder.
        config: gin file of its training on ImageNet, from the root of the checkout.
        proxy: gin file of its training on hard digits.
        baseline: name of the row that it is compared with, mostly its static twin; None for
            that one.
        bindings: gin bindings behind either file.
        imagenet2012, digits: gin bindings behind one of them, and behind ``bindings``.
        multiply_adds, parameters: of the paper, in millions; None where none is known.
        top1: of the paper, on ImageNet, in percent; None where none is known.
    """

    name: str
    config: str
    proxy: str
    baseline: str | None = None
    bindings: tuple[str, ...] = ()
    imagenet2012: tuple[str, ...] = ()
    digits: tuple[str, ...] = ()
    multiply_adds: PublishedNumber | None = None
    parameters: PublishedNumber | None = None
    top1: PublishedNumber | None = None

    def gin(self, dataset: str) -> tuple[str, tuple[str, ...]]:
        """Returns the gin file, with its whole path, and the bindings of the row on a data set."""
        on_digits = dataset == "digits"
        file, own = (self.proxy, self.digits) if on_digits else (self.config, self.imagenet2012)
        return str(ROOT / file), (*self.bindings, *own)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: of its file.
        title: a line for people.
        rows: in order; each baseline comes before those compared with it.
        counted_as: which of our counts, "multiply_adds" or "macs", stands beside what the paper
            calls multiply-adds.
        text: of its file.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    counted_as: str = "multiply_adds"
    text: str = dataclasses.field(repr=False, default="")

    def row(self, name: str) -> Row | None:
        """Returns the row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def paper_gain(self, row: Row) -> float | None:
        """Returns by how many points the paper has a row above its baseline."""
        baseline = self.row(row.baseline or "")
        if baseline is None or row.top1 is None or baseline.top1 is None:
            return None
        return round(row.top1.value - baseline.top1.value, 2)


def read_table(name: str) -> Table:
    """Reads a table.

    Args:
        name: one of ``TABLES``, or the path of a TOML file of one's own.

    Raises:
        UsageError: if there is none, or anything in it is unknown, missing or doubled.
    """
    path = files.path(name if name.endswith(".toml") else f"{ROOT}/configs/tables/{name}.toml")
    if not files.is_file(path):
        raise UsageError(
            f"there is no table {name!r}: take one of {', '.join(TABLES)}, or a file ….toml"
        )
    return parse_table(path.stem, files.read_text(path))


def parse_table(name: str, text: str) -> Table:
    """Reads the text of a table. Raises as ``read_table`` does."""
    try:
        return _table(name, text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"table {name}: {error}") from error


_PUBLISHED = ("multiply_adds", "parameters", "top1")
_TEXTS = ("name", "config", "proxy", "baseline")
_LISTS = ("bindings", "imagenet2012", "digits")
_SHARED = ("config", "proxy")
_COUNTS = ("multiply_adds", "macs")


def _table(name: str, text: str) -> Table:
    values = tomllib.loads(text)
    _check_keys(values, required=("title", "rows"), optional=(*_SHARED, "counted_as"))
    shared = {key: _text(values, key) for key in _SHARED if key in values}
    rows = values["rows"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows takes one [[rows]] or more")
    read: dict[str, Row] = {}
    for number, row in enumerate(rows, start=1):
        try:
            new = _row({**shared, **row})
            _check_place(new, read)
        except ValueError as error:
            raise ValueError(f"row {row.get('name', number)!r}: {error}") from error
        read[new.name] = new
    counted_as = values.get("counted_as", _COUNTS[0])
    if counted_as not in _COUNTS:
        raise ValueError(f"counted_as takes {' or '.join(_COUNTS)}, not {counted_as!r}")
    return Table(name, _text(values, "title"), tuple(read.values()), counted_as, text)


def _row(values: Mapping[str, Any]) -> Row:
    known = (*_TEXTS, *_LISTS, *_PUBLISHED)
    required = ("name", "config", "proxy")
    _check_keys(values, required, [key for key in known if key not in required])
    arguments: dict[str, Any] = {key: _text(values, key) for key in _TEXTS if key in values}
    arguments |= {key: _texts(values, key) for key in _LISTS if key in values}
    arguments |= {key: _published(values, key) for key in _PUBLISHED if key in values}
    return Row(**arguments)


def _check_keys(values: Mapping[str, Any], required: Any, optional: Any) -> None:
    known = (*required, *optional)
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"leaves out {', '.join(missing)}")


def _check_place(row: Row, before: Mapping[str, Row]) -> None:
    if not re.fullmatch(r"[\w.-]*\w", row.name, re.ASCII):
        raise ValueError(
            "name takes letters, digits, '_', '-' and '.', since a folder is called so"
        )
    if row.name in before:
        raise ValueError("another row has this name")
    if row.baseline is not None and row.baseline not in before:
        raise ValueError(
            f"baseline takes a row above it ({', '.join(before)}), not {row.baseline!r}"
        )


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise ValueError(f"{key} takes a text, not {values[key]!r}")
    return values[key]


def _texts(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = values[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} takes a list of gin bindings, not {texts!r}")
    return tuple(texts)


def _published(values: Mapping[str, Any], key: str) -> PublishedNumber:
    match values[key]:
        case [int() | float() as value, str() as certainty] if certainty in CERTAINTIES:
            return PublishedNumber(value, certainty)
    raise ValueError(
        f"{key} takes [number, certainty] with one of {', '.join(CERTAINTIES)}, not {values[key]!r}"
    )
