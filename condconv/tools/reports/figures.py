"""The figures of runs: what they reached, how they got there, and what they cost."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from condconv.tools.reports.charts import Chart, Look, Series
from condconv.tools.reports.records import Points, Record, alike, points

# Prefix in metrics.jsonl, and what people call it. The last is one point, from eval.json.
_SPLITS = (
    ("train", "training"),
    ("minival", "selection"),
    ("val", "evaluation while training"),
    ("", "evaluation"),
)
_SKY, _VERMILLION = 4, 1


def of_runs(records: Sequence[Record]) -> list[Chart]:
    """Returns the figures that these runs have anything to show in."""
    charts = [
        _by_split(records, "top1", "Accuracy over steps", "top-1 (%)", 100, bounds=(0, 100)),
        _by_split(records, "loss", "Loss over steps", "cross-entropy", 1, log=True),
        _over_steps(records, "learning_rate", "Learning rate over steps", "learning rate"),
        _over_steps(records, "images_per_second", "Throughput in training", "images per second"),
        _over_steps(records, "input_share", "Waiting for input", "share of time (%)", 100),
        *(cost_per_layer(names, record) for names, record in costs(records)),
    ]
    return [chart for chart in charts if not chart.empty]


def costs(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Returns a record for each different cost, and the names of all runs that have it."""
    return alike(records, lambda record: record.cost)


def cost_per_layer(names: str, record: Record) -> Chart:
    """Returns stacked bars, one for each layer that computes, in order of execution."""
    parts = (("static", _SKY), ("mixing", _VERMILLION), ("routing", None))
    rows = [row for row in record.cost["rows"] if any(row[part] for part, _ in parts)]
    columns = [(colour, [row[part] for row in rows]) for part, colour in parts]
    legend = [(part, Look(colour, dash=None, marker=1)) for part, colour in parts]
    title, x = f"Cost per layer, {names}", "layer, in order of execution"
    return Chart(title, x, "multiply-adds", legend=legend, columns=columns if rows else ())


def _by_split(
    records: Sequence[Record], name: str, title: str, y: str, scale: float, **more: Any
) -> Chart:
    """Returns a chart whose lines are told apart by split, and by run where there are several."""
    drawn = [
        (run, split, curve)
        for run, record in enumerate(records)
        for split, curve in enumerate(_of_splits(record, name, scale))
        if curve
    ]
    alone = len(records) == 1
    series = [Series(curve, _look(None if alone else run, split)) for run, split, curve in drawn]
    splits = sorted({split for _, split, _ in drawn})
    legend = [(_SPLITS[split][1], _key(alone, split)) for split in splits]
    return Chart(title, "step", y, series, [*_runs(records), *legend], **more)


def _look(run: int | None, split: int) -> Look:
    """Returns the look of a curve; of the only run if ``run`` is None."""
    evaluated = split == len(_SPLITS) - 1
    dash = None if evaluated else split
    if run is None:
        return Look(split, dash, split)
    return dataclasses.replace(Look.number(run, dash), hollow=evaluated)


def _key(alone: bool, split: int) -> Look:
    """Returns what stands for a split in the legend: for all runs, if there are several."""
    if alone:
        return _look(None, split)
    return dataclasses.replace(
        _look(0, split), colour=None, marker=0 if split == len(_SPLITS) - 1 else None
    )


def _runs(records: Sequence[Record]) -> list[tuple[str, Look]]:
    """Returns the legend's entries for the runs, if there are several."""
    if len(records) == 1:
        return []
    return [(record.name, Look.number(i)) for i, record in enumerate(records)]


def _of_splits(record: Record, name: str, scale: float) -> Iterator[Points]:
    for prefix, _ in _SPLITS[:-1]:
        yield record.curve(f"{prefix}_{name}", scale)
    yield points([record.result or {}], name, scale)


def _over_steps(
    records: Sequence[Record], name: str, title: str, y: str, scale: float = 1
) -> Chart:
    curves = [record.curve(name, scale) for record in records]
    series = [Series(curve, Look.number(i)) for i, curve in enumerate(curves) if curve]
    return Chart(title, "step", y, series, _runs(records))
