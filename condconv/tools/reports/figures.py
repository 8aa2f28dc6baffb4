"""The figures of runs: what they reached, how they got there, and what they cost."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from condconv.tools.reports import charts
from condconv.tools.reports.charts import COLOURS, INK, Curve, Look
from condconv.tools.reports.records import Points, Record, alike, points

# Prefix in metrics.jsonl, what people call it, and its line. The last is one point of eval.json.
_SPLITS = (
    ("train", "training", "-"),
    ("selection", "selection", "--"),
    ("val", "evaluation while training", ":"),
    ("", "evaluation", "none"),
)
_PARTS = {"static": COLOURS[4], "mixing": COLOURS[1], "routing": INK}


def of_runs(records: Sequence[Record]) -> list[Figure]:
    """Returns the figures that these runs have anything to show in."""
    figures = [
        accuracy(records),
        _by_split(records, "loss", "Loss over steps", "cross-entropy", log="y"),
        _over_steps(records, "learning_rate", "Learning rate over steps", "learning rate"),
        _over_steps(records, "images_per_second", "Throughput in training", "images per second"),
        _over_steps(records, "input_share", "Waiting for input", "share of time (%)", 100),
        *(cost_per_layer(names, record) for names, record in costs(records)),
    ]
    return [figure for figure in figures if not charts.is_empty(figure)]


def accuracy(records: Sequence[Record]) -> Figure:
    """Returns top-1 over steps, in training and on each split that a run was judged by."""
    title = "Accuracy over steps"
    return _by_split(records, "top1", title, "top-1 (%)", 100, bounds=(0, 100))


def costs(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Returns a record for each different cost, and the names of all runs that have it."""
    return alike(records, lambda record: record.cost)


def cost_per_layer(names: str, record: Record) -> Figure:
    """Returns stacked columns, one for each layer that computes, in order of execution."""
    rows = [row for row in record.cost["rows"] if any(row[part] for part in _PARTS)]
    parts = {part: (colour, [row[part] for row in rows]) for part, colour in _PARTS.items()}
    title, x = f"Cost per layer, {names}", "layer, in order of execution"
    return charts.columns(title, x, "multiply-adds", parts)


def _by_split(
    records: Sequence[Record], name: str, title: str, y: str, scale: float = 1, **more: Any
) -> Figure:
    """Returns a chart whose curves are told apart by split, and by run where there are several."""
    alone = len(records) == 1
    drawn = {
        (run, split): curve
        for run, record in enumerate(records)
        for split, curve in enumerate(_of_splits(record, name, scale))
        if curve
    }
    looks = [_look(split if alone else run, split, alone) for run, split in drawn]
    legend = [
        (_SPLITS[split][1], _look(split, split, True) if alone else _key(split))
        for split in sorted({split for _, split in drawn})
    ]
    curves = list(map(Curve, drawn.values(), looks))
    return charts.curves(title, "step", y, curves, [*_runs(records), *legend], **more)


def _look(number: int, split: int, alone: bool) -> Look:
    line = _SPLITS[split][2]
    return charts.look(number, line, hollow=line == "none" and not alone)


def _key(split: int) -> Look:
    """Returns what stands for a split in the legend for all of several runs."""
    line = _SPLITS[split][2]
    return charts.look(0, line, hollow=True) | {
        "color": INK,
        "marker": "o" if line == "none" else "none",
    }


def _runs(records: Sequence[Record]) -> list[tuple[str, Look]]:
    """Returns the legend's entries for the runs, if there are several."""
    named = [(record.name, charts.look(number)) for number, record in enumerate(records)]
    return named if len(records) > 1 else []


def _of_splits(record: Record, name: str, scale: float) -> Iterator[Points]:
    for prefix, *_ in _SPLITS[:-1]:
        yield record.curve(f"{prefix}_{name}", scale)
    yield points([record.result or {}], name, scale)


def _over_steps(
    records: Sequence[Record], name: str, title: str, y: str, scale: float = 1
) -> Figure:
    curves = [Curve(record.curve(name, scale), charts.look(i)) for i, record in enumerate(records)]
    return charts.curves(title, "step", y, curves, _runs(records))
