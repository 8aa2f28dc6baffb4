"""The benchmark of networks: that it compares what it says, and that no process is left behind."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fake_contenders
import keras
import numpy as np
import pytest
import tensorflow as tf

from condconv.engine.errors import RunError, UsageError
from condconv.normalization import BatchNormalization
from condconv.tools.benchmarks import contenders, official_loop
from condconv.tools.benchmarks.benchmark import Contender, alternate, interval
from condconv.tools.benchmarks.comparison import Comparison, Task
from condconv.tools.benchmarks.roofline import roofline, traffic
from models.blocks import Stage, inverted_bottleneck, separable
from models.network import Network

ROOT = pathlib.Path(__file__).parents[1]
FAKES = pathlib.Path(fake_contenders.__file__).stem
TIMM = "CONDCONV_TIMM_PYTHON"


def fake(function: str, **arguments) -> Contender:
    return Contender(
        f"{FAKES}:{function}",
        arguments,
        environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )


_Bottleneck = functools.partial(Stage, block=inverted_bottleneck, se_ratio=0.25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Network):
    """Every kind of conditional layer, strides and both sizes of kernels."""

    name = "tiny"
    stages = (
        Stage(block=separable, repeats=1, filters=8, strides=2),
        _Bottleneck(repeats=1, filters=8, kernel_size=5, expansion=2),
    )
    stem_filters = 8
    head_filters = 16

    num_classes: int = 5
    num_experts: int = 3
    image_size: int | None = 16
    survival: float = 1.0
    first_condconv_block: int = 0
    condconv_head: bool = True
    condconv_classifier: bool = True


def tiny(**changed) -> keras.Model:
    keras.utils.set_random_seed(3)
    return Tiny(**changed).build()


TASK = Task(mode="infer", batch_size=3, image_size=16, num_classes=5, seconds=0.0)


def logits_and_gradients(model: keras.Model) -> tuple[np.ndarray, list[np.ndarray]]:
    images, labels = contenders.images_of(TASK), contenders.labels_of(TASK)
    with tf.GradientTape() as tape:
        loss = contenders.loss_of(labels, model(images, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    return model(images, training=False).numpy(), [np.asarray(each) for each in gradients]


@pytest.fixture
def replace(monkeypatch):
    def put(replacements):
        for kind, name, method in replacements:
            monkeypatch.setattr(kind, name, method)

    return put


@pytest.mark.parametrize("loop", [official_loop.in_keras_layers, official_loop.in_our_layers])
def test_the_official_loop_computes_what_our_network_does(loop, replace, monkeypatch):
    logits, gradients = logits_and_gradients(tiny())
    replace(loop())
    split, fused = [], []
    each, fuse = official_loop._each, tf.raw_ops.FusedBatchNormV3
    monkeypatch.setattr(official_loop, "_each", lambda *given: split.append(1) or each(*given))
    monkeypatch.setattr(
        tf.raw_ops, "FusedBatchNormV3", lambda **given: fused.append(1) or fuse(**given)
    )
    same_logits, same_gradients = logits_and_gradients(tiny())
    assert len(split) >= 2 * 8  # conditional layers, in training and in inference
    assert bool(fused) == (loop is official_loop.in_our_layers)
    assert np.abs(same_logits - logits).max() <= 1e-5 * np.abs(logits).max()
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert np.abs(same - gradient).max() <= 1e-4 * max(np.abs(gradient).max(), 1e-2 * largest)


def test_the_official_loop_needs_a_batch_of_known_size(replace):
    model = tiny()
    replace(official_loop.in_our_layers())
    with pytest.raises(ValueError, match="batch of a known size"):
        contenders.inference_step(model, Task(**{**vars(TASK), "dynamic_batch": True}))()


@pytest.mark.parametrize(
    "changed",
    [
        {"form": "folded_frozen"},
        {"dynamic_batch": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"form": "frozen"}, marks=pytest.mark.slow),
        pytest.param({"form": "folded"}, marks=pytest.mark.slow),
        pytest.param({"xla": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_form_of_inference_gives_the_logits(changed):
    model = tiny()
    for layer in model.layers:
        if isinstance(layer, BatchNormalization):  # that folding has something to do
            layer.moving_mean.assign(np.linspace(-1, 1, layer.moving_mean.shape[0]))
    expected = model(contenders.images_of(TASK), training=False).numpy()
    found = contenders.inference_step(model, Task(**{**vars(TASK), **changed}))()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_step_of_training_reports_its_loss_and_changes_all_weights():
    model = tiny()
    squeeze = model.get_layer("block2_se_reduce").bias
    squeeze.assign(np.ones(squeeze.shape))  # or ReLU may let nothing of these two units through
    before = [weight.numpy() for weight in model.weights]
    logits = model(contenders.images_of(TASK), training=True).numpy()
    model.set_weights(before)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    chosen = exponentials[np.arange(3), contenders.labels_of(TASK)] / exponentials.sum(axis=1)
    loss = contenders.training_step(model, Task(**{**vars(TASK), "mode": "train"}))()
    assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    still = [w.path for w, old in zip(model.weights, before, strict=True) if np.all(w == old)]
    assert not still


def test_dropout_and_stochastic_depth_are_turned_off():
    model = tiny(dropout=0.5, survival=0.5)
    contenders._turn_off_noise(model)
    images = contenders.images_of(TASK)
    draws = [np.asarray(model(images, training=True)) for _ in range(2)]
    assert np.array_equal(*draws)


@pytest.mark.parametrize("count", range(1, 12))
def test_the_interval_is_the_narrowest_that_is_wide_enough(count):
    """All outcomes of ``count`` fair coins, each whether a value lies below the median."""
    below = [sum(coins) for coins in itertools.product((0, 1), repeat=count)]

    def coverage(k: int) -> float:  # of the interval from the k-th smallest to the k-th largest
        return sum(k <= j <= count - k for j in below) / len(below)

    wide_enough = [k for k in range(1, count // 2 + 1) if coverage(k) >= 0.95]
    values = [float(value) for value in reversed(range(count))]
    if not wide_enough:
        assert interval(values) is None
        assert count < 6
    else:
        assert interval(values) == (max(wide_enough) - 1, count - max(wide_enough))


def test_the_interval_of_fifteen():
    assert interval(list(range(15))) == (3, 11)


def test_bytes_by_hand():
    # 2 experts of 10 weights, 7 of which are mixed for each of 3 examples.
    assert traffic("infer", 1, 2, 10, 7) == {"experts read": 80}
    batch = {"experts read": 80, "mixed kernels written and read": 168}
    assert traffic("infer", 3, 2, 10, 7) == batch
    train = traffic("train", 3, 2, 10, 7)
    assert list(train.values()) == [80, 168, 84, 252, 80, 80, 400]
    assert train.items() >= batch.items()


def test_roofline_by_hand():
    line = roofline(
        {"a": 30, "b": 10}, bandwidth=20.0, static_seconds=10.0, multiply_adds_ratio=1.1
    )
    assert (line["bytes"], line["seconds"]) == (40, 2.0)
    assert line["bytes_bound"] == line["bound"] == pytest.approx(1.2)
    line = roofline({"a": 1}, bandwidth=20.0, static_seconds=10.0, multiply_adds_ratio=1.1)
    assert line["bound"] == 1.1


def test_contenders_take_turns_in_alternating_order(tmp_path):
    log, told = tmp_path / "log", []
    given = {name: fake("good", log=str(log), name=name) for name in "ab"}
    measured = alternate(given, 3, told.append)
    assert log.read_text().split() == list("ababbaab")
    assert told[:3] == ["starting a", "starting b", "measured 1 of 3 times"]
    assert [len(each.rates["steps"]) for each in measured.values()] == [3, 3]
    report = measured["a"].report
    assert report["told"] == [3]
    assert 0 < report["seconds_to_first_step"] < 60
    assert 2e6 < report["peak_bytes"] < 2e8  # not that of this process, which has TensorFlow


def test_a_contender_gets_its_cores_and_memory_settings():
    variables = ("MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "PYTHONPATH")
    (report,) = (
        each.report
        for each in alternate({"a": fake("surroundings", variables=variables)}, 1).values()
    )
    assert report["MALLOC_TRIM_THRESHOLD_"] == str(2**30)
    assert report["OMP_NUM_THREADS"] == "1"
    assert report["PYTHONPATH"].startswith(str(ROOT))
    assert report["cores"] == sorted(os.sched_getaffinity(0))[:1]


@pytest.mark.parametrize(
    ("contender", "kind", "said"),
    [
        (fake("fails"), RunError, "RuntimeError: first line$"),
        (fake("fails_as_keras_does"), RunError, "ValueError: the reason$"),
        (fake("refuses"), UsageError, "cannot be$"),
        (fake("lacks_a_module"), UsageError, "cannot import .* No module named 'no_such_module'$"),
        (fake("runs_out_of_memory"), RunError, "out of memory: take a smaller --batch_size"),
        (fake("dies"), RunError, "its process was killed; it may have run out of memory$"),
        (fake("exits"), RunError, "its process died, exit code 3: last words$"),
        (Contender("a:b", {}, python="/no/python"), UsageError, "/no/python is no Python"),
        (Contender("a:b", {}, cores=10**6), UsageError, "wants 1000000 cores; there are"),
    ],
    ids=lambda value: getattr(value, "make", ""),
)
def test_what_fails_names_itself_and_the_reason(contender, kind, said):
    with pytest.raises(kind, match=f"^bad:? .*{said}"):
        alternate({"good": fake("good"), "bad": contender}, 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_contender_outlives_its_parent(tmp_path, how):
    pid_file = tmp_path / "pid"
    code = "from condconv.tools.benchmarks.benchmark import Contender, alternate\n"
    code += f"alternate({{'a': {fake('hangs', pid_file=str(pid_file))!r}}}, 1)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    parent.send_signal(how)
    parent.wait(30)
    child = pathlib.Path(f"/proc/{pid_file.read_text()}/stat")
    wait_until(lambda: not child.exists() or " Z " in child.read_text())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def comparison(**given) -> Comparison:
    defaults = {"mode": "infer", "batch_size": 1, "num_experts": 8, "model": "efficientnet_b0"}
    return Comparison(create="models:create_model", **{**defaults, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_experts": 0, "against": ["static"]}, "need --num_experts above 0"),
        ({"num_experts": 0, "against": ["official_loop"]}, "need --num_experts above 0"),
        ({"against": ["official_loop"], "backend": "jax"}, "needs --backend=tensorflow"),
        ({"against": ["official_loop"], "dynamic_batch": True}, "no --dynamic_batch"),
        ({"against": ["keras_applications"], "model": "mnasnet_a1"}, "has no mnasnet_a1, only"),
        ({"against": ["keras_applications"], "width": 0.5}, "at --width=1 only"),
        ({"against": ["timm"], "timm_python": "x", "num_experts": 3}, "with 3 experts, only"),
        ({"against": ["timm"], "timm_python": "x", "model": "mobilenet_v1"}, "with 8 experts"),
        ({"against": ["timm"]}, "--timm_python, an interpreter of its own: python3 -m venv"),
        ({"mode": "train", "form": "folded"}, "--form=folded .* --mode=infer"),
        ({"form": "frozen", "backend": "jax"}, "--form=frozen needs --backend=tensorflow"),
        ({"dynamic_batch": True, "backend": "jax"}, "needs --backend=tensorflow"),
        ({"threads": 10**6}, "--threads=1000000 is more than the"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        comparison(**given).check()


def test_who_is_compared():
    assert comparison().others() == ["static"]
    assert comparison(num_experts=0).others() == []
    assert comparison(against=["timm"]).others() == ["timm"]
    assert comparison(against=["keras_applications"]).others() == ["static", "keras_applications"]
    found = comparison(
        against=["static", "official_loop", "timm"], timm_python="x", form="frozen"
    ).contenders()
    forms = {
        name: each.arguments["task"]["form"] for name, each in found.items() if "m" not in name
    }
    assert forms == {"ours": "frozen", "static": "frozen", "official loop": "variables"}
    assert found["timm"].arguments["name"] == "tf_efficientnet_cc_b0_8e"
    assert found["timm"].python == "x"
    assert not any("condconv" in each for each in found["timm"].environment)


def benchmark(*arguments: str, limit: int = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/benchmark.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )


SMALL = ("--rounds=6", "--seconds=0", "--image_size=32", "--num_classes=10", "--batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "backend"), [("infer", "tensorflow"), ("train", "tensorflow"), ("train", "jax")]
)
def test_the_command_compares(mode, backend):
    loop = ["--against=official_loop"] if backend == "tensorflow" else []
    given = ("--model=mobilenet_v1", "--width=0.25", "--against=static", *loop)
    done = benchmark(f"--mode={mode}", f"--backend={backend}", *given, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert "measured 6 of 6 times" in done.stderr
    result = json.loads(done.stdout)
    names = ["ours", "static", "official loop", "official loop, our batch norm"]
    assert [row["contender"] for row in result["contenders"]] == names[: 2 + 2 * len(loop)]
    assert all(len(rates) == 6 and min(rates) > 0 for rates in result["rates"].values())
    assert all(row["peak_gb"] > 0.1 for row in result["contenders"])
    line = result["roofline"]
    assert line["moved"]["experts read"] == 4 * 8 * result["reports"]["ours"]["expert_weights"]
    assert line["bound"] == max(line["bytes_bound"], line["multiply_adds_ratio"])
    assert result["machine"].keys() >= {"processor", "cores", "python", "keras", backend}


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_the_command_compares_with_keras_applications_and_timm(experts):
    python = os.environ.get(TIMM)
    if not python:
        pytest.skip(f"{TIMM} names no interpreter with timm: timm was NOT compared with")
    given = ("--against=timm", f"--timm_python={python}", "--against=keras_applications")
    done = benchmark("--mode=train", f"--num_experts={experts}", *given, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "timm, channels_last" in done.stdout
    assert "its better layout: " in done.stdout
    assert ("static over keras.applications: " in done.stdout) == bool(experts)


@pytest.mark.slow
def test_the_command_refuses_in_one_line():
    for wrong, said in (
        ("--against=timm", "needs --timm_python"),
        ("--model=efficientnet", "--model=efficientnet: known are efficientnet_b0,"),
        ("--image_size=nothing", "image_size"),
    ):
        done = benchmark("--mode=infer", wrong)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
