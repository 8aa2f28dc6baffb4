"""One run in every format: each file scores and predicts what the run does; how commands end."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from condconv.engine import config, evaluation, loop
from condconv.engine.errors import UsageError
from condconv.tools import network_file
from condconv.tools.exports import export, trained_network
from condconv.tools.prediction import Classifier, of_run, predict
from data.recorded import as_of_imagenet, recorded

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.gin")
FLOAT = ("model.keras", "saved_model", "model.onnx", "model_float32.tflite")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> epath.Path:
    """A run, shorter than its config says but no worse, and evaluated."""
    workdir = epath.Path(tmp_path_factory.mktemp("of") / "run")
    ends = ("duration", "evaluate_every", "checkpoint_every")
    bindings = ["Experiment.ema_decay = 0.98", *(f"Experiment.{e} = '24 epochs'" for e in ends)]
    experiment = config.load([str(ROOT / "configs" / "digits_condconv.gin")], bindings)
    loop.train(experiment, workdir)
    assert evaluation.evaluate_run(experiment, workdir)["top1"] > 0.9
    return workdir


@pytest.fixture(scope="module")
def command(run) -> subprocess.CompletedProcess:
    """The export of the run into the folder ``exported`` beside it."""
    flags = [f"--format={name}" for name in export.FORMATS]
    flags += [f"--precision={name}" for name in export.PRECISIONS]
    flags += ["--calibration_images=400", "--json"]
    output = f"--output={run.parent / 'exported'}"
    done = call("scripts/export.py", f"--workdir={run}", *flags, output)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exported(run, command) -> pathlib.Path:
    return pathlib.Path(run.parent / "exported")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("image") / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(path)
    return path


def call(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_export_says_what_it_wrote(command, exported):
    rows = {row["file"]: row for row in json.loads(command.stdout)}
    assert list(rows) == [*FLOAT, "model_float16.tflite", "model_int8.tflite"]
    assert command.stderr.splitlines() == [f"writing {file}" for file in rows]
    card = (exported / "README.md").read_text()
    assert "| top1 | " in card
    assert "Experiment.duration" in card
    assert "400 images of digits, 'train'; compared on 360 of 'test'" in card
    assert "`whole.resize_method = 'bicubic'`" in card


def test_int8_agrees_with_a_trained_network(command):
    rows = {row["file"]: row for row in json.loads(command.stdout)}
    int8 = rows["model_int8.tflite"]
    assert int8["images"] == 360  # all that were held out
    assert int8["agreement"] >= 0.95
    assert int8["bytes"] < 2e6
    assert int8["bytes"] < 0.3 * rows["model_float32.tflite"]["bytes"]


def test_files_score_and_predict_what_the_run_does(run, exported, image, capfd):
    experiment = config.load([DIGITS])
    scored = json.loads((run / "eval.json").read_text())
    named = predicted(of_run(config.load_run(run), run), image)
    for name in FLOAT:
        capfd.readouterr()
        network = network_file.open_file(str(exported / name))
        found = evaluation.evaluate_file(network, experiment)
        evaluate = recorded(network.preprocessing, network.input_shape[1]).evaluate
        classifier = Classifier(name, network, network.input_shape, evaluate, network.labels)
        assert predicted(classifier, image) == pytest.approx(named, abs=1e-4)
        assert silent(capfd.readouterr().err), name
        assert found.keys() == scored.keys()
        assert found["loss"] == pytest.approx(scored["loss"], rel=1e-4), name
        same = found.keys() - {"loss", "step", "weights"}
        assert {key: found[key] for key in same} == {key: scored[key] for key in same}
        assert (found["step"], found["weights"]) == (None, "file")
    smaller = config.load([DIGITS], ["whole.image_size = 16"])
    with pytest.raises(UsageError, match="takes images of 32×32×3 and digits gives 16×16×3"):
        evaluation.evaluate_file(network, smaller)


def predicted(classifier: Classifier, image: pathlib.Path) -> dict[str, float]:
    (found,) = predict(classifier, [epath.Path(image)])
    return dict(zip(found.names, found.probabilities, strict=True))


def silent(stderr: str) -> bool:
    """Returns whether nothing was said, but for LiteRT's lines on how it computes."""
    return all(line.startswith("INFO: ") for line in stderr.splitlines())


def test_commands_say_it_and_nothing_else(run, exported, image):
    source = f"--source={exported / 'model.onnx'}"
    found = [call("scripts/predict.py", flag, str(image), "--json") for flag in
             (f"--workdir={run}", source)]  # fmt: skip
    found.append(call("eval.py", source, f"--gin_file={DIGITS}"))
    assert [(done.returncode, done.stderr) for done in found] == [(0, "")] * 3
    of_run, of_file = (
        {row["name"]: row["probability"] for row in json.loads(done.stdout)} for done in found[:2]
    )
    assert of_file == pytest.approx(of_run, abs=1e-4)
    scored = json.loads((run / "eval.json").read_text())
    assert json.loads(found[2].stdout)["top1"] == scored["top1"]


def test_what_was_exported_is_exported_again_as_it_is(exported, tmp_path, capfd):
    network = trained_network.of_file(str(exported / "model.keras"), as_of_imagenet)
    capfd.readouterr()
    (row,) = export.export(network, ["onnx"], tmp_path / "again", fold=False)
    assert capfd.readouterr().err == "writing model.onnx\n"
    assert row["difference"] < 1e-4


def test_wrong_calls_end_with_code_2_and_one_line(exported):
    source, digits = f"--source={exported / 'model.keras'}", f"--gin_file={DIGITS}"
    for wrong in (
        ("scripts/export.py",),
        ("scripts/export.py", source),
        ("scripts/export.py", source, "--format=onnx", f"--output={exported}"),
        ("eval.py",),
        ("eval.py", source),
        ("eval.py", f"--source={exported.parent / 'run'}", digits),
    ):
        done = call(*wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), wrong
