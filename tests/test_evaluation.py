"""What evaluation keeps of each example, and evaluation of networks in files."""

import json

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from test_training import experiment, network, stripes

from condconv.engine import checkpoints, evaluation
from condconv.engine.evaluation import Predictions
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
    predictions = Predictions(np.eye(3, dtype=bool), np.array([2, 0, -1]), rank, loss, scored)
    arrays, summary = predictions.arrays(), predictions.summary(10)
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["label"].tolist() == [[True, False, False], [False, False, True]]
    assert arrays["correct"].mean() == summary["top1"] == 0.5
    assert arrays["loss"].mean() == summary["loss"] == 1.5


def test_several_right_classes_are_kept_as_such():
    images = tf.stack([tf.io.encode_png(np.full((6, 6, 3), v, np.uint8)) for v in (0, 9, 99)])
    right = tf.constant([[True, True, False], [False] * 3, [False, False, True]])
    split = indexed(3, lambda i: {"image": images[i], "label": right[i], "id": "an image"})
    data = Pipeline(Source("several", 3, {"test": split}), whole(6))
    evaluator = evaluation.Evaluator(network(3), data, 2, tf.distribute.get_strategy())
    arrays = evaluator("test").arrays()
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["label"].tolist() == [[True, True, False], [False, False, True]]
    hits = arrays["label"][range(2), arrays["predicted"]]
    assert hits.tolist() == arrays["correct"].tolist()


def test_the_index_finds_the_example_whatever_the_batch():
    strategy, model = tf.distribute.get_strategy(), network(3)
    one, five = (
        evaluation.Evaluator(model, stripes(), size, strategy)("test").arrays() for size in (1, 5)
    )
    for name in ("index", "label", "predicted", "rank"):
        assert one[name].tolist() == five[name].tolist()
    np.testing.assert_allclose(one["loss"], five["loss"], rtol=1e-5)
