"""What the network sees, for people to look at."""

import io
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from condconv.engine import files
from condconv.engine.errors import RunError, in_one_line
from condconv.engine.experiment import Data, Experiment, as_numpy, build_data
from condconv.tools.prediction import Prediction

_COLUMNS = 8
_NAME = 22  # characters of a class's name that fit under an image
_MOST = 48  # predictions in one picture
_BEST, _OTHER = "#0072b2", "#56b4e9"


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
    files.check_output(output, "--output")
    data = build_data(experiment, experiment.train_split)
    with in_one_line(RunError, errors=files.path_errors()):
        pairs = _before_and_after(experiment, data, step, min(count, experiment.batch_size))
    _draw_pairs(
        pairs, data.class_names, f"{data.name}, {experiment.train_split}, step {step}", output
    )


def _before_and_after(
    experiment: Experiment, data: Data, step: int, count: int
) -> list[tuple[dict, dict]]:
    """Returns each image as it is and as it is trained on."""
    which = {"batch_size": experiment.batch_size, "seed": experiment.seed, "start": step}
    untouched = as_numpy(data.untouched(experiment.train_split, **which))
    batch = next(as_numpy(data.train_batches(experiment.train_split, **which)))
    trained = ({name: column[row] for name, column in batch.items()} for row in range(count))
    return list(zip(itertools.islice(untouched, count), trained, strict=True))


def _draw_pairs(
    pairs: Sequence[tuple[dict, dict]], names: Sequence[str], title: str, output: epath.Path
) -> None:
    pyplot = _pyplot()
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
            axes.imshow(_pixels(example["image"]))
            axes.set_title(kind * (column == 0) + _title(example["label"], names), fontsize=7)
    figure.suptitle(f"{title}: as evaluated, and below as trained on", fontsize=9)
    _save(figure, output)


def draw_predictions(
    predictions: Sequence[Prediction],
    image: Callable[[epath.Path], np.ndarray],
    output: epath.Path,
) -> None:
    """Draws images as the network sees them, and bars for their best classes beside them, as a PNG.

    Args:
        predictions: of the images; of many, the first 48 are drawn, which a line on stderr tells.
        image: a path to its image, (H, W, 3), 0–255.
        output: a .png file.

    Raises:
        RunError: if it cannot be written.
    """
    if len(predictions) > _MOST:
        print(f"{output} shows the first {_MOST} of {len(predictions)} images", file=sys.stderr)
        predictions = predictions[:_MOST]
    across = 1 if len(predictions) <= 3 else 2
    down = math.ceil(len(predictions) / across)
    bars = len(predictions[0].classes)
    figure, grid = _pyplot().subplots(
        down,
        2 * across,
        figsize=(6.6 * across, max(2.3, 0.3 * bars + 0.8) * down),
        width_ratios=(1, 1.6) * across,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for axes in grid.flat:
        axes.set_axis_off()
    pairs = grid.reshape(-1, 2)
    for (picture, axes), prediction in zip(pairs, predictions, strict=False):
        picture.imshow(_pixels(image(prediction.path)))
        picture.set_title(_shortened(prediction.path.name, 32), fontsize=8, parse_math=False)
        _draw_bars(axes, prediction)
    _save(figure, output)


def _draw_bars(axes: Any, prediction: Prediction) -> None:
    """Draws probabilities as bars, best on top, each under its class's name."""
    places, shares = range(len(prediction.classes)), prediction.probabilities
    axes.barh(places, [1] * len(shares), height=0.36, color="#eeeeee")
    axes.barh(places, shares, height=0.36, color=[_BEST] + [_OTHER] * (len(shares) - 1))
    for place, number, name, share in zip(
        places, prediction.classes, prediction.names, shares, strict=True
    ):
        font = {"fontsize": 8, "weight": "normal" if place else "bold", "parse_math": False}
        text = _shortened(name.split(", ")[0] if name else f"class {number}", 40)
        axes.text(0, place - 0.26, text, va="bottom", **font)
        axes.text(1, place - 0.26, f"{share:.1%}", va="bottom", ha="right", **font)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shares) - 0.6, -0.9)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, output: epath.Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    _pyplot().close(figure)
    files.write_bytes(output, content.getvalue())


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _title(label: np.ndarray, names: Sequence[str]) -> str:
    """Returns a class's name, or two with their shares where images are mixed."""
    if label.ndim == 0:
        return _class_name(int(label), names)
    largest = np.argsort(-label)[:2]
    if label[largest[0]] > 0.995:
        return _class_name(int(largest[0]), names)
    return "\n".join(f"{label[i]:.2f} {_class_name(int(i), names)}" for i in largest)


def _class_name(number: int, names: Sequence[str]) -> str:
    name = names[number].split(", ")[0] if names else f"class {number}"
    return _shortened(name, _NAME)
