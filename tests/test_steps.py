"""Training steps: those of the authors, of naive arithmetic, and of any number of devices."""

import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from local_workers import tf_configs
from tiny_runs import step

from condconv import ops
from condconv.engine import optimization, schedules
from condconv.engine.backends import Run, tensorflow
from condconv.engine.experiment import Experiment
from data.pipeline import ImageSpec
from models import create_model
from models.released import assign, tf1_names

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "train_mini.npz"
SCOPE = "efficientnet-b0"


class Given:
    """Data that gives the batches it is given, and again."""

    name, num_classes, answers = "given", 10, None

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._batches = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
        self._count = labels.size

    def num_examples(self, split: str) -> int:
        return self._count

    def image_spec(self, split: str) -> ImageSpec:
        return ImageSpec(tuple(self._batches.element_spec["image"].shape[1:]), "uint8")

    def train_batches(self, split: str, *, start: int, **arguments) -> tf.data.Dataset:
        return self._batches.repeat().skip(start)

    def eval_batches(self, split: str, *, batch_size: int, **arguments) -> tf.data.Dataset:
        return self._batches.unbatch().batch(batch_size)


def mini(images: np.ndarray, labels: np.ndarray, num_experts: int = 0) -> Experiment:
    identity = ((0.0,) * 3, (1.0,) * 3)
    return Experiment(
        model=lambda num_classes: create_model(
            "efficientnet_b0",
            num_classes=num_classes,
            num_experts=num_experts,
            width=0.5,
            image_size=64,
            dropout=0.0,
            survival=1.0,
            normalization=identity,
        ),
        data=lambda: Given(images, labels),
        optimizer=optimization.rmsprop,
        schedule=lambda clock: schedules.exponential(clock, 0.128 * 256 / 6, "4 steps"),
        duration="16 steps",
        batch_size=6,
        label_smoothing=0.1,
        weight_decay=1e-5,
        ema_decay=0.9999,
    )


def two_steps(built: Run) -> list[float]:
    batches = built.batches(0)
    return [step(built, number, batches).sums["objective"] / 6 for number in range(2)]


def far(got: np.ndarray, wanted: np.ndarray, before: np.ndarray) -> float:
    """How far apart, over what is allowed: a thousandth of the change."""
    allowed = 1e-3 * np.linalg.norm(wanted - before) + 1e-6 * np.sqrt(before.size)
    return float(np.linalg.norm(got - wanted) / allowed)


@pytest.mark.slow
def test_two_steps_are_those_of_the_authors_graph():
    golden = np.load(GOLDEN)
    before = {k.removeprefix("init/"): golden[k] for k in golden.files if k.startswith("init/")}
    built = tensorflow.build(mini(golden["X"], golden["Y"]))
    names = tf1_names(built.model, SCOPE)
    assign(built.model, before, names)
    for average, variable in zip(built.average.averages, built.average.variables, strict=True):
        average.assign(variable.value)
    np.testing.assert_allclose(two_steps(built), golden["loss"], rtol=1e-4)
    state = built.state()
    worst = {}
    for path, name in names.items():
        start = before[name]
        if f"after/{name}" in golden.files:
            after, average = golden[f"after/{name}"], golden[f"ema/{name}"]
        else:  # larger ones are kept as scaled changes; the average moves by 1 − (1 + 2)/(10 + 2)
            change = golden[f"change/{name}"].astype(np.float32) * golden[f"scale/{name}"]
            after, average = start + change, start + 0.75 * change
        for kind, wanted in (("model", after), ("average", average)):
            got = state[f"{kind}/{path}"].reshape(start.shape)
            worst[kind, name] = far(got, wanted, start)
    assert len(worst) == 2 * len(names)
    assert max(worst.values()) <= 1, max(worst.items(), key=lambda each: each[1])


@pytest.mark.slow
def test_two_steps_of_condconv_are_those_of_a_loop_over_examples(monkeypatch):
    """Every conditional kernel mixed and applied to one example at a time, by the definition."""
    golden = np.load(GOLDEN)
    data = mini(golden["X"], golden["Y"], num_experts=3)
    ours = tensorflow.build(data)
    before = ours.state()
    losses = two_steps(ours)
    after = ours.state()
    monkeypatch.setattr(ops, "conv2d", one_by_one(plain))
    monkeypatch.setattr(ops, "depthwise_conv2d", one_by_one(depthwise))
    naive = tensorflow.build(data)
    naive_losses = two_steps(naive)
    np.testing.assert_allclose(losses, naive_losses, rtol=1e-4)
    worst = {n: far(after[n], w, before[n]) for n, w in naive.state().items() if "/" in n}
    worst = {n: value for n, value in worst.items() if n.startswith(("model/", "average/"))}
    assert max(worst.values()) <= 1, max(worst.items(), key=lambda each: each[1])


def one_by_one(convolve):
    """A convolution of a whole batch with a kernel each, as a loop that TensorFlow unrolls."""

    def loop(x, kernels, geometry, training, formulation):
        strides, padding, dilation_rate = geometry
        rows = [
            convolve(x[i : i + 1], kernels[i], strides, padding.upper(), dilation_rate)
            for i in range(x.shape[0])
        ]
        return tf.concat(rows, axis=0)

    return loop


def plain(x, kernel, strides, padding, dilation_rate):
    return tf.nn.conv2d(x, kernel, strides, padding, dilations=dilation_rate)


def depthwise(x, kernel, strides, padding, dilation_rate):
    return tf.nn.depthwise_conv2d(x, kernel, (1, *strides, 1), padding, dilations=dilation_rate)


def single_steps(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tests/single_steps.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@pytest.mark.slow
def test_a_step_of_two_replicas_or_workers_is_that_of_one_device(tmp_path):
    states, one, two, workers = (tmp_path / name for name in ("states", "one", "two", "workers"))
    for folder in (states, one, two, workers):
        folder.mkdir()
    wait(single_steps("record", str(states), "auto", str(one)))
    wait(single_steps("replay", str(states), "cpu:2", str(two)))
    wait(
        *(
            single_steps("replay", str(states), "auto", str(workers), TF_CONFIG=text)
            for text in tf_configs(2)
        )
    )
    for number, folder in itertools.product(range(20), (two, workers)):
        before, wanted, got = (np.load(each / f"{number}.npz") for each in (states, one, folder))
        assert abs(got["loss"] - wanted["loss"]) <= 1e-12 * abs(wanted["loss"])
        for name in before.files:
            update = np.linalg.norm(wanted[name] - before[name])
            allowed = 1e-9 * update + 1e-12 * np.sqrt(before[name].size)
            assert np.linalg.norm(got[name] - wanted[name]) <= allowed, (number, folder.name, name)


@pytest.mark.slow
def test_workers_have_the_same_weights_after_fifty_steps(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    wait(
        *(
            single_steps("run", "-", "auto", str(folder), TF_CONFIG=text)
            for folder, text in zip(folders, tf_configs(2), strict=True)
        )
    )
    one, other = (np.load(folder / "last.npz") for folder in folders)
    assert len(one.files) > 100
    assert all(np.array_equal(one[name], other[name]) for name in one.files)


TWO_REPLICAS = """
import numpy as np
import tensorflow as tf
from condconv.engine import config
from condconv.engine.backends import tensorflow
from condconv.engine.backends.tensorflow import step

bindings = ("mobilenet_v1.dropout = 0.5", "Experiment.devices = 'cpu:2'")
built = tensorflow.build(config.load(["configs/digits_condconv.gin"], bindings))
half = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
batch = {"image": tf.constant(half), "label": tf.zeros(32, tf.int64)}

@tf.function
def losses(number):
    parts, _ = built.strategy.run(step._on_replica, args=(built, batch, number, tf.zeros([])))
    return built.strategy.experimental_local_results(parts["loss"])

for number in (0, 0, 1):
    print(*(float(loss) for loss in losses(tf.constant(number, tf.int64))))
"""


@pytest.mark.slow
def test_replicas_drop_differently_and_the_same_again():
    done = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, again, later = (line.split() for line in done.stdout.splitlines())
    assert first[0] != first[1]
    assert first == again
    assert set(first).isdisjoint(later)
