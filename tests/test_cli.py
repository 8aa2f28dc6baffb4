"""The commands, as a user runs them: another process, a real config, exit codes, a quiet screen."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import zipfile

import pytest

from condconv.tools.benchmarks import comparison
from condconv.tools.exports import export
from scripts import command

ROOT = pathlib.Path(__file__).parents[1]
CONDCONV = "--gin_file=configs/digits_condconv.gin"
COMMANDS = [
    "train.py",
    "eval.py",
    *(
        f"scripts/{p.name}"
        for p in (ROOT / "scripts").glob("*.py")
        if p.name not in ("__init__.py", "command.py")
    ),
]
HEAVY = {"tensorflow", "keras", "numpy", "gin", "etils", "sklearn", "condconv", "models", "data"}
SHORT = [
    "--gin_param=Experiment.duration = '6 steps'",
    "--gin_param=Experiment.evaluate_every = '3 steps'",
    "--gin_param=mobilenet_v1.width = 0.1",
]


def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def answered_at_once(*arguments: str) -> subprocess.CompletedProcess:
    """Calls a command, which may import nothing that takes its time."""
    began = time.monotonic()
    done = call("-X", "importtime", *arguments)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "absl.flags" in imported
    assert not {name.split(".")[0] for name in imported} & HEAVY
    assert time.monotonic() - began < 30  # what must hold is the line above
    done.stderr = re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_nothing_heavy(command):
    done = answered_at_once(command, "--help")
    assert done.returncode == 0
    assert "flags:" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_call_without_flags_is_answered_at_once(command):
    if command in ("scripts/list_models.py", "scripts/benchmark.py"):
        assert_refused(answered_at_once(command, "x"), 2, "takes flags only, not 'x'; see --help")
    else:
        assert_refused(answered_at_once(command), 2, "needs ", "; see --help")


WRONG = [
    ("train.py --workdir=run --gin_file=configs/digit.gin",
     "there is no config file 'configs/digit.gin'; did you mean 'digits.gin'?"),
    ("train.py --workdir=run --gin_file=configs --dry_run", "there is no config file 'configs'"),
    ("eval.py --source=README.md --gin_file=nowhere/x.gin", "no config file 'nowhere/x.gin'"),
    ("eval.py --workdir=configs", "configs is not the folder of a run: it has no config.gin"),
    ("eval.py --source=x.onnx --gin_file=x.gin", "--source=x.onnx: there is no such file or fol"),
    ("scripts/benchmark.py --gin_file=x.gin", "there is no config file 'x.gin'"),
    ("scripts/compare.py nowhere", "nowhere: there is no such file or folder"),
    ("scripts/compare.py configs --output=configs", "--output=configs is a folder: name a file"),
    ("scripts/cost.py --source=none.keras", "--source=none.keras is no .keras file: name one"),
    ("scripts/cost.py --source=README.md", "--source=README.md is no .keras file: name one"),
    ("scripts/export.py --source=none.keras --format=onnx --output=x", "is no .keras file"),
    ("scripts/export.py --workdir=nowhere --format=keras --output=x", "not the folder of a run"),
    ("scripts/export.py --format=onx", "value should be one of <keras|saved_model|onnx|litert>"),
    ("scripts/import_checkpoint.py --model=resnet50 --source=x --output=README.md/x.keras",
     "the folder of --output=ROOT/README.md cannot be written to (File exists): name another"),
    ("scripts/predict.py nowhere.jpg --source=README.md", "nowhere.jpg: there is no such file"),
    ("scripts/predict.py README.md --source=README.md --png=x.jpg", "--png=x.jpg has to end in .p"),
    ("scripts/report.py configs --output=tests", "--output=tests is a folder: name a file"),
    ("scripts/reproduce.py --table=imagenet --dataset=digits", "=digits needs --workdir=FOLDER"),
    ("scripts/show_batch.py --gin_file=x.gin", "there is no config file 'x.gin'"),
    ("scripts/show_batch.py --gin_file=configs/digits.gin --output=batch.jpg",
     "--output=batch.jpg has to end in .png"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_cannot_work_is_refused_at_once(wrong, said):
    assert_refused(answered_at_once(*wrong.split()), 2, said.replace("ROOT", str(ROOT)))


def test_an_export_goes_to_a_new_folder_here(tmp_path):
    (tmp_path / "model.keras").write_text("")
    wanted = ["scripts/export.py", f"--source={tmp_path}/model.keras", "--format=keras"]
    for output, said in (
        (tmp_path, f"--output={tmp_path} exists: name a new folder, or remove it"),
        (tmp_path / "model.keras", "model.keras exists: name a new folder, or remove it"),
        ("gs://bucket/out", "--output=gs://bucket/out is not local: name a folder here"),
        (tmp_path / "model.keras" / "out", "cannot be written to (File exists): name another"),
    ):
        assert_refused(answered_at_once(*wanted, f"--output={output}"), 2, said)
    (tmp_path / "new").mkdir()
    command.check_new_folder("--output", str(tmp_path / "new"))
    command.check_new_folder("--output", str(tmp_path / "newer" / "out"))
    assert os.listdir(tmp_path / "newer") == []


def test_what_is_not_local_is_left_to_the_engine():
    command.check_configs(["gs://bucket/x.gin"])
    command.check_run("gs://bucket/run")
    command.check_there(["gs://bucket/x.onnx", None], "--source=")
    command.check_keras_file("gs://bucket/x.keras")
    command.check_output("--output", "gs://bucket/x.png", ".png")


def test_flags_offer_what_the_tools_have():
    text = (
        call("scripts/benchmark.py", "--help").stdout + call("scripts/export.py", "--help").stdout
    )
    offered = {frozenset(choices.split("|")) for choices in re.findall(r"<([\w|]+)>", text)}
    for known in (
        *(comparison.AGAINST, comparison.BACKENDS, comparison.FORMS, comparison.PRECISIONS),
        *(export.FORMATS, export.PRECISIONS),
    ):
        assert frozenset(known) in offered


def assert_refused(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for text in said:
        assert text in done.stderr


def test_an_unknown_flag_is_a_wrong_call():
    assert_refused(call("train.py", "--gin_fiel=x"), 2, "gin_fiel")


def test_a_wrong_binding_is_a_wrong_call(tmp_path):
    done = call("train.py", CONDCONV, f"--workdir={tmp_path}/run", "--gin_param=EPOCHS = 3")
    assert_refused(done, 2, "train.py: nothing uses %EPOCHS")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_replicas_cannot_share_is_a_wrong_call(tmp_path):
    done = call(
        "train.py",
        CONDCONV,
        f"--workdir={tmp_path}/run",
        "--gin_param=Experiment.devices = 'cpu:2'",
        "--gin_param=Experiment.batch_size = 63",
    )
    assert_refused(done, 2, "batch_size=63 cannot be divided among 2 replicas")


@pytest.mark.slow
def test_another_backend_is_a_wrong_call(tmp_path):
    pytest.importorskip("jax")
    done = call("train.py", CONDCONV, f"--workdir={tmp_path}/run", KERAS_BACKEND="jax")
    assert_refused(done, 2, "experiments run on Keras' TensorFlow backend, not on jax")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_commands_of_the_models_alone_run_on_any_backend_that_is_there():
    pytest.importorskip("jax")
    flags = ["scripts/cost.py", "--model=mobilenet_v1", "--width=0.25"]
    done = call(*flags, KERAS_BACKEND="jax")
    assert (done.returncode, done.stdout) == (0, call(*flags).stdout)
    assert_refused(call(*flags, KERAS_BACKEND="foo"), 2, "KERAS_BACKEND=foo cannot be used")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = call("train.py", CONDCONV, f"--workdir={folder}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for line in done.stderr.splitlines():  # progress, and nothing of TensorFlow's
        assert re.match(r"step \d/6  ", line), done.stderr
    assert json.loads((folder / "cost.json").read_text())["rule"] == "M"
    assert "<svg" in (folder / "report.html").read_text()
    return folder


def test_a_trained_network_is_evaluated_to_one_json_object(workdir):
    done = call("eval.py", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {
        "top1", "top5", "loss", "images", "parameters", "multiply_adds", "macs",
        "dataset", "split", "step", "weights",
    }  # fmt: skip
    assert (result["images"], result["step"], result["dataset"]) == (360, 6, "digits")
    assert json.loads((workdir / "eval.json").read_text()) == result
    assert call("eval.py", f"--workdir={workdir}").stdout == done.stdout


def test_another_experiment_in_the_same_workdir_is_refused(workdir):
    done = call(
        "train.py",
        CONDCONV,
        f"--workdir={workdir}",
        *SHORT,
        "--gin_param=shift_and_rotate.max_shift=0.2",
    )
    assert_refused(done, 2, "shift_and_rotate.max_shift: 0.1 there, 0.2 here")


def test_a_run_that_is_done_already_gets_its_cost_and_its_report(workdir):
    for name in ("cost.json", "report.html"):
        (workdir / name).rename(workdir / f"{name}.before")
    done = call("train.py", CONDCONV, f"--workdir={workdir}", *SHORT)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{workdir} is already trained to step 6\n"
    assert (workdir / "cost.json").read_text() == (workdir / "cost.json.before").read_text()
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_two_replicas_train_and_evaluate_what_one_does(tmp_path):
    mirrored = [CONDCONV, *SHORT, "--gin_param=Experiment.devices = 'cpu:2'"]
    done = call("train.py", *mirrored, f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    results = [
        json.loads(call("eval.py", f"--workdir={tmp_path}/run", f"--gin_param={binding}").stdout)
        for binding in ("Experiment.devices = 'cpu:2'", "Experiment.devices = 'auto'")
    ]
    assert results[0]["images"] == 360
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)


def test_runs_are_compared_in_a_table_and_a_plot(workdir, tmp_path):
    call("eval.py", f"--workdir={workdir}")
    done = call("scripts/compare.py", str(workdir), f"--output={tmp_path}/accuracy.png")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^run +parameters +multiply_adds +top1", done.stdout)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(call("scripts/compare.py", str(tmp_path)), 2, "has no eval.json")


def test_costs_are_printed_by_layer():
    flags = ["--model=mobilenet_v1", "--num_experts=8", "--width=0.25"]
    table = call("scripts/cost.py", *flags)
    assert table.returncode == 0, table.stderr
    assert re.search(r"layer +parameters +static +mixing +routing", table.stdout)
    assert "total, rule M" in table.stdout
    counted = json.loads(call("scripts/cost.py", *flags, "--json").stdout)
    assert counted["multiply_adds"] == sum(counted[k] for k in ("static", "mixing", "routing"))
    assert sum(row["parameters"] for row in counted["rows"]) == counted["parameters"]
    assert_refused(call("scripts/cost.py", "--model=mobilnet_v1"), 2, "did you mean 'mobilenet_v1'")
    done = call("scripts/cost.py", "--model=mobilenet_v1", "--image_size=0")  # absl's, so at once
    assert_refused(done, 2, "--image_size=0: 0 is not a positive integer")


@pytest.mark.slow
def test_a_file_that_holds_no_model_is_a_wrong_call(tmp_path):
    (tmp_path / "a.keras").write_text("garbage")
    with zipfile.ZipFile(tmp_path / "b.keras", "w") as file:
        file.writestr("metadata.json", "{}")
    for path in (tmp_path / "a.keras", tmp_path / "b.keras"):
        assert_refused(call("scripts/cost.py", f"--source={path}"), 1, f"{path} cannot be loaded: ")


@pytest.mark.slow
def test_models_are_listed_with_the_papers_numbers():
    rows = json.loads(call("scripts/list_models.py", "--json").stdout)
    assert len(rows) == 13
    for row in rows:
        printed, counted = row["paper_multiply_adds"], row["multiply_adds"]
        assert printed is None or abs(counted - printed) < 10**6
    assert "efficientnet_b0_depth" in call("scripts/list_models.py").stdout


def test_a_batch_is_drawn_before_and_after_augmentation(tmp_path):
    done = call(
        "scripts/show_batch.py", "--gin_file=configs/digits.gin", f"--output={tmp_path}/b.png"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/b.png"
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_input_is_measured_stage_by_stage():
    done = call("scripts/benchmark.py", "--mode=input", "--rounds=1", "--batch_size=4", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stages = [row["stage"] for row in result["stages"]]
    assert stages == ["read", "decode and crop", "resize and flip", "batch"]
    assert result["compared"][0]["over_pil"] == 1.0
    assert all(row["images_per_second"] > 0 for row in result["compared"] + result["stages"])
    assert "cores like this one" in result["conclusions"][1]
