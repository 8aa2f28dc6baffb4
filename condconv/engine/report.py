"""Runs side by side: a table of what they cost and reached, and their curves."""

import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.engine.telemetry import read_metrics

# Okabe and Ito's colours, which people of every colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = {"train": ":", "minival": "-", "val": "-"}
_LABELS = {"train": "training", "minival": "selection", "val": "evaluation"}


# What a row takes from eval.json, and of which type.
_RESULTS = {
    "parameters": int,
    "multiply_adds": int,
    "top1": float,
    "images": int,
    "dataset": str,
    "split": str,
}


def compare(workdirs: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Returns a row for each run from its ``eval.json``: parameters, multiply-adds, top-1.

    Raises:
        UsageError: if one has not been evaluated, or its results are not what eval.py writes.
    """
    rows = []
    for workdir in workdirs:
        result = _result(workdir)
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


def _result(workdir: epath.Path) -> dict[str, Any]:
    """Returns what ``eval.json`` holds, checked."""
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
    for of_run, colour in zip(curves, _COLOURS * len(curves), strict=False):
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
    try:
        metrics = read_metrics(workdir)
    except (ValueError, *files.path_errors()) as error:
        raise UsageError(
            f"the metrics of {workdir} cannot be read ({files.reason(error)}): restore or remove "
            "its metrics.jsonl"
        ) from error
    curves = [
        (f"{workdir.name}, {_LABELS[prefix]}", style, _points(metrics, f"{prefix}_top1"))
        for prefix, style in _STYLES.items()
    ]
    return [curve for curve in curves if curve[-1]]


def _points(metrics: Sequence[Any], name: str) -> list[tuple[float, float]]:
    """Returns (step, percent) wherever a line has both."""
    lines = [line for line in metrics if isinstance(line, dict)]
    pairs = [(line.get("step"), line.get(name)) for line in lines]
    return [
        (step, 100 * share)
        for step, share in pairs
        if isinstance(step, int | float) and isinstance(share, int | float)
    ]
