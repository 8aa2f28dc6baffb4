"""What evaluation keeps of each example, and evaluation of networks in files."""

import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from tiny_runs import experiment, judged, network, stripes

from condconv.engine import checkpoints, config, evaluation
from condconv.engine.errors import RunError, UsageError
from condconv.engine.tasks.classification import classification
from condconv.tools import network_file
from condconv.tools.exports.runtimes import Opened
from condconv.tools.network_file import NetworkFile
from data.pipeline import Pipeline
from data.preprocess import whole
from data.source import Source, indexed


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    """Of a run that has not begun to learn."""
    folder = epath.Path(tmp_path) / "run"
    variables = checkpoints.named_variables(network(3))
    state = {f"model/{name}": variable.numpy() for name, variable in variables.items()}
    checkpoints.Checkpoints(folder).save(1, state, checkpoints.Notes())
    return folder


def kept(workdir: epath.Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "predictions.npz") as arrays:
        return dict(arrays)


def test_predictions_are_kept_and_the_scores_are_their_means(workdir):
    result = evaluation.evaluate_run(experiment(), workdir)
    assert json.loads((workdir / "eval.json").read_text()) == result
    found = kept(workdir)
    assert {name: column.dtype.name for name, column in found.items()} == {
        "index": "int64", "label": "int64", "predicted": "int64",
        "correct": "bool", "rank": "int64", "loss": "float32",
    }  # fmt: skip
    assert found["index"].tolist() == list(range(23))
    assert found["label"].tolist() == [i % 3 for i in range(23)]
    assert found["correct"].tolist() == (found["predicted"] == found["label"]).tolist()
    assert found["correct"].mean() == result["top1"]
    assert (found["rank"] < 5).mean() == result["top5"]
    assert found["loss"].mean(dtype=np.float64) == result["loss"]


def test_a_row_for_each_example_that_counts():
    scored = np.array([True, False, True])
    rank, loss = np.array([0, 1, 7]), np.array([0.5, 9.0, 2.5], np.float32)
    columns = {"label": np.eye(3, dtype=bool), "answer": np.array([2, 0, -1])}
    columns |= {"rank": rank, "loss": loss, "scored": scored}
    task = classification(stripes())
    arrays, summary = task.predictions(columns), task.summary(columns)
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["label"].tolist() == [[True, False, False], [False, False, True]]
    assert arrays["correct"].mean() == summary["top1"] == 0.5
    assert arrays["loss"].mean() == summary["loss"] == 1.5


def test_several_right_classes_are_kept_as_such():
    images = tf.stack([tf.io.encode_png(np.full((6, 6, 3), v, np.uint8)) for v in (0, 9, 99)])
    right = tf.constant([[True, True, False], [False] * 3, [False, False, True]])
    split = indexed(3, lambda i: {"image": images[i], "label": right[i], "id": "an image"})
    data = Pipeline(Source("several", 3, {"test": split}), whole(6))
    arrays = classification(data).predictions(judged(network(3), data, 2))
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["label"].tolist() == [[True, True, False], [False, False, True]]
    hits = arrays["label"][range(2), arrays["predicted"]]
    assert hits.tolist() == arrays["correct"].tolist()


@pytest.mark.slow
def test_the_index_finds_the_example_whatever_the_batch():
    model, task = network(3), classification(stripes())
    one, five = (task.predictions(judged(model, stripes(), size)) for size in (1, 5))
    for name in ("index", "label", "predicted", "rank"):
        assert one[name].tolist() == five[name].tolist()
    np.testing.assert_allclose(one["loss"], five["loss"], rtol=1e-5)


def test_a_file_scores_what_its_network_does(tmp_path):
    model = network(3)
    model.compile("adam", "mse")  # as after somebody's `fit`
    model.save(tmp_path / "model.keras")
    expected = classification(stripes()).summary(judged(model, stripes(), 8))
    found = network_file.open_file(str(tmp_path / "model.keras"))
    result = evaluation.evaluate_file(found, experiment(eval_batch_size=5))
    assert result == {
        **expected,
        "loss": pytest.approx(expected["loss"]),
        **evaluation.cost_of(model),
        "dataset": "stripes",
        "split": "test",
        "step": None,
        "weights": "file",
    }


def fake(shape: tuple[int | None, ...], classes: int, run=None, **metadata) -> NetworkFile:
    return NetworkFile("x.onnx", Opened(run, shape, (None, classes)), metadata)


def test_images_and_classes_have_to_be_those_of_the_file():
    for shape, classes, said in (
        ((None, 8, 8, 3), 3, "x.onnx takes images of 8×8×3 and stripes gives 6×6×3"),
        ((None, None, None, 3), 4, "tells 4 classes apart and stripes has 3"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluation.evaluate_file(fake(shape, classes), experiment())


def test_what_a_runtime_raises_is_one_line():
    def fails(images):
        raise ValueError("first\nsecond")

    with pytest.raises(RunError, match=r"^--source=x.onnx cannot be run: first$"):
        evaluation.evaluate_file(fake((None, 6, 6, 3), 3, fails), experiment())


def test_a_file_tells_its_cost_and_labels_or_nothing():
    cost = {"parameters": 7, "multiply_adds": 8, "macs": 9}
    told = fake((None, 6, 6, 3), 2, **cost, labels=["a", "b"], preprocessing=["x = 1"])
    assert (told.cost(6), told.labels, told.preprocessing) == (cost, ["a", "b"], ["x = 1"])
    untold = fake((None, 6, 6, 3), 3, labels=["a", "b"])
    assert (untold.cost(6), untold.labels) == (dict.fromkeys(cost), [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.onnx", "there is no such file or folder$"),
        ("text.txt", r"is no \.keras, \.onnx, \.tflite file"),
        ("gs://bucket/model.onnx", "is not local"),
        (".", r"is no \.keras, \.onnx, \.tflite file, nor the folder of a SavedModel"),
    ],
)
def test_what_is_no_network_is_a_wrong_call(name, reason, tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UsageError, match=reason):
        network_file.open_file(name if "://" in name else str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".onnx", ".tflite", ".keras"])
def test_a_file_that_holds_something_else_is_told_in_one_line(suffix, tmp_path):
    (tmp_path / f"x{suffix}").write_text("something else")
    with pytest.raises(RunError, match=rf"x\{suffix} cannot be loaded: [^\n]+$"):
        network_file.open_file(str(tmp_path / f"x{suffix}"))


def test_the_data_alone_is_enough_of_a_config(tmp_path):
    bindings = ("import data.configurables", "Experiment.data = @pipeline",
                "Experiment.eval_split = 'test'", "pipeline.source = @digits",
                "pipeline.preprocessing = @whole")  # fmt: skip
    (tmp_path / "data.gin").write_text("\n".join(bindings))
    (tmp_path / "less.gin").write_text(bindings[0])
    loaded = config.load([str(tmp_path / "data.gin")], **evaluation.WITHOUT_TRAINING)
    assert (loaded.eval_split, loaded.model) == ("test", None)
    with pytest.raises(UsageError, match=r"leaves out what an experiment needs: Experiment\.data$"):
        config.load([str(tmp_path / "less.gin")], **evaluation.WITHOUT_TRAINING)


def test_metadata_lies_in_a_file_or_beside_it(tmp_path):
    about = {"labels": ["a", "b"]}
    with zipfile.ZipFile(tmp_path / "x.tflite", "w") as archive:
        archive.writestr("metadata.json", json.dumps(about))
    (tmp_path / "saved" / "assets.extra").mkdir(parents=True)
    (tmp_path / "saved" / "assets.extra" / "metadata.json").write_text(json.dumps(about))
    described = about | {"sha256": {"y.keras": "…", "z/saved_model.pb": "…"}}
    (tmp_path / "metadata.json").write_text(json.dumps(described))
    opened, telling = Opened(None, (), ()), Opened(None, (), (), texts={"labels": '["a", "b"]'})
    for name, found in (("x.tflite", opened), ("saved", opened), ("x.onnx", telling)):
        assert network_file._metadata(str(tmp_path / name), found) == about
    assert network_file._metadata(str(tmp_path / "y.keras"), opened) == described
    assert network_file._metadata(str(tmp_path / "another.keras"), opened) == {}
    (tmp_path / "metadata.json").write_text("[")
    with pytest.raises(RunError, match="y.keras says what cannot be read: Expecting value"):
        network_file._metadata(str(tmp_path / "y.keras"), opened)
