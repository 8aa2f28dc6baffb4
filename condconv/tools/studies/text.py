"""The tables of a study for a screen, and as JSON."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from condconv.tools import tables
from condconv.tools.studies.statistics import Difference, Estimate
from condconv.tools.studies.study import VIEWS, Line, read_results, read_study, summary
from condconv.tools.studies.table import Table

_NONE = "–"


def show_costs(lines: Iterable[Mapping[str, Any]], as_json: bool) -> None:
    """Prints costs to stdout, each line as soon as it is there; or all of them as JSON.

    Args:
        lines: from ``costs.cost_lines``.
        as_json: whether to print these as they are.
    """
    if as_json:
        print(json.dumps(list(lines), indent=2))
        return
    print(_aligned([heading for heading, _, _ in _COSTS]))
    for line in lines:
        print(_aligned([fill(line) for _, _, fill in _COSTS]), flush=True)
    print("\npaper: as printed, in millions and percent; agrees: within one of the last digit")


_COSTS: tuple[tuple[str, int, Callable[[Mapping[str, Any]], str]], ...] = (
    ("row", -32, lambda line: line["name"]),
    ("parameters", 11, lambda line: f"{line['parameters']:,}"),
    ("paper", 6, lambda line: _millions(line["paper_parameters"])),
    ("agrees", 6, lambda line: _agreement(line["parameters_agree"])),
    ("macs", 13, lambda line: f"{line['macs']:,}"),
    ("multiply_adds", 13, lambda line: f"{line['multiply_adds']:,}"),
    ("paper", 6, lambda line: _millions(line["paper_multiply_adds"])),
    ("agrees", 6, lambda line: _agreement(line["multiply_adds_agree"])),
    ("which is", -9, lambda line: line["multiply_adds_certainty"] or _NONE),
    ("paper_top1", 10, lambda line: str(line["paper_top1"] or _NONE)),
    ("which is", -9, lambda line: line["top1_certainty"] or _NONE),
)
"""Of each column its heading, its width (below 0: to the left) and what a line puts there."""


def _aligned(cells: Sequence[str]) -> str:
    pairs = zip(cells, [width for _, width, _ in _COSTS], strict=True)
    aligned = [cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in pairs]
    return "  ".join(aligned).rstrip()


def _millions(number: int | None) -> str:
    return _NONE if number is None else f"{number / 1e6:g}"


def _agreement(agrees: bool | None) -> str:
    return {None: _NONE, True: "yes", False: "NO"}[agrees]


def show_results(folder: epath.Path, as_json: bool) -> None:
    """Prints what the results of a study come to; names on stderr those that are left out.

    Raises:
        UsageError: as ``study.read_study``.
    """
    study = read_study(folder)
    results, rejected = read_results(folder)
    for each in rejected:
        print(f"left out: {each.path}: {each.reason}", file=sys.stderr)
    lines = summary(study.table, results)
    if as_json:
        print(json.dumps([_as_json(line, study.table) for line in lines], indent=2))
        return
    tables.show([_cells(line, study.table) for line in lines], False)
    print(_explanation(VIEWS[study.dataset]))
    if any(len(line.seeds) == 1 for line in lines):
        print("Rows of one seed have no interval over seeds: nothing tells how others would end.")


def _as_json(line: Line, table: Table) -> dict[str, Any]:
    """Returns a line as JSON has it: accuracies as shares, but the paper's in percent."""
    values = dataclasses.asdict(line)
    del values["row"]
    row = line.row
    return {
        "name": row.name,
        "baseline": row.baseline,
        **values,
        "paper_top1": row.top1 and row.top1.value,
        "top1_certainty": row.top1 and row.top1.certainty,
        "paper_gain": table.paper_gain(line.row),
    }


def _cells(line: Line, table: Table) -> dict[str, Any]:
    paper_gain = table.paper_gain(line.row)
    return {
        "row": line.row.name,
        "seeds": len(line.seeds),
        "parameters": line.parameters,
        "multiply_adds": line.multiply_adds,
        "top1": _percent(line.top1),
        "gain": _percent(line.over_baseline),
        "p": _p_value(line.over_baseline),
        "gain_by_image": _percent(line.over_baseline_by_image),
        "p_by_image": _p_value(line.over_baseline_by_image),
        "paper_top1": line.row.top1 and line.row.top1.value,
        "paper_gain": _NONE if paper_gain is None else f"{paper_gain:+.1f}",
    }


def _percent(found: Estimate | None) -> str:
    """Returns a mean of accuracies or, with signs, of their differences, and its interval."""
    if found is None:
        return _NONE
    sign = "+" if isinstance(found, Difference) else ""
    mean = f"{100 * found.mean:{sign}.2f}"
    if found.deviation is None:
        return mean
    deviation = "" if sign else f" ±{100 * found.deviation:.2f}"
    return f"{mean}{deviation} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def _p_value(difference: Difference | None) -> str:
    if difference is None or difference.p_value is None:
        return _NONE
    return f"{difference.p_value:.3f}" if difference.p_value >= 0.001 else "<0.001"


def _explanation(views: int) -> str:
    image = f"the {views} views of an image counted as one" if views > 1 else "image by image"
    return f"""
top1: percent, mean ±standard deviation over seeds (95 % interval of the mean by Student's t).
gain: points above the row's baseline, seed by seed (95 % interval), and p of a paired t-test.
gain_by_image: of these very runs over the images, {image}: not what other seeds would do.
paper: on ImageNet."""
