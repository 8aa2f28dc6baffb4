"""Takes one step from each of some states, on the devices it is told, and keeps what comes out.

python single_steps.py record|replay FOLDER DEVICES OUTPUT
python single_steps.py run - DEVICES OUTPUT
"""

import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from tiny_runs import step

from condconv.engine import config
from condconv.engine.backends import tensorflow

STATES = 20
BINDINGS = (
    "Experiment.precision = 'float64'",
    "Experiment.synchronized_batch_norm = True",
    "Experiment.batch_size = 16",
    "mobilenet_v1.dropout = 0.0",
    "mobilenet_v1.num_experts = 2",
    "mobilenet_v1.width = 0.1",
    "cosine.warmup = '0 steps'",
)


def main(mode: str, folder: str, device: str, output: str) -> None:
    if mode == "run":
        fifty_steps(device, output)
    else:
        single_steps(mode, folder, device, output)


def fifty_steps(device: str, output: str) -> None:
    """Trains as usual, and keeps what this worker ends with."""
    bindings = ("mobilenet_v1.width = 0.1", f"Experiment.devices = '{device}'")
    built = tensorflow.build(config.load(["configs/digits_condconv.gin"], bindings))
    batches = built.batches(0)
    for number in range(0, 50, 10):
        built.steps(batches, number, built.schedule(np.arange(number, number + 10)))
    np.savez(pathlib.Path(output) / "last.npz", **built.state())


def single_steps(mode: str, folder: str, device: str, output: str) -> None:
    """Takes one step from each state."""
    bindings = (*BINDINGS, f"Experiment.devices = '{device}'")
    experiment = config.load(["configs/digits_condconv.gin"], bindings)
    built = tensorflow.build(experiment)
    for number in range(STATES):
        path = pathlib.Path(folder) / f"{number}.npz"
        if mode == "record":
            np.savez(path, **built.state())
        else:
            with np.load(path) as stored:
                state = dict(stored)
            built.restore(state, path.name)
        taken = step(built, number)
        if built.devices.is_chief:
            loss = np.float64(taken.sums["loss"])
            np.savez(pathlib.Path(output) / f"{number}.npz", **built.state(), loss=loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
