"""Images by which a network is quantised, and others by which it is judged."""

import dataclasses
import itertools

import keras
import numpy as np

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError, in_one_line
from condconv.engine.experiment import Data, Experiment, as_numpy, build_data, check_images_fit


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Images as evaluation would see them, (N, H, W, C) float32, 0–255.

    Attributes:
        images: whose activations say which range eight bits have to cover.
        held_out: of another split, on which the quantised network is compared with its source.
        origin: of both, for people.
    """

    images: np.ndarray
    held_out: np.ndarray
    origin: str


def draw(experiment: Experiment | None, model: keras.Model, count: int) -> Calibration:
    """Draws images from the splits that an experiment trains on and reports.

    Args:
        experiment: that has the data; None where no config was named.
        model: to be quantised.
        count: how many of each split, or all if it has fewer.

    Raises:
        UsageError: if there is no experiment, or its images are not of the model's size.
        RunError: if one cannot be read.
    """
    if experiment is None:
        raise UsageError(
            "--precision=int8 is calibrated on images: name a config that has some, such as "
            "--gin_file=configs/digits.gin"
        )
    splits = (experiment.train_split, experiment.eval_split)
    data = build_data(experiment, *splits)
    check_images_fit(model, data, experiment.eval_split)
    images, held_out = (_drawn_images(data, split, count) for split in splits)
    origin = (
        f"{len(images)} images of {data.name}, {splits[0]!r}; compared on {len(held_out)} of "
        f"{splits[1]!r}"
    )
    return Calibration(images, held_out, origin)


def _drawn_images(data: Data, split: str, count: int) -> np.ndarray:
    """Returns different images, in a random order: files may be sorted by class."""
    count = min(count, data.num_examples(split))
    with in_one_line(RunError, errors=files.path_errors()):
        drawn = as_numpy(data.untouched(split, batch_size=count, seed=0))
        return np.stack([np.float32(each["image"]) for each in itertools.islice(drawn, count)])
