"""Exported files say what their source says, in the runtimes that people use."""

import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import condconv
from condconv import fold_batch_norm
from condconv.engine import config
from condconv.engine.errors import RunError, UsageError
from condconv.normalization import BatchNormalization
from condconv.tools.exports import export, formats, runtimes, trained_network
from condconv.tools.exports.calibration import Calibration, draw
from condconv.tools.exports.trained_network import TrainedNetwork
from models import create_model

ROOT = pathlib.Path(__file__).parents[1]
TOLERANCE = {
    "model.keras": 1e-4,
    "saved_model": 1e-4,
    "model.onnx": 1e-4,
    "model_float32.tflite": 1e-3,
    "model_float16.tflite": 1e-2,
}


def disturb(model: keras.Model, seed: int = 0) -> keras.Model:
    """Makes weights that leave no batch norm and no bias without an effect."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        name = variable.path.split("/")[-1]
        if name == "moving_variance":
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif name in ("gamma", "beta", "bias", "moving_mean"):
            variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    return model


def tiny() -> keras.Model:
    """Every kind of layer, at 6×6 pixels."""
    inputs = keras.Input((6, 6, 3), name="pictures")
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    routing = condconv.Routing(3)(x)
    x = condconv.CondConv2D(4, 3, 3, strides=2, padding="same", use_bias=False)(x, routing)
    x = BatchNormalization()(x)
    x = condconv.DepthwiseCondConv2D(3, 3, padding="same", depth_multiplier=2)(x, routing)
    x = condconv.CondConv2D(5, 1, 3, activation="relu")(x, routing)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return disturb(keras.Model(inputs, condconv.CondDense(7, 3)(x), name="tiny"))


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


@pytest.fixture(scope="module")
def source() -> TrainedNetwork:
    return TrainedNetwork(
        tiny(),
        "tests",
        lambda encoded: tf.image.resize(tf.io.decode_png(encoded, 3), (6, 6)),
        ["whole.image_size = 6"],
        [f"class {i}" for i in range(7)],
    )


def test_an_export_runs_elsewhere_and_says_what_it_is(source, tmp_path):
    rows = export.export(source, ["litert"], tmp_path / "out")
    assert [row["file"] for row in rows] == ["model_float32.tflite"]
    assert rows[0]["difference"] < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert about["labels"] == [f"class {i}" for i in range(7)]
    assert about["preprocessing"] == ["whole.image_size = 6"]
    with zipfile.ZipFile(tmp_path / "out" / "model_float32.tflite") as archive:
        assert archive.read("labels.txt").decode().splitlines() == about["labels"]
        inside = json.loads(archive.read("metadata.json"))
    assert inside == {key: value for key, value in about.items() if key != "sha256"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert about["sha256"]["model_float32.tflite"] in card
    assert f"{condconv.count_cost(source.model).multiply_adds:,}" in card


def test_a_saved_model_serves_images_and_encoded_ones(source, tmp_path):
    notes = {"labels.txt": "class 0\n"}
    serving = formats.serve_encoded(source.model, source)
    formats.write_saved_model(source.model, tmp_path, serving, notes)
    assert (tmp_path / "assets.extra" / "labels.txt").read_text() == "class 0\n"
    images = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3)).astype("uint8")
    expected = np.asarray(source.model(images.astype("float32")))
    found = runtimes.open_network(str(tmp_path))(images.astype("float32"))
    assert largest_difference(found, expected) < 1e-5
    serve = tf.saved_model.load(tmp_path).signatures["serve_jpeg"]
    answer = serve(encoded=tf.constant([tf.io.encode_png(image).numpy() for image in images]))
    classes = np.argsort(-expected, axis=-1)[:, :5]
    assert answer["classes"].numpy().tolist() == classes.tolist()
    assert answer["names"].numpy()[0, 0].decode() == f"class {classes[0, 0]}"
    probabilities = np.take_along_axis(tf.nn.softmax(expected).numpy(), classes, -1)
    np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-6)


def test_what_says_something_else_is_not_written(source, tmp_path, monkeypatch):
    def wrong(path, batches):
        return [np.asarray(source.model(x)) * 1.001 for x in batches]

    monkeypatch.setattr(runtimes, "run_apart", wrong)
    with pytest.raises(RunError, match="model.keras differs from the source by 0.001"):
        export.export(source, ["keras"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_run_elsewhere_is_told_in_one_line(tmp_path):
    (tmp_path / "x.tflite").write_bytes(b"TFL3")
    with pytest.raises(RunError, match=r"^x\.tflite does not run in a fresh process: ValueError"):
        runtimes.run_apart(tmp_path / "x.tflite", [np.zeros((1, 6, 6, 3), "float32")])


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (count, 6, 6, 3)).astype("float32")


def test_int8_keeps_its_signature_and_the_shape_of_the_function(source, tmp_path):
    path = tmp_path / "x.tflite"
    formats.write_litert(source.model, path, "int8", images(100, 5))
    run = runtimes.open_network(str(path))
    for batch in (1, 5):
        x = images(batch, 6)
        found, expected = run(x), np.asarray(source.model(x))
        assert found.dtype == np.float32
        assert 1e-6 < largest_difference(found, expected) < 0.1


@pytest.mark.parametrize("broken", ["shuffled", "undefined"])
def test_int8_that_says_something_else_is_not_written(broken, source, tmp_path, monkeypatch):
    def wrong(path, batches):
        logits = [np.asarray(source.model(x)) for x in batches]
        return [np.roll(y, 1, -1) if broken == "shuffled" else y * np.nan for y in logits]

    monkeypatch.setattr(runtimes, "run_apart", wrong)
    monkeypatch.setattr(formats, "write_litert", lambda model, path, *_: path.write_bytes(b""))
    calibration = Calibration(images(2, 0), images(7, 1), "noise")
    arguments = {"precisions": ["int8"], "calibration": calibration}
    with pytest.raises(RunError, match="of 7 images the class that the source gives: nothing was"):
        export.export(source, ["litert"], tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_calibration_draws_from_two_splits():
    experiment = config.load([str(ROOT / "configs" / "digits.gin")])
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.GlobalMaxPooling2D()])
    drawn = draw(experiment, model, 150)
    assert drawn.images.shape == drawn.held_out.shape == (150, 32, 32, 3)
    assert drawn.images.dtype == np.float32
    assert len(np.unique(drawn.images, axis=0)) == 150
    assert drawn.origin == "150 images of digits, 'train'; compared on 150 of 'test'"
    with pytest.raises(UsageError, match="takes images of 6×6×3 and digits gives 32×32×3"):
        draw(experiment, tiny(), 9)


def test_int8_without_images_is_a_wrong_call():
    with pytest.raises(UsageError, match="int8 is calibrated on images: name a config"):
        draw(None, tiny(), 9)
    with pytest.raises(UsageError, match="--gin_file goes with --source"):
        trained_network.experiment("run", ["x.gin"], [])
    with pytest.raises(UsageError, match="--gin_param goes with"):
        trained_network.experiment(None, [], ["a.b = 1"])


def test_packages_of_the_extra_are_asked_for(monkeypatch):
    export.check_packages(["keras", "saved_model"])
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'condconv\[export\]'"):
        export.check_packages(["keras", "onnx"])


@pytest.mark.slow
def test_mixed_precision_is_exported_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = tiny()
    finally:
        keras.config.set_dtype_policy("float32")
    copy = condconv.in_float32(model)
    x = np.full((2, 6, 6, 3), 100, "float32")
    assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
    assert 1e-6 < largest_difference(np.asarray(model(x), "float32"), np.asarray(copy(x))) < 0.05


def test_a_damaged_file_is_told_in_one_line(tmp_path):
    keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()]).save(tmp_path / "w.keras")
    whole = (tmp_path / "w.keras").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"PK\3\4 half of an archive", whole[: len(whole) // 2], bytes(flipped)):
        (tmp_path / "x.keras").write_bytes(content)
        with pytest.raises(RunError, match=r"x\.keras cannot be loaded"):
            trained_network.of_file(str(tmp_path / "x.keras"), lambda size, classes: {})
    with pytest.raises(UsageError, match=r"is no \.keras file"):
        trained_network.of_file(str(tmp_path / "y.keras"), lambda size, classes: {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet50"])  # test_exported_run has another
def test_every_format_says_what_the_network_says(name, tmp_path):
    arguments = {"image_size": 32, "num_classes": 10, "width": 0.25, "batch_norm_momentum": 0.0}
    model = disturb(create_model(name, num_experts=8, **arguments))
    rng = np.random.default_rng(3)
    images = {n: rng.uniform(0, 255, (n, 32, 32, 3)).astype("float32") for n in (1, 2, 5, 32)}
    if name == "resnet50":  # whose sums of branches would grow from block to block
        model(images[32], training=True)
    source = TrainedNetwork(model, "tests")
    precisions = ("float32", "float16")
    rows = export.export(source, export.FORMATS, tmp_path / "out", precisions=precisions)
    assert {row["file"]: row["tolerance"] for row in rows} == TOLERANCE
    expected = {batch: np.asarray(model(x, training=False)) for batch, x in images.items()}
    for file, tolerance in TOLERANCE.items():
        run = runtimes.open_network(str(tmp_path / "out" / file))
        for batch, x in images.items():
            assert largest_difference(run(x), expected[batch]) < tolerance, (file, batch)
    int8 = tmp_path / "int8.tflite"  # of noise, no more than that it can be written and run
    formats.write_litert(fold_batch_norm(model), int8, "int8", images[5])
    assert np.isfinite(runtimes.open_network(str(int8))(images[5])).all()
