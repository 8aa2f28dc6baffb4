"""Runs side by side: a table of what they cost and reached, and their curves."""

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


def compare(workdirs: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Returns a row for each run from its ``eval.json``: parameters, multiply-adds, top-1.

    Raises:
        UsageError: if one has not been evaluated.
    """
    rows = []
    for workdir in workdirs:
        path = workdir / "eval.json"
        if not path.exists():
            raise UsageError(f"{workdir} has no eval.json: run eval.py --workdir={workdir} first")
        result = files.read_json(path)
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
    """Draws top-1 over steps, in training and on the split it is watched by, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for workdir, colour in zip(workdirs, _COLOURS * len(workdirs), strict=False):
        metrics = read_metrics(workdir)
        for prefix, style in _STYLES.items():
            points = [(m["step"], 100 * m[k]) for m in metrics if (k := f"{prefix}_top1") in m]
            if points:
                label = f"{workdir.name}, {_LABELS[prefix]}"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.set(xlabel="step", ylabel="top-1 accuracy (%)", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with output.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)
