"""What is exported: a trained network, and what is known about it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
from etils import epath

from condconv import in_float32
from condconv.engine import config, files, keras_file
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment
from condconv.engine.restore import restore

_WEIGHTS = {"ema": "averaged", "raw": "raw"}  # for people


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network to export.

    Attributes:
        model: computes in float32.
        origin: where its weights come from, for people.
        evaluate: an encoded image to (H, W, 3), 0–255, as evaluation sees it, where it is known.
        preprocessing: the gin bindings that say the same, or none.
        class_names: of all classes, or none.
        config: the gin config of its run, or "".
        metrics: of its last evaluation, or none.
    """

    model: keras.Model
    origin: str
    evaluate: Callable[[Any], Any] | None = None
    preprocessing: Sequence[str] = ()
    class_names: Sequence[str] = ()
    config: str = ""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


def experiment(
    workdir: str | None, gin_files: Sequence[str], bindings: Sequence[str]
) -> Experiment | None:
    """Returns a run's own experiment, or that of config files beside a network, if there are any.

    Raises:
        UsageError: if these do not go together, or as ``config.load`` does.
    """
    if workdir:
        if gin_files:
            raise UsageError("--gin_file goes with --source: a run has a config of its own")
        return config.load_run(files.path(workdir), bindings)
    if bindings and not gin_files:
        raise UsageError("--gin_param goes with --workdir, or with --source and --gin_file")
    return config.load(gin_files, bindings) if gin_files else None


def of_run(
    experiment: Experiment,
    workdir: epath.Path,
    checkpoint: str,
    preprocessing_in: Callable[[str], Sequence[str]],
) -> TrainedNetwork:
    """Returns the network of a run.

    The data itself is not read: its classes and its preprocessing are known without it.

    Args:
        experiment: the run's own, from ``config.load_run``.
        workdir: of the run.
        checkpoint: "last", "best", a step or the path of a checkpoint.
        preprocessing_in: the text of a config to the bindings in it that say how images are cut.

    Raises:
        UsageError: if there is no such checkpoint, or it does not fit.
    """
    restored = restore(experiment, workdir, checkpoint, stand_in=True, in_float32=True)
    text = files.read_text(workdir / "config.gin")
    used = workdir / "operative_config.gin"  # with defaults
    return TrainedNetwork(
        restored.model,
        f"{workdir}, step {restored.step}, {_WEIGHTS[restored.weights]} weights",
        restored.data.preprocessing.evaluate,
        preprocessing_in(files.read_text(used) if files.is_file(used) else text),
        restored.data.class_names,
        text,
        _metrics_of(workdir / "eval.json", restored.step, restored.weights),
    )


def _metrics_of(path: epath.Path, step: int, weights: str) -> dict[str, Any]:
    """Returns what was evaluated, if it was these weights."""
    metrics = files.read_json(path) if files.is_file(path) else {}
    return metrics if (metrics.get("step"), metrics.get("weights")) == (step, weights) else {}


def of_file(path: str, known: Callable[[int, int], dict[str, Any]]) -> TrainedNetwork:
    """Returns the network in a ``.keras`` file.

    Args:
        path: of the file. Nothing in it is executed: Keras' safe mode is on.
        known: image size and number of classes to what is known of such a network, by the names
            of ``TrainedNetwork``'s attributes; asked for networks of square colour images.

    Raises:
        UsageError: if there is no such file, or its network is not one of images to logits.
        RunError: if it cannot be loaded.
    """
    model = in_float32(keras_file.load(path))
    _check_is_classifier(model, path)
    _, height, width, channels = model.input_shape
    square = height is not None and (height, channels) == (width, 3)
    return TrainedNetwork(model, path, **known(height, model.output_shape[-1]) if square else {})


def _check_is_classifier(model: keras.Model, path: str) -> None:
    shapes = (getattr(model, "input_shape", None), getattr(model, "output_shape", None))
    ranks = [len(s) if isinstance(s, tuple) and s[-1:] != ((),) else 0 for s in shapes]
    if ranks != [4, 2] or isinstance(shapes[0][0], tuple):
        raise UsageError(
            f"--source={path} maps {shapes[0]} to {shapes[1]}: only networks of one batch of "
            "images (N, H, W, C) to logits (N, classes) are exported"
        )
