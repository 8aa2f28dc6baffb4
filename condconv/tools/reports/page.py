"""One HTML page that holds all it shows: no address outside of it, and no script."""

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from condconv.engine import files
from condconv.tools.reports import charts, figures
from condconv.tools.reports.records import Record, alike

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --line: #8886; --head: #eee; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e4e4; --head: #2b2e34; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 88rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.box { overflow: auto; max-height: min(60rem, 90vh);
  border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap; vertical-align: top; }
th { background: var(--head); position: sticky; top: 0; }
tr + tr > * { border-top: 1px solid var(--line); }
td { overflow-wrap: normal; } .number { text-align: right; }
pre { margin: 0; padding: 0.6rem; font: 13px/1.4 ui-monospace, monospace; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
figcaption { text-align: right; font-size: 0.85rem; } a { color: inherit; }
.problems { border-left: 4px solid #D55E00; padding: 0.3rem 0 0.3rem 1.6rem; margin: 0 0 1rem; }
summary { cursor: pointer; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --head: #eee; }
  body { padding: 0; font-size: 9pt; max-width: none; }
  .box { overflow: visible; max-height: none; border: 0; }
  table { font-size: 7.5pt; } th, td { padding: 1pt 3pt; }
  td:not(.number), th { white-space: normal; overflow-wrap: anywhere; }
  pre { white-space: pre-wrap; font-size: 7.5pt; } figcaption { display: none; }
  th { position: static; } .figures { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; }
}
"""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the value in a row.
        title: above it.
        form: how ``format`` writes a number; others are written as they are.
        scale: what a number is multiplied by to be written.
    """

    key: str
    title: str
    form: str = ""
    scale: int = 1


# A binding of config.gin; long values go on in lines that are indented.
_BINDING = re.compile(r"^([\w./]+) = (.*(?:\n[ \t]+.*)*)", re.MULTILINE)

_RESULTS = (
    Column("run", "run"),
    Column("top1", "top-1 (%)", ".2f", 100),
    Column("top5", "top-5 (%)", ".2f", 100),
    Column("loss", "loss", ".4f"),
    Column("images", "images", ","),
    Column("dataset", "data set"),
    Column("split", "split"),
    Column("step", "step", ","),
    Column("weights", "weights"),
    Column("parameters", "parameters", ","),
    Column("multiply_adds", "multiply-adds", ","),
    Column("macs", "MACs", ","),
)
_PER_LAYER = (
    Column("layer", "layer"),
    *(Column(key, key, ",") for key in ("parameters", "static", "mixing", "routing")),
    Column("macs", "MACs", ","),
)


def of_runs(records: Sequence[Record]) -> list[str]:
    """Returns the sections about one run, or about several side by side."""
    return [
        left_out([problem for record in records for problem in record.problems.values()]),
        _results(records),
        section("Figures", figure_grid(figures.of_runs(records))),
        _costs(records),
        configs(records),
        environments(records),
    ]


def document(title: str, sections: Sequence[str]) -> str:
    """Returns a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(filter(None, sections))}</body>\n</html>\n"
    )


def escape(value: object) -> str:
    """Returns text that HTML shows as it is, whatever it holds."""
    return html.escape(charts.visible(value))


def section(title: str, content: str) -> str:
    """Returns a part of a page under its title; nothing if there is no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns a table in a box of its own; each number is there to the last digit as well."""
    head = "".join(f"<th{_aligned(column)}>{escape(column.title)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(_cell(column, row.get(column.key)) for column in columns)}</tr>\n"
        for row in rows
    )
    return (
        f"{_box(name)}<table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def figure_grid(drawn: Sequence[Figure]) -> str:
    """Returns figures side by side, as many as fit, each with itself as a file."""
    whole = "".join(map(_figure, drawn))
    return f'<div class="figures">\n{whole}</div>\n' if whole else ""


def left_out(problems: Sequence[str]) -> str:
    """Returns a list of the files that are not on the page, and why."""
    return _notes([f"left out: {problem}" for problem in problems])


def _notes(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f'<ul class="problems">\n{items}</ul>\n' if items else ""


def _figure(figure: Figure) -> str:
    title, drawing = figure.get_label(), charts.svg(figure)
    name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "figure"
    seen = drawing.replace(charts.INK, "currentColor")
    seen = seen.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    link = f'<a download="{name}.svg" href="{charts.address(drawing)}">SVG</a>'
    return f"<figure>{seen}\n<figcaption>{link}</figcaption></figure>\n"


def _box(name: str) -> str:
    """Returns the start of a box that scrolls by itself, by keyboard too."""
    return f'<div class="box" role="region" aria-label="{escape(name)}" tabindex="0">'


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return f"<td{_aligned(column)}>–</td>"
    if not column.form or isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td{_aligned(column)}>{escape(value)}</td>"
    try:
        text = format(value * column.scale, column.form)
    except OverflowError:
        text = str(value)
    return f'<td{_aligned(column)}><data value="{json.dumps(value)}">{text}</data></td>'


def _aligned(column: Column) -> str:
    return ' class="number"' if column.form else ""


def _results(records: Sequence[Record]) -> str:
    rows = [{"run": r.name, **_cost_of(r), **(r.result or {})} for r in records]
    missing = [
        f"{record.name} has not been evaluated: run eval.py --workdir={record.workdir}, then "
        "scripts/report.py"
        for record in records
        if not files.is_file(record.workdir / "eval.json")
    ]
    return section("Results", table(_RESULTS, rows, "Results") + _notes(missing))


def _cost_of(record: Record) -> dict[str, Any]:
    names = ("parameters", "multiply_adds", "macs")
    return {name: (record.cost or {}).get(name) for name in names}


def _costs(records: Sequence[Record]) -> str:
    parts = [
        f"<h3>{escape(names)}</h3>\n" * (len(records) > 1)
        + table(_PER_LAYER, record.cost["rows"], f"Cost per layer, {names}")
        for names, record in figures.costs(records)
    ]
    return section("Cost per layer", "".join(parts))


def configs(records: Sequence[Record]) -> str:
    """Returns the section of the config, and of what differs where there are several runs."""
    if len(records) == 1:
        return section("Config", _text(records[0].config, "Config"))
    whole = "".join(
        f"<details><summary>{escape(r.name)}</summary>{_text(r.config, r.name)}</details>\n"
        for r in records
    )
    return _differences(records) + section("Config", whole)


def _text(text: str, name: str) -> str:
    return f"{_box(name)}<pre>{escape(text)}</pre></div>\n" if text else ""


def _differences(records: Sequence[Record]) -> str:
    """Returns the section of the bindings that not all runs have alike."""
    bound = [dict(_BINDING.findall(record.config)) for record in records]
    values = {name: [each.get(name) for each in bound] for name in sorted(set().union(*bound))}
    differing = {name: each for name, each in values.items() if len(set(each)) > 1}
    return _beside("Config: what differs", [record.name for record in records], differing)


def environments(records: Sequence[Record]) -> str:
    """Returns the section of the environments."""
    groups = alike(records, lambda record: record.environment)
    names = dict.fromkeys(name for _, record in groups for name in record.environment)
    values = {name: [_plain(r.environment.get(name)) for _, r in groups] for name in names}
    return _beside("Environment", [title for title, _ in groups], values)


def _beside(title: str, runs: Sequence[str], values: Mapping[str, Sequence[Any]]) -> str:
    """Returns a section with a row for each name, and a column for each run or group of runs."""
    columns = [Column("", ""), *(Column(str(i), name) for i, name in enumerate(runs))]
    rows = [{"": name, **{str(i): v for i, v in enumerate(row)}} for name, row in values.items()]
    return section(title, table(columns, rows, title) if rows else "")


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value
