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
from condconv.engine.errors import UsageError, gist
from condconv.tools.reports import figures, page, records, study_page
from condconv.tools.studies import study

_MOST_NAMES = 4  # in a page's title


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
    """Draws top-1 over steps, in training and on the splits that runs were judged by, as a PNG.

    Raises:
        UsageError: if a run's metrics cannot be read, or the output not be written.
    """
    files.check_output(output, "--output")
    runs = records.read(workdirs)
    for run in runs:
        if problem := run.problems.get("metrics.jsonl"):
            raise UsageError(problem)
    content = io.BytesIO()
    figures.accuracy(runs).savefig(content, format="png", dpi=216, facecolor="white")
    files.write_bytes(output, content.getvalue())


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
        left_out += [problem for run in runs for problem in run.problems.values()]
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
        logging.warning("%s was not written: %s", path, gist(error))
