"""What the network sees, for people to look at."""

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment, build_data, failing_in_one_line

_COLUMNS = 8
_NAME = 22  # characters of a class's name that fit under an image


def draw_batch(experiment: Experiment, step: int, count: int, output: epath.Path) -> None:
    """Draws images of a training batch before and after augmentation, with their labels, as a PNG.

    Args:
        experiment: whose data to draw.
        step: of the training.
        count: images, at most a batch.
        output: a .png file.

    Raises:
        UsageError: if the config or the output do not allow it.
        RunError: if an image cannot be read.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output={output} has to end in .png")
    files.check_output(output, "--output")
    data = build_data(experiment, experiment.train_split)
    with failing_in_one_line():
        pairs = _pairs(experiment, data, step, min(count, experiment.batch_size))
    _draw(pairs, data.class_names, f"{data.name}, {experiment.train_split}, step {step}", output)


def _pairs(experiment: Experiment, data: Any, step: int, count: int) -> list[tuple[dict, dict]]:
    """Returns each image as it is and as it is trained on."""
    which = {"batch_size": experiment.batch_size, "seed": experiment.seed, "start": step}
    before = data.untouched(experiment.train_split, **which).take(count).as_numpy_iterator()
    batch = next(data.train_batches(experiment.train_split, **which).as_numpy_iterator())
    after = ({name: column[row] for name, column in batch.items()} for row in itertools.count())
    return list(zip(before, after, strict=False))


def _draw(
    pairs: Sequence[tuple[dict, dict]], names: Sequence[str], title: str, output: epath.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_COLUMNS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure, grid = pyplot.subplots(
        2 * rows,
        columns,
        figsize=(1.7 * columns, 3.9 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for place, pair in enumerate(pairs):
        row, column = divmod(place, columns)
        for below, (example, kind) in enumerate(zip(pair, ("", "trained on: "), strict=True)):
            axes = grid[2 * row + below, column]
            axes.imshow(np.clip(np.round(example["image"]), 0, 255).astype(np.uint8))
            axes.set_title(kind * (column == 0) + _label(example["label"], names), fontsize=7)
    figure.suptitle(f"{title}: as evaluated, and below as trained on", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    files.write_bytes(output, content.getvalue())


def _label(label: np.ndarray, names: Sequence[str]) -> str:
    """Returns a class's name, or two with their shares where images are mixed."""
    if label.ndim == 0:
        return _name(int(label), names)
    largest = np.argsort(-label)[:2]
    if label[largest[0]] > 0.995:
        return _name(int(largest[0]), names)
    return "\n".join(f"{label[i]:.2f} {_name(int(i), names)}" for i in largest)


def _name(number: int, names: Sequence[str]) -> str:
    name = names[number].split(", ")[0] if names else f"class {number}"
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
