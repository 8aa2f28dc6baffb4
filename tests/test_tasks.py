"""Tasks and data of one's own: the engine asks of them what the protocols say, and no more."""

from collections.abc import Iterator

import keras
import numpy as np
import pytest
from etils import epath
from keras import ops
from tiny_runs import build, experiment, step, stripes

from condconv.engine import evaluation, loop
from condconv.engine.tasks.classification import cross_entropy
from condconv.engine.telemetry import read_metrics
from data.pipeline import ImageSpec


class Arrays:
    """Stripes as plain iterables of dicts of numpy's arrays."""

    name, num_classes, class_names, answers = "arrays", 3, (), None
    preprocessing = None

    def __init__(self):
        self._data = stripes()

    def num_examples(self, split: str) -> int:
        return self._data.num_examples(split)

    def image_spec(self, split: str) -> ImageSpec:
        return ImageSpec((6, 6, 3), "uint8")

    def train_batches(self, split: str, **arguments) -> Iterator[dict[str, np.ndarray]]:
        return self._data.train_batches(split, **arguments).as_numpy_iterator()

    def eval_batches(self, split: str, **arguments) -> list[dict[str, np.ndarray]]:
        return list(self._data.eval_batches(split, **arguments).as_numpy_iterator())


def test_batches_may_be_any_iterable_of_dicts_of_arrays(tmp_path):
    found = []
    for data in (stripes, Arrays):
        workdir = epath.Path(tmp_path) / data.__name__
        wanted = experiment(data=data, duration="4 steps", evaluate_every="2 steps")
        assert loop.train(wanted, workdir).exit_code == 0
        metrics = [m for m in read_metrics(workdir) if "selection_loss" in m]
        result = evaluation.evaluate_run(wanted, workdir)
        found.append((metrics, {k: v for k, v in result.items() if k != "dataset"}))
    assert found[0] == found[1]


class Weighted:
    """Cross-entropy in which an example of class c weighs c + 1, and the weights sum to one."""

    means = ("weighted",)

    def divisor(self, batch):
        return ops.sum(self._weights(batch))

    def loss(self, outputs, batch):
        errors = cross_entropy(batch["label"], outputs) * self._weights(batch)
        return ops.sum(errors), {"weighted": ops.sum(errors), "loss": ops.sum(errors)}

    def judge(self, outputs, batch):
        return {"highest": outputs.max(axis=-1)}

    def summary(self, columns):
        return {"highest": float(columns["highest"].max()), "seen": len(columns["highest"])}

    def predictions(self, columns):
        return columns

    def score(self, summary):
        return -summary["highest"]

    def _weights(self, batch):
        return ops.cast(batch["label"] + 1, "float32")


def flat(num_classes: int) -> keras.Model:
    """A network for which parts of a batch make the whole."""
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="classifier")(x), name="flat")


def test_a_divisor_is_that_of_the_whole_batch_however_it_is_parted():
    plain = {"model": flat, "task": lambda data: Weighted(), "label_smoothing": None}
    after = []
    for parts in (1, 2, 4):
        run = build(**plain, accumulation_steps=parts)
        before = run.state()["model/classifier/kernel"]
        step(run, 0)
        after.append(run.state()["model/classifier/kernel"] - before)
    for other in after[1:]:
        np.testing.assert_allclose(other, after[0], rtol=1e-5, atol=1e-8)


def test_a_task_of_ones_own_is_logged_judged_and_chosen_by(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    wanted = experiment(task=lambda data: Weighted(), duration="4 steps", label_smoothing=None)
    assert loop.train(wanted, workdir).exit_code == 0
    metrics = read_metrics(workdir)
    assert {"selection_highest", "selection_raw_highest", "selection_seen"} <= metrics[-1].keys()
    assert any("train_weighted" in line for line in metrics)
    result = evaluation.evaluate_run(wanted, workdir, "best")
    assert (result["seen"], result["step"]) == (23, 4)
    with np.load(workdir / "predictions.npz") as arrays:
        assert set(arrays) == {"highest"}


@pytest.mark.slow
def test_two_replicas_divide_by_the_whole_batch(tmp_path):
    """In a process of its own, whose CPU is two devices."""
    import subprocess
    import sys

    code = """
import numpy as np, sys
from test_tasks import Weighted, flat
from tiny_runs import build, step
kernels = []
for devices in ("cpu:2", "auto"):
    run = build(model=flat, task=lambda data: Weighted(), label_smoothing=None, devices=devices)
    before = run.state()["model/classifier/kernel"]
    step(run, 0)
    kernels.append(run.state()["model/classifier/kernel"] - before)
np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-8)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
