"""The one way from a workdir or a file to a network with its weights."""

import contextlib
import dataclasses
import sys
from typing import Any

import keras
import numpy as np
from etils import epath

from condconv.engine import checkpoints, keras_file
from condconv.engine.backends import Arrays, Run
from condconv.engine.errors import RunError, UsageError
from condconv.engine.experiment import Data, Experiment, build_data, build_model


@dataclasses.dataclass(frozen=True)
class Restored:
    """A network of a run, with the weights of a checkpoint.

    Attributes:
        model: the network.
        data: of the run.
        step: of the checkpoint.
        weights: "ema" if they are averages, else "raw".
    """

    model: keras.Model
    data: Data
    step: int
    weights: str


def restore(
    experiment: Experiment,
    workdir: epath.Path,
    checkpoint: str = "last",
    ema: bool | None = None,
    *,
    stand_in: bool = False,
    in_float32: bool = False,
    scope: contextlib.AbstractContextManager[Any] | None = None,
) -> Restored:
    """Returns the network of a run.

    Args:
        experiment: the run's own, from ``config.load_run``.
        workdir: of the run.
        checkpoint: "last", "best", a step or the path of a checkpoint.
        ema: whether to use the averages of the weights; if None, wherever there are any.
        stand_in: whether made-up examples do: classes and preprocessing are known without data.
        in_float32: whether it is to compute so, whatever the run did.
        scope: of the devices that it is built for; the default ones if None.

    Raises:
        UsageError: if there is no such checkpoint, or it does not fit.
    """
    found = checkpoints.Checkpoints(workdir).resolve(checkpoint)
    values, weights = found.weights(ema)
    splits = () if stand_in else (experiment.eval_split,)
    data = build_data(experiment, *splits, stand_in=stand_in)
    if in_float32:
        experiment = dataclasses.replace(experiment, precision="float32")
    with scope or contextlib.nullcontext():
        model = build_model(experiment, data.num_classes)
    variables = checkpoints.named_variables(model)
    checkpoints.fit(values, variables, found.name)
    return Restored(model, data, found.step, weights)


def initialize(run: Run) -> None:
    """Takes over what ``Experiment.init_from`` names, and says what does not fit.

    A classifier of another size is made anew. Averages begin where the weights do.

    Raises:
        UsageError: if there is no such file, or nothing of it fits.
    """
    path = run.experiment.init_from
    if not path:
        return
    values, state = _weights_of(path), run.state()
    own = {n.removeprefix("model/"): v for n, v in state.items() if n.startswith("model/")}
    taken = {n for n in own if n in values and values[n].shape == own[n].shape}
    if not taken:
        raise UsageError(f"Experiment.init_from={path!r} has no variable of {run.model.name}")
    weights = own | {name: values[name] for name in taken}
    state |= {f"model/{name}": value for name, value in weights.items()}
    state |= {f"average/{n}": v for n, v in weights.items() if f"average/{n}" in state}
    run.restore(state, path)
    print(f"{path}: {len(taken)} of {len(own)} variables taken", file=sys.stderr)
    for what, names in (("made anew", own), ("not taken", values)):
        if left := sorted(set(names) - taken):
            print(f"  {what}: {', '.join(left)}", file=sys.stderr)


def _weights_of(path: str) -> Arrays:
    """Returns a network's variables by path, from a ``.keras`` file or a checkpoint's folder.

    Of a checkpoint, averages are preferred.

    Raises:
        UsageError: if there is neither.
    """
    if not path.endswith(".keras"):
        return checkpoints.read(path).weights()[0]
    try:
        model = keras_file.load(path)
    except RunError as error:  # before the first step
        raise UsageError(f"Experiment.init_from: {error}") from error
    named = checkpoints.named_variables(model)
    return {name: np.asarray(v) for name, v in named.items()}
