"""What a run left in its folder, as far as it can be read."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError, gist
from condconv.engine.telemetry import read_metrics

Points = list[tuple[float, float | None]]
"""(step, value) in order; None where there was a value that is no number."""

_LARGEST = 1e300  # a curve of larger numbers has no height that a float could hold

# What every eval.json has, and of which type.
_RESULTS = {
    "parameters": int,
    "multiply_adds": int,
    "top1": float,
    "images": int,
    "dataset": str,
    "split": str,
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, as its folder tells.

    Attributes:
        name: of the run, for people.
        workdir: its folder.
        result: ``eval.json``, or None.
        cost: ``cost.json``, see ``report.conclude``, or None.
        metrics: the objects of ``metrics.jsonl``.
        config: text of ``config.gin``.
        environment: ``environment.json``.
        problems: why a file cannot be read and was left out, in one line, by its name.
    """

    name: str
    workdir: epath.Path
    result: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    metrics: Sequence[Any] = ()
    config: str = ""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def curve(self, name: str, scale: float = 1.0) -> Points:
        """Returns the values of that name over steps, times ``scale``."""
        return points(self.metrics, name, scale)


def read(workdirs: Sequence[epath.Path]) -> list[Record]:
    """Returns a record for each folder; where folders share a name, the whole path is the name."""
    names = [workdir.name for workdir in workdirs]
    return [
        _read(workdir, name if name and names.count(name) == 1 else str(workdir))
        for workdir, name in zip(workdirs, names, strict=True)
    ]


def alike(records: Sequence[Record], what: Callable[[Record], Any]) -> list[tuple[str, Record]]:
    """Returns a record for each different value of ``what``, and the names of all that have it.

    Where it is None there is nothing to return.
    """
    found: list[tuple[list[str], Record]] = []
    for record in records:
        same = next((names for names, other in found if what(other) == what(record)), None)
        if same is not None:
            same.append(record.name)
        elif what(record) is not None:
            found.append(([record.name], record))
    if len(found) == 1 < len(records) == len(found[0][0]):
        return [(f"all {len(records)} runs", records[0])]
    return [(", ".join(names), record) for names, record in found]


def is_run(workdir: epath.Path) -> bool:
    """Returns whether a run has left anything in this folder."""
    return any(files.is_file(workdir / name) for name in ("config.gin", "metrics.jsonl"))


def _read(workdir: epath.Path, name: str) -> Record:
    found, problems = {}, {}
    for file, (attribute, reader) in _FILES.items():
        if files.is_file(workdir / file):
            try:
                found[attribute] = reader(workdir / file)
            except UsageError as error:
                problems[file] = str(error)
    return Record(name, workdir, **found, problems=problems)


def read_result(workdir: epath.Path) -> dict[str, Any]:
    """Returns what ``eval.json`` holds.

    Raises:
        UsageError: if the run has not been evaluated, or this is not what eval.py writes.
    """
    path, again = workdir / "eval.json", f"run eval.py --workdir={workdir}"
    if not files.is_file(path):
        raise UsageError(f"{workdir} has no eval.json: {again} first")
    result = files.read_json(path)
    for name, kind in _RESULTS.items():
        if name not in result:
            raise UsageError(f"{path} lacks {name!r}: {again} again")
        if type(result[name]) not in (kind, int if kind is float else kind):
            raise UsageError(
                f"{path} holds {name!r} of {result[name]!r}, which is no {kind.__name__}: "
                f"{again} again"
            )
    return result


def _read_cost(path: epath.Path) -> dict[str, Any]:
    cost = files.read_json(path)
    numbers = ("parameters", "static", "mixing", "routing", "macs")
    rows = cost.get("rows")
    complete = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("layer"), str)
        and all(type(row.get(name)) is int and 0 <= row[name] < _LARGEST for name in numbers)
        for row in rows
    )
    if not complete:
        raise UsageError(f"{path} is not what train.py writes: remove it")
    return cost


def _read_metrics(path: epath.Path) -> list[Any]:
    """Returns the objects of ``metrics.jsonl``, in the names that they have today."""
    try:
        lines = read_metrics(path.parent)
    except (ValueError, ArithmeticError, RecursionError, *files.path_errors()) as error:
        raise UsageError(
            f"the metrics of {path.parent} cannot be read ({gist(error)}): restore or remove its "
            "metrics.jsonl"
        ) from error
    return [_renamed(line) if isinstance(line, dict) else line for line in lines]


def _renamed(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics whose selection split is called so; it once was ``minival``."""
    return {re.sub("^minival_", "selection_", name): value for name, value in line.items()}


_FILES: dict[str, tuple[str, Callable[[epath.Path], Any]]] = {
    "eval.json": ("result", lambda path: read_result(path.parent)),
    "cost.json": ("cost", _read_cost),
    "metrics.jsonl": ("metrics", _read_metrics),
    "config.gin": ("config", files.read_text),
    "environment.json": ("environment", files.read_json),
}
"""Files of a run: the attribute of ``Record`` that each becomes, and who reads it."""


def points(metrics: Sequence[Any], name: str, scale: float = 1.0) -> Points:
    """Returns (step, value times ``scale``) of each line that has both."""
    lines = [line for line in metrics if isinstance(line, dict) and name in line]
    pairs = [(_number(line.get("step")), _number(line[name])) for line in lines]
    return [
        (step, None if value is None else value * scale)
        for step, value in pairs
        if step is not None
    ]


def _number(value: Any) -> float | None:
    """Returns a number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= _LARGEST:
        return None
    return value if abs(value) > 1 / _LARGEST else 0.0
