"""Runs side by side: what they cost and reached and their curves, as a table, plot or page."""

import contextlib
import dataclasses
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from etils import epath

from condconv.cost import count_cost
from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.tools.reports import page, records, study_page
from condconv.tools.reports.charts import COLOURS
from condconv.tools.studies import study

_STYLES = {"train": ":", "minival": "-", "val": "-"}
_MOST_NAMES = 4  # in a page's title
_LABELS = {"train": "training", "minival": "selection", "val": "evaluation"}


def compare(workdirs: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Returns a row for each run from its ``eval.json``: parameters, multiply-adds, top-1.

    Raises:
        UsageError: if one has not been evaluated, or its results are not what eval.py writes.
    """
    rows = []
    for workdir in workdirs:
        result = records.read_result(workdir)
        rows.append(
            {
                "run": workdir.name,
                "parameters": result["parameters"],
                "multiply_adds": result["multiply_adds"],
                "top1": round(result["top1"], 4),
                "images": result["images"],
                "split": f"{result['dataset']}/{result['split']}",
            }
        )
    return rows


def plot_accuracy(workdirs: Sequence[epath.Path], output: epath.Path) -> None:
    """Draws top-1 over steps, in training and on the split it is watched by, as a PNG.

    Raises:
        UsageError: if a run's metrics cannot be read, or the output not be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files.check_output(output, "--output")
    curves = [_curves(workdir) for workdir in workdirs]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for of_run, colour in zip(curves, COLOURS * len(curves), strict=False):
        for label, style, points in of_run:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.set(xlabel="step", ylabel="top-1 accuracy (%)", ylim=(0, 101))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    pyplot.close(figure)
    files.write_bytes(output, content.getvalue())


def _curves(workdir: epath.Path) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Returns label, style and points (step, percent) of each curve that a run has."""
    metrics, curves = records.metrics_of(workdir), []
    for prefix, style in _STYLES.items():
        points = records.points(metrics, f"{prefix}_top1", 100)
        drawn = [(step, value) for step, value in points if value is not None]
        curves.append((f"{workdir.name}, {_LABELS[prefix]}", style, drawn))
    return [curve for curve in curves if curve[-1]]


def write(workdirs: Sequence[epath.Path], output: epath.Path) -> list[str]:
    """Writes a page about runs side by side, and about the studies that ``reproduce.py`` made.

    Args:
        workdirs: of runs and of studies.
        output: an HTML file.

    Returns:
        A line for each file that was left out, because it cannot be read or trusted.

    Raises:
        UsageError: if a folder is of neither, or the output cannot be written.
    """
    found = {workdir: [] if records.is_run(workdir) else _studies(workdir) for workdir in workdirs}
    files.check_output(output, "--output")
    sections, left_out = [], []
    for folder in dict.fromkeys(itertools.chain(*found.values())):
        of_study, problems = study_page.of_study(folder)
        sections += of_study
        left_out += problems
    if runs := records.read([workdir for workdir, studies in found.items() if not studies]):
        sections += page.of_runs(runs)
        left_out += [problem for run in runs for problem in run.problems]
    title = ", ".join(workdir.name or str(workdir) for workdir in found)
    title = title if len(found) <= _MOST_NAMES else f"{len(found)} folders"
    files.write_text(output, page.document(title, sections))
    return left_out


def _studies(workdir: epath.Path) -> list[epath.Path]:
    if studies := study.find_studies(workdir):
        return studies
    raise UsageError(
        f"{workdir} is the folder of neither a run (which has config.gin or metrics.jsonl) nor a "
        "study (which has study.json)"
    )


def conclude(model: keras.Model, workdir: epath.Path) -> None:
    """Writes ``cost.json`` and ``report.html`` of a run that has ended; failing, says so.

    ``cost.json`` has the totals of the model's cost and, in ``rows``, those of each layer.
    """
    with _worth_no_failure(workdir / "cost.json"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be counted is named in the file
        cost = count_cost(model)
        totals = {"multiply_adds": cost.multiply_adds, "macs": cost.macs}
        files.write_json(workdir / "cost.json", totals | dataclasses.asdict(cost))
    with _worth_no_failure(workdir / "report.html"):
        write([workdir], workdir / "report.html")


@contextlib.contextmanager
def _worth_no_failure(path: epath.Path) -> Iterator[None]:
    """Turns whatever goes wrong into a line of the log: the run is done."""
    try:
        yield
    except Exception as error:
        logging.warning("%s was not written: %s", path, files.reason(error))
