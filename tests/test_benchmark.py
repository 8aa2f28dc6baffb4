"""The benchmark of networks: that it compares what it says, and that no process is left behind."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from on_jax import HASTY
from tiny_network import tiny

from condconv.engine import config
from condconv.engine.errors import RunError, UsageError
from condconv.normalization import BatchNormalization
from condconv.tools.benchmarks import comparison, networks
from condconv.tools.benchmarks.alternation import Contender, alternate, interval
from condconv.tools.benchmarks.comparison import CHECKOUTS, Comparison
from condconv.tools.benchmarks.contenders import checkout, keras_network, official_loop, our_network
from condconv.tools.benchmarks.contenders.workload import Workload
from condconv.tools.benchmarks.roofline import roofline, traffic

ROOT = pathlib.Path(__file__).parents[1]
TESTS = str(ROOT / "tests")
TIMM = "CONDCONV_TIMM_PYTHON"


def fake(function: str, **arguments) -> Contender:
    return Contender(f"fake_contenders:{function}", arguments, environment={"PYTHONPATH": TESTS})


WORK = Workload(mode="infer", batch_size=3, image_size=16, num_classes=5, seconds=0.0)


def logits_and_gradients(model: keras.Model) -> tuple[np.ndarray, list[np.ndarray]]:
    images, labels = WORK.images().astype("float32"), WORK.labels()
    with tf.GradientTape() as tape:
        loss = keras_network.loss_of(labels, model(images, training=True))
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
        keras_network.inference_step(model, dataclasses.replace(WORK, dynamic_batch=True))()


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
    expected = model(WORK.images().astype("float32"), training=False).numpy()
    found = keras_network.inference_step(model, dataclasses.replace(WORK, **changed))()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_step_of_training_reports_its_loss_and_changes_all_weights():
    model = tiny()
    squeeze = model.get_layer("block2_se_reduce").bias
    squeeze.assign(np.ones(squeeze.shape))  # or ReLU may let nothing of these two units through
    before = [weight.numpy() for weight in model.weights]
    logits = model(WORK.images().astype("float32"), training=True).numpy()
    model.set_weights(before)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    chosen = exponentials[np.arange(3), WORK.labels()] / exponentials.sum(axis=1)
    loss = keras_network.training_step(model, dataclasses.replace(WORK, mode="train"))()
    assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    still = [w.path for w, old in zip(model.weights, before, strict=True) if np.all(w == old)]
    assert not still


def test_dropout_and_stochastic_depth_are_turned_off():
    model = tiny(dropout=0.5, survival=0.5)
    our_network.without_noise(model)
    images = WORK.images().astype("float32")
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
    log, said = tmp_path / "log", []
    given = {name: fake("good", log=str(log), name=name) for name in "ab"}
    measured = alternate(given, 3, said.append)
    assert log.read_text().split() == list("ababbaab")
    assert said[:3] == ["starting a", "starting b", "measured 1 of 3 times"]
    assert [len(each.rates["steps"]) for each in measured.values()] == [3, 3]
    report = measured["a"].report
    assert report["counted"] == [3]
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
    assert report["path"] == [str(ROOT), str(ROOT / "condconv/tools/benchmarks")]
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


def test_neither_a_contender_nor_what_it_started_outlives_the_benchmark(tmp_path):
    how = {name: signal.Signals[name] for name in ("SIGKILL", "SIGTERM", "SIGINT")}
    code = f"""
import os
from condconv.tools.benchmarks.alternation import Contender, alternate
for name in {list(how)}:
    if not os.fork():
        alternate({{"a": {fake("hangs", pid_file=f"{tmp_path}/PLACE")!r}}}, 1)
""".replace("PLACE'", "' + name")
    environment = os.environ | {"KERAS_BACKEND": "numpy"}  # which is imported sooner
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    for name, sent in how.items():
        pids = tmp_path / name
        wait_until(lambda pids=pids: pids.exists() and pids.read_text().endswith("\n"))
        parent, *others = pids.read_text().split()
        os.kill(int(parent), sent)
        for pid in others:
            wait_until(lambda pid=pid: is_gone(pid))


def is_gone(pid: str) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return " Z " in stat.read_text()
    except OSError:
        return True


def test_a_contender_may_have_a_clock_of_its_own():
    assert alternate({"a": fake("timed_by_itself")}, 2)["a"].rates == {"steps": [2.0, 2.0]}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked(**given) -> Comparison:
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
        ({"against": ["engine"]}, "needs --mode=train and --backend=tensorflow"),
        ({"against": ["engine"], "mode": "train", "backend": "jax"}, "--backend=tensorflow"),
        ({"against": ["everything"]}, "--against=everything: known are static, engine, off"),
        ({"form": "solid"}, "--form=solid: known are variables, folded, frozen, folded_frozen"),
        ({"against_checkout": "no/such"}, "no/such is no checkout .*: it has no train.py"),
        ({"against_checkout": str(ROOT), "against": ["static"]}, "leaves no room for --against"),
        ({"against": ["timm"], "timm_python": "x", "num_experts": 3}, "with 3 experts"),
        (
            {"against": ["timm"], "timm_name": "resnet50"},
            "--timm_python, an interpreter of its own: python3 -m venv",
        ),
        ({"mode": "train", "form": "folded"}, "--form=folded .* --mode=infer"),
        ({"form": "frozen", "backend": "jax"}, "--form=frozen needs --backend=tensorflow"),
        ({"dynamic_batch": True, "backend": "jax"}, "needs --backend=tensorflow"),
        ({"threads": 10**6}, "--threads=1000000 is more than the"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        asked(**given).check()


def test_who_is_compared():
    assert asked().others() == ["static"]
    assert asked(mode="train").others() == ["static", "engine"]
    assert asked(mode="train", backend="jax").others() == ["static"]
    assert asked(num_experts=0).others() == []
    assert asked(against=["timm"]).others() == ["timm"]
    assert asked(against=["keras_applications"]).others() == ["static", "keras_applications"]
    timm = {"timm_name": "tf_efficientnet_cc_b0_8e", "timm_python": "x"}
    found = asked(against=["static", "official_loop", "timm"], form="frozen", **timm)
    found = found.contenders("")
    forms = {
        name: each.arguments["workload"]["form"] for name, each in found.items() if "m" not in name
    }
    assert forms == {"ours": "frozen", "static": "frozen", "official loop": "variables"}
    assert found["timm"].arguments["name"] == "tf_efficientnet_cc_b0_8e"
    assert found["timm"].python == "x"
    assert not any("condconv" in each for each in found["timm"].environment)


SMALL = {"batch_size": 2, "image_size": 16, "num_classes": 5, "num_experts": 3, "seconds": 0}
TINY = {**SMALL, "create": "tiny_network:tiny", "model": "tiny"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"mode": "infer", "against": ["static", "official_loop"]},
            ["ours", "static", "official loop", "official loop, our batch norm"],
        ),
        ({"mode": "train"}, ["ours", "static", "engine"]),
        ({"mode": "train", "backend": "jax"}, ["ours", "static"]),
    ],
    ids=str,
)
def test_networks_are_compared(given, names, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.setenv("XLA_FLAGS", HASTY)
    said = []
    result = networks.measure(Comparison(**TINY, **given), 6, said.append)
    assert said[0] == f"Python: {sys.executable}"
    assert said[-1] == "measured 6 of 6 times"
    assert json.loads(json.dumps(result))["asked"]["model"] == "tiny"
    assert [row["contender"] for row in result["contenders"]] == names
    assert all(len(rates) == 6 and min(rates) > 0 for rates in result["rates"].values())
    assert all(row["peak_gb"] > 0.1 for row in result["contenders"])
    told = any(line.startswith("engine over ours: ") for line in result["conclusions"])
    assert told == ("engine" in names)
    line = result["roofline"]
    assert line["moved"]["experts read"] == 4 * 3 * result["reports"]["ours"]["expert_weights"]
    assert line["bound"] == max(line["bytes_bound"], line["multiply_adds_ratio"])
    backend = given.get("backend", "tensorflow")
    assert result["machine"].keys() >= {"processor", "cores", "python", "keras", backend}


FAKE_TRAIN = """
import json, os, pathlib, sys, time
flags = dict(argument.split("=") for argument in sys.argv[1:])
here, run = pathlib.Path(__file__).parent, pathlib.Path(flags["--workdir"])
(here / "train.gin").write_text(pathlib.Path(flags["--gin_file"]).read_text())
if (here / "refuse").exists():
    sys.exit(print("train.py: something is wrong") or 2)
with (here / "pids").open("a") as pids:
    print(os.getpid(), file=pids)
run.mkdir()
began = time.monotonic()
with (run / "metrics.jsonl").open("w", buffering=1) as lines:
    print(json.dumps({"step": 1}), file=lines)  # which was compiled
    while True:
        time.sleep(0.02)
        took, began = time.monotonic() - began, time.monotonic()
        rate = RATE if took < 0.1 else 2 / took  # that it was stopped is seen
        print(json.dumps({"images_per_second": rate, "more": 1}), file=lines)
"""


def fake_checkout(folder: pathlib.Path, rate: float) -> pathlib.Path:
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN.replace("RATE", str(rate)))
    return folder


def test_training_is_compared_with_another_checkouts(tmp_path, monkeypatch):
    this, other = fake_checkout(tmp_path / "this", 100), fake_checkout(tmp_path / "other", 50)
    monkeypatch.setattr(comparison, "ROOT", str(this))
    given = {**TINY, "mode": "train", "against_checkout": str(other), "precision": "mixed_bfloat16"}
    result = networks.measure(Comparison(**given), 6, lambda progress: None)
    rates = result["rates"]
    assert list(rates) == list(CHECKOUTS)
    medians = [np.median(each) for each in rates.values()]
    assert medians == pytest.approx([100, 100, 50], rel=1e-9)
    assert result["conclusions"][0].startswith("this checkout over this checkout again: 1.000, 95 ")
    assert result["conclusions"][1].startswith("this checkout over other checkout: 0.500, 95 %: ")
    pids = [pid for folder in (this, other) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 3
    assert all(map(is_gone, pids))
    config = (other / "train.gin").read_text().splitlines()
    assert config == (this / "train.gin").read_text().splitlines()
    wanted = {"Experiment.batch_size = 2", "Experiment.precision = 'mixed_bfloat16'"}
    assert {*wanted, "tiny.num_experts = 3", "crops.image_size = 16"} <= set(config)
    (this / "refuse").touch()
    with pytest.raises(UsageError, match="exit code 2: train.py: something is wrong$"):
        networks.measure(Comparison(**given), 1, lambda progress: None)


def test_the_config_of_a_training_that_is_compared_is_one_of_ours(tmp_path):
    arguments = {"num_experts": 2, "width": 0.25, "image_size": 32}
    workload = vars(dataclasses.replace(WORK, mode="train", image_size=32))
    text = checkout.config_of("mobilenet_v1", arguments, workload)
    (tmp_path / "train.gin").write_text(text)
    experiment = config.load([str(tmp_path / "train.gin")])
    assert (experiment.batch_size, experiment.log_every) == (3, "1 steps")
    assert experiment.model(num_classes=5).input_shape == (None, 32, 32, 3)


def benchmark(*arguments: str, limit: int = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/benchmark.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )


SMALL_FLAGS = ("--rounds=6", "--seconds=0", "--image_size=32", "--num_classes=10", "--batch_size=2")


@pytest.mark.slow
def test_the_command_compares_with_the_network_of_another_checkout(tmp_path):
    other = fake_checkout(tmp_path / "other", 1)
    (other / "models.py").write_text("""
import keras, pathlib
def create_model(**arguments):
    with (pathlib.Path(__file__).parent / "made").open("a") as made:
        print(sorted(arguments.items()), file=made)
    return keras.Sequential([keras.Input((32, 32, 3)), keras.layers.GlobalAveragePooling2D()])
""")
    given = ("--model=mobilenet_v1", "--width=0.25", f"--against_checkout={other}")
    done = benchmark("--mode=infer", *given, *SMALL_FLAGS)
    assert done.returncode == 0, done.stderr
    assert f"Python: {sys.executable}" in done.stderr
    arguments = {"image_size": 32, "name": "mobilenet_v1", "num_classes": 10, "num_experts": 8}
    made = (other / "made").read_text()
    assert made == f"{[*arguments.items(), ('width', 0.25)]}\n"
    table = {line.split("  ")[0] for line in done.stdout.splitlines()}
    assert {"contender", *CHECKOUTS, f"other checkout: {other}"} <= table


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_the_command_compares_with_keras_applications_and_timm(experts):
    python = os.environ.get(TIMM)
    if not python:
        pytest.skip(f"{TIMM} names no interpreter with timm: timm was NOT compared with")
    given = ("--against=timm", f"--timm_python={python}", "--against=keras_applications")
    done = benchmark("--mode=train", f"--num_experts={experts}", *given, *SMALL_FLAGS)
    assert done.returncode == 0, done.stderr
    assert "timm, channels_last" in done.stdout
    assert "its better layout: " in done.stdout
    assert ("static over keras.applications: " in done.stdout) == bool(experts)


@pytest.mark.slow
def test_the_command_refuses_in_one_line():
    for wrong, said in (
        (("--against=timm", "--num_experts=3"), "timm has no efficientnet_b0 with 3 experts; it"),
        (("--model=efficientnet",), "--model=efficientnet: known are efficientnet_b0,"),
        (("--image_size=nothing",), "image_size"),
    ):
        done = benchmark("--mode=infer", *wrong)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
