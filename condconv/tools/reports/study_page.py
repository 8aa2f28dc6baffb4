"""A study on a page: what its rows came to beside the paper, and the curves behind that."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from condconv.tools.reports import charts, figures, page, records
from condconv.tools.reports.charts import DASHES, INK, Curve, Look
from condconv.tools.reports.page import Column, escape
from condconv.tools.reports.records import Points, Record
from condconv.tools.studies.statistics import Estimate
from condconv.tools.studies.study import (
    VIEWS,
    Line,
    Rejected,
    Result,
    Study,
    read_results,
    read_study,
    summary,
)
from condconv.tools.studies.table import PublishedNumber, Table

_ROW = Column("row", "row")


def _with_interval(key: str, mean: Column) -> tuple[Column, ...]:
    """Returns the columns of a mean and its 95 % interval."""
    bounds = ((f"{key}_low", "95 % from"), (f"{key}_high", "to"))
    return mean, *(Column(name, title, mean.form, 100) for name, title in bounds)


_REACHED = (
    _ROW,
    Column("seeds", "seeds", ","),
    *_with_interval("top1", Column("top1", "top-1 (%)", ".2f", 100)),
    Column("top1_deviation", "deviation", ".2f", 100),
    Column("loss", "loss", ".4f"),
    Column("paper_top1", "the paper's top-1 (%)", "g"),
    Column("paper_top1_certainty", "which is"),
)
_GAINED = (
    _ROW,
    Column("baseline", "over"),
    *_with_interval("over_baseline", Column("over_baseline", "gain", "+.2f", 100)),
    Column("over_baseline_p_value", "p", ".2g"),
    *_with_interval(
        "over_baseline_by_image", Column("over_baseline_by_image", "gain by image", "+.2f", 100)
    ),
    Column("over_baseline_by_image_p_value", "p", ".2g"),
    Column("paper_gain", "the paper's", "+.1f"),
)
_COST = (
    _ROW,
    Column("parameters", "parameters", ","),
    Column("multiply_adds", "multiply-adds", ","),
    Column("macs", "MACs", ","),
    Column("paper_multiply_adds", "the paper's multiply-adds (M)", "g"),
    Column("paper_multiply_adds_certainty", "which are"),
)


def of_study(folder: epath.Path) -> tuple[list[str], list[str]]:
    """Returns the sections about a study, and a line for each file that was left out.

    Args:
        folder: one of ``study.find_studies``.

    Raises:
        UsageError: if its ``study.json`` cannot be read.
    """
    study = read_study(folder)
    results, rejected = read_results(folder)
    lines = summary(study.table, results)
    runs = _runs(results)
    left_out = [_with_path(each) for each in rejected]
    left_out += [problem for run in runs.values() for problem in run.problems.values()]
    title = f"{study.table.title}, on {study.dataset}"
    rows = [_cells(line, study.table) for line in lines]
    sections = [
        page.section(
            title,
            page.left_out(left_out)
            + page.table(_REACHED, rows, title)
            + _paragraph(
                "Top-1: mean over seeds with its 95 % interval and standard deviation; one seed "
                "has no interval. The paper's is of ImageNet."
            ),
        ),
        page.section(
            "Gain over the baseline",
            page.table(_GAINED, [row for row in rows if row["baseline"]], "Gain")
            + _paragraph(_explanation(study)),
        ),
        page.section("Cost", page.table(_COST, rows, "Cost")),
        page.section("Top-1 over multiply-adds", page.figure_grid(frontiers(study, lines))),
        *_curves(study.table, runs),
        page.configs(list(runs.values())) if runs else "",
        page.environments(list(runs.values())) if runs else "",
    ]
    return sections, left_out


def _with_path(rejected: Rejected) -> str:
    path = str(rejected.path)
    return rejected.reason if path in rejected.reason else f"{path}: {rejected.reason}"


def _runs(results: Sequence[Result]) -> dict[str, Record]:
    """Returns of each row the run of its lowest seed."""
    found: dict[str, Record] = {}
    for result in results:
        if result.row not in found:
            found[result.row] = _record(result)
    return found


def _record(result: Result) -> Record:
    if records.is_run(result.workdir):
        (record,) = records.read([result.workdir])
        return dataclasses.replace(record, name=result.row)
    own = {"config": result.config, "environment": result.environment}
    return Record(result.row, result.workdir, result.metrics, **own)


def _cells(line: Line, table: Table) -> dict[str, Any]:
    """Returns a row's numbers, those of ``summary`` and the paper's, by name."""
    row = line.row
    return {
        "row": row.name,
        "baseline": row.baseline,
        "seeds": len(line.seeds),
        **{name: getattr(line, name) for name in ("parameters", "multiply_adds", "macs")},
        **_numbers("top1", line.top1),
        "loss": line.loss and line.loss.mean,
        **_numbers("over_baseline", line.over_baseline),
        **_numbers("over_baseline_by_image", line.over_baseline_by_image),
        **_published("paper_top1", row.top1),
        **_published("paper_multiply_adds", row.multiply_adds),
        "paper_gain": table.paper_gain(row),
    }


def _published(name: str, found: PublishedNumber | None) -> Mapping[str, Any]:
    return {name: found.value, f"{name}_certainty": found.certainty} if found else {}


def _numbers(name: str, estimate: Any) -> Mapping[str, float]:
    values = {} if estimate is None else dataclasses.asdict(estimate)
    return {(name if part == "mean" else f"{name}_{part}"): v for part, v in values.items()}


def _explanation(study: Study) -> str:
    views = VIEWS[study.dataset]
    views_are = f", the {views} views of one counted once" if views > 1 else ""
    return (
        "Points of top-1 above the baseline, seed by seed, with the p-value of a paired t-test. By "
        f"image: between these very runs, image by image{views_are}; that tells of other images, "
        "not of other seeds."
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def frontiers(study: Study, lines: Sequence[Line]) -> list[Figure]:
    """Returns top-1 over multiply-adds, the paper's and ours: together where both are ImageNet's.

    Rows are joined with those that have the same baseline.
    """
    paper, ours = {}, {}
    for number, (baseline, names) in enumerate(_families(study.table).items()):
        family = [line for line in lines if line.row.name in names]
        paper[baseline] = Curve(_published_points(family), charts.look(number, DASHES[1], True))
        ours[baseline] = _measured(family, study.table.counted_as, charts.look(number))
    if study.dataset == "imagenet2012":
        hollow = charts.look(0, DASHES[1], True) | {"color": INK}
        legend = [*_legend(ours), ("the paper's: hollow", hollow)]
        both = [*paper.values(), *ours.values()]
        drawn = [_frontier("Ours on ImageNet, and the paper's", both, legend)]
    else:
        title = f"Ours on {study.dataset}, with 95 % intervals"
        of_both = {"The paper on ImageNet": paper, title: ours}
        drawn = [_frontier(t, [*each.values()], _legend(each)) for t, each in of_both.items()]
    return [figure for figure in drawn if not charts.is_empty(figure)]


def _families(table: Table) -> dict[str, list[str]]:
    """Returns of each row that others are compared with, or that stands alone, all that belong."""
    families: dict[str, list[str]] = {}
    for row in table.rows:
        families.setdefault(row.baseline or row.name, []).append(row.name)
    return families


def _legend(curves: Mapping[str, Curve]) -> list[tuple[str, Look]]:
    return [(name, curve.look) for name, curve in curves.items()]


def _published_points(lines: Sequence[Line]) -> Points:
    known = [(line.row.multiply_adds, line.row.top1) for line in lines]
    return sorted((1e6 * cost.value, top1.value) for cost, top1 in known if cost and top1)


def _measured(lines: Sequence[Line], counted_as: str, look: Look) -> Curve:
    found = sorted((getattr(line, counted_as), line.top1.mean, line) for line in lines if line.top1)
    points = [(cost, 100 * mean) for cost, mean, _ in found]
    return Curve(points, look, [_interval(line.top1) for *_, line in found])


def _interval(top1: Estimate) -> tuple[float, float] | None:
    return None if top1.low is None else (max(0, 100 * top1.low), min(100, 100 * top1.high))


def _frontier(title: str, curves: Sequence[Curve], legend: Sequence[tuple[str, Look]]) -> Figure:
    ys = [y for curve in curves for _, y in curve.points]
    ys += [y for curve in curves for interval in curve.intervals if interval for y in interval]
    low, high = (5 * math.floor(min(ys) / 5), 5 * math.ceil(max(ys) / 5)) if ys else (0, 100)
    bounds = (low, high) if low < high else (low - 5, high)
    return charts.curves(title, "multiply-adds", "top-1 (%)", curves, legend, bounds, log="x")


def _curves(table: Table, runs: Mapping[str, Record]) -> Iterator[str]:
    """Yields a section for each baseline: its run and those of the rows compared with it."""
    for baseline, names in _families(table).items():
        present = [runs[name] for name in names if name in runs]
        drawn = figures.of_runs(present) if present else []
        yield page.section(f"Runs of the lowest seed: {baseline}", page.figure_grid(drawn))
