"""Results of the rows of a table, and what they come to.

``scripts/reproduce.py`` runs a table on a data set and leaves one ``result.json`` for each row and
seed in the study's folder, WORKDIR/TABLE/DATASET. What is printed and drawn is a pure function of
that folder. Nothing here loads TensorFlow.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.tools.studies import statistics
from condconv.tools.studies.table import DATASETS, ROOT, Row, Table, parse_table

FORMAT = 1
"""Of ``result.json`` and ``study.json``; another one is not read."""

VIEWS = {"digits": 10, "imagenet2012": 1}
"""Consecutive examples of the reported split that show the same image."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study's folder is of: a table on a data set.

    Attributes:
        table: as it was when the study was last run.
        dataset: one of ``DATASETS``.
        gin_params: bindings behind those of every row.
    """

    table: Table
    dataset: str
    gin_params: tuple[str, ...] = ()

    def gin(self, row: Row, seed: int) -> tuple[str, tuple[str, ...]]:
        """Returns the gin file and all bindings of a row's run."""
        file, bindings = row.gin(self.dataset)
        return file, (*bindings, *self.gin_params, f"Experiment.seed = {seed}")

    def digest(self, row: Row, seed: int) -> str:
        """Returns a checksum of all that decides a run's config: gin files, bindings, seed.

        Raises:
            UsageError: if a file cannot be read.
        """
        file, bindings = self.gin(row, seed)
        statements = [*_statements(pathlib.Path(file)), *bindings]
        return hashlib.sha256("\n".join(statements).encode()).hexdigest()

    def write(self, folder: epath.Path) -> None:
        """Writes ``study.json``, from which ``read_study`` makes the same again."""
        values = {
            "format": FORMAT,
            "name": self.table.name,
            "dataset": self.dataset,
            "gin_params": self.gin_params,
            "table": self.table.text,
        }
        files.write_json(folder / "study.json", values)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one run of a row came to.

    Attributes:
        table, row, dataset, seed: which run it is.
        metrics: those of ``eval.json``; ``top1`` is a share.
        config: all bindings of the run, as text.
        environment: versions, device and commit of the run.
        seconds: that training and evaluation took, in the call that ended it.
        workdir: of the run.
        correct: (N,) whether the network was right on example i of the reported split; None if its
            predictions are not there.
    """

    table: str
    row: str
    dataset: str
    seed: int
    metrics: Mapping[str, Any]
    config: str
    environment: Mapping[str, Any]
    seconds: float
    workdir: epath.Path
    correct: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A file of results that is left out: its path, and why in one line."""

    path: epath.Path
    reason: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A row and what its results come to.

    Accuracies and differences of accuracies are shares from 0 to 1.

    Attributes:
        row: of the table, with what the paper says.
        seeds: that have a result.
        parameters, multiply_adds, macs: of the network that was trained; None without a result.
        top1, loss: over seeds; None without a result.
        over_baseline: top-1 minus the baseline's, paired over the seeds that both have; None
            for a baseline, or if they share no seed.
        over_baseline_by_image: the same, image by image, between the runs of these seeds; None
            also where predictions are missing, or of different numbers of examples.
    """

    row: Row
    seeds: tuple[int, ...] = ()
    parameters: int | None = None
    multiply_adds: int | None = None
    macs: int | None = None
    top1: statistics.Estimate | None = None
    loss: statistics.Estimate | None = None
    over_baseline: statistics.Difference | None = None
    over_baseline_by_image: statistics.Difference | None = None


def find_studies(workdir: epath.Path) -> list[epath.Path]:
    """Returns the folders of studies in ``workdir``: itself, or those that reproduce.py made."""
    places = [workdir, *sorted(workdir.glob("*")), *sorted(workdir.glob("*/*"))]
    return [place for place in places if files.is_file(place / "study.json")]


def read_study(folder: epath.Path) -> Study:
    """Reads what a study's folder is of, from its ``study.json``.

    Raises:
        UsageError: if it cannot be read or is of another format.
    """
    path = folder / "study.json"
    values = files.read_json(path)
    match values:
        case {"format": 1, "name": str(name), "table": str(text), "gin_params": list(params)} if (
            values.get("dataset") in DATASETS and all(isinstance(each, str) for each in params)
        ):
            return Study(parse_table(name, text), values["dataset"], tuple(params))
    raise UsageError(f"{path} is no study of format {FORMAT}: remove it, or name another workdir")


def read_results(folder: epath.Path) -> tuple[list[Result], list[Rejected]]:
    """Reads the results of a study's folder, WORKDIR/TABLE/DATASET.

    Args:
        folder: one of ``find_studies``.

    Returns:
        The results that can be trusted, in the order of rows and seeds, and the files that cannot
        be: cut off, of another format, or of another row, seed or config than their place, the
        study's table and its gin files say now.

    Raises:
        UsageError: as ``read_study``.
    """
    study = read_study(folder)
    results, rejected = [], []
    for path in sorted(folder.glob("*/seed*/result.json")):
        try:
            results.append(read_result(study, path))
        except UsageError as error:
            rejected.append(Rejected(path, str(error)))
    order = [row.name for row in study.table.rows]
    return sorted(results, key=lambda each: (order.index(each.row), each.seed)), rejected


def read_result(study: Study, path: epath.Path) -> Result:
    """Reads a ``result.json`` in its place, ROW/seedS of the study's folder.

    Raises:
        UsageError: if it cannot be trusted; says why.
    """
    values = files.read_json(path)
    if values.get("format") != FORMAT:
        raise UsageError(f"is of format {values.get('format')!r}, not {FORMAT}")
    for name, kind in _KINDS.items():
        if type(values.get(name)) is not kind:
            raise UsageError(f"holds {name!r} of {values.get(name)!r}, which is no {kind.__name__}")
    _check_place(study, path, values)
    _check_config(study, values)
    _check_metrics(values["metrics"])
    correct = _read_correct(path.parent / "predictions.npz", values["metrics"])
    named = {name: values[name] for name in _KINDS if name != "digest"}
    return Result(**named, workdir=path.parent, correct=correct)


def write_result(study: Study, row: Row, seed: int, folder: epath.Path, seconds: float) -> None:
    """Writes ``result.json`` of a run that was trained and evaluated in ``folder``.

    Raises:
        UsageError: if a file of the run is missing or damaged.
        RunError: if it cannot be written.
    """
    values = {
        "format": FORMAT,
        "table": study.table.name,
        "row": row.name,
        "dataset": study.dataset,
        "seed": seed,
        "digest": study.digest(row, seed),
        "metrics": files.read_json(folder / "eval.json"),
        "environment": files.read_json(folder / "environment.json"),
        "seconds": round(float(seconds), 1),
        "config": files.read_text(folder / "config.gin"),
    }
    files.write_json(folder / "result.json", values)


def summary(table: Table, results: Sequence[Result]) -> tuple[Line, ...]:
    """Returns a line for each row of ``table``, whether it has results or not.

    Args:
        table: from ``read_study(folder).table`` or ``read_table``.
        results: of this table on one data set, from ``read_results``.

    Raises:
        ValueError: if results are of another table or of several data sets.
    """
    kinds = {(result.table, result.dataset) for result in results}
    if len(kinds) > 1 or {name for name, _ in kinds} - {table.name}:
        raise ValueError(f"needs results of table {table.name} on one data set, not of {kinds}")
    by_row: dict[str, dict[int, Result]] = {row.name: {} for row in table.rows}
    for result in results:
        by_row[result.row][result.seed] = result
    return tuple(
        _line(row, by_row[row.name], by_row.get(row.baseline or "", {})) for row in table.rows
    )


def _line(row: Row, runs: Mapping[int, Result], baseline: Mapping[int, Result]) -> Line:
    if not runs:
        return Line(row)
    metrics = [run.metrics for run in runs.values()]
    shared = sorted(runs.keys() & baseline.keys())
    return Line(
        row,
        tuple(sorted(runs)),
        **{name: metrics[0][name] for name in ("parameters", "multiply_adds", "macs")},
        **{name: statistics.estimate([m[name] for m in metrics]) for name in ("top1", "loss")},
        over_baseline=_over_seeds(runs, baseline, shared),
        over_baseline_by_image=_by_image(runs, baseline, shared),
    )


def _over_seeds(
    runs: Mapping[int, Result], baseline: Mapping[int, Result], seeds: Sequence[int]
) -> statistics.Difference | None:
    if not seeds:
        return None
    ours, theirs = ([of[seed].metrics["top1"] for seed in seeds] for of in (runs, baseline))
    return statistics.paired_difference(ours, theirs)


def _by_image(
    runs: Mapping[int, Result], baseline: Mapping[int, Result], seeds: Sequence[int]
) -> statistics.Difference | None:
    ours, theirs = ([of[seed].correct for seed in seeds] for of in (runs, baseline))
    if not seeds or any(each is None for each in (*ours, *theirs)):
        return None
    if len({each.size for each in (*ours, *theirs)}) > 1:
        return None
    views = VIEWS[runs[seeds[0]].dataset]
    return statistics.difference_by_image(ours, theirs, views)


_KINDS = {
    "table": str,
    "row": str,
    "dataset": str,
    "seed": int,
    "digest": str,
    "metrics": dict,
    "environment": dict,
    "seconds": float,
    "config": str,
}


def _check_place(study: Study, path: epath.Path, values: Mapping[str, Any]) -> None:
    row, seed = path.parent.parent.name, path.parent.name.removeprefix("seed")
    expected = {"table": study.table.name, "dataset": study.dataset, "row": row, "seed": seed}
    for name, value in expected.items():
        if str(values[name]) != value:
            raise UsageError(
                f"is of {name} {values[name]!r}, but lies where that of {value!r} would"
            )
    if study.table.row(row) is None:
        raise UsageError(f"is of row {row!r}, which the table {study.table.name} has not")


def _check_config(study: Study, values: Mapping[str, Any]) -> None:
    row, seed = study.table.row(values["row"]), values["seed"]
    if values["digest"] != study.digest(row, seed):
        raise UsageError("was run by another config than its row and gin files make now")
    if not re.search(rf"^Experiment\.seed = {seed}$", values["config"], re.MULTILINE):
        raise UsageError(f"is of seed {seed}, which its config does not say")


_COUNTS = ("images", "parameters", "multiply_adds", "macs")


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name in (*_COUNTS, "top1", "loss"):
        value = metrics.get(name)
        kinds = (int,) if name in _COUNTS else (int, float)
        most = 1 if name == "top1" else math.inf
        if type(value) not in kinds or not 0 <= value <= most or value == math.inf:
            raise UsageError(f"holds {name!r} of {value!r}, which cannot be")


def _read_correct(path: epath.Path, metrics: Mapping[str, Any]) -> np.ndarray | None:
    """Returns which examples were right, by index, after comparing them with the accuracy."""
    if not files.is_file(path):
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            correct = arrays["correct"][np.argsort(arrays["index"])]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, *files.path_errors()) as error:
        raise UsageError(f"its predictions.npz cannot be read ({error})") from error
    if correct.size != metrics["images"] or abs(np.mean(correct) - metrics["top1"]) > 1e-6:
        raise UsageError("its predictions.npz is of another evaluation")
    return correct.astype(bool)


def _statements(path: pathlib.Path) -> list[str]:
    """Returns the lines of a gin file and of those it includes, without comments."""
    lines = []
    for line in files.read_text(files.path(str(path))).splitlines():
        if included := re.match(r"include\s+['\"](.+)['\"]", line):
            beside = path.parent / included[1]
            lines += _statements(beside if beside.is_file() else ROOT / "configs" / included[1])
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line.rstrip())
    return lines
