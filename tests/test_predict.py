"""Single images: found, cut as in evaluation, and named, from runs and from exported files."""

import io
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from PIL import Image

import condconv
from condconv.engine.errors import RunError, UsageError
from condconv.tools import pictures
from condconv.tools.exports import formats
from condconv.tools.exports.trained_network import TrainedNetwork
from condconv.tools.prediction import Classifier, Prediction, find_images, predict
from data import folder
from data.pipeline import Pipeline
from data.preprocess import crops
from data.recorded import recorded
from data.synthetic import photograph

SIZE = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    """One class of JPEGs: of odd size, grey, CMYK, small; and a PNG."""
    images = tmp_path_factory.mktemp("photos") / "test" / "one"
    images.mkdir(parents=True)
    photo = Image.open(io.BytesIO(photograph(61, 97, 0)))
    photo.save(images / "odd.jpg", quality=90)
    photo.convert("L").save(images / "grey.jpg")
    photo.convert("CMYK").save(images / "cmyk.jpg")
    photo.crop((3, 5, 20, 18)).save(images / "small.jpeg")
    photo.rotate(90, expand=True).save(images / "upright.png")
    return images


@pytest.fixture(scope="module")
def model() -> keras.Model:
    rng = np.random.default_rng(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 64, -2)(inputs)
    x = condconv.CondConv2D(6, 5, 3, strides=3, activation="relu")(x)
    made = keras.Model(inputs, condconv.CondDense(9, 3)(keras.layers.Flatten()(x)))
    for variable in made.variables:
        variable.assign(variable + rng.normal(0, 0.02, variable.shape))
    return made


def classifier(model: keras.Model, names: tuple[str, ...] = ()) -> Classifier:
    return Classifier("tests", model, model.input_shape, crops(SIZE).evaluate, names)


def test_serve_jpeg_equals_our_evaluation_and_so_do_predictions(model, photos, tmp_path):
    data = Pipeline(folder.image_folder(str(photos.parents[1]), train="test"), crops(SIZE))
    (batch,) = data.eval_batches("test", batch_size=5)
    expected = tf.nn.softmax(model(batch["image"])).numpy()
    paths = sorted(photos.iterdir())
    found = list(predict(classifier(model), [epath.Path(path) for path in paths]))
    network = TrainedNetwork(model, "tests", crops(SIZE).evaluate)
    formats.write_saved_model(model, tmp_path, formats.serve_encoded(model, network))
    serve = tf.saved_model.load(tmp_path).signatures["serve_jpeg"]
    answer = serve(encoded=tf.constant([path.read_bytes() for path in paths]))
    best = np.argsort(-expected, axis=-1)[:, :5]
    shares = np.take_along_axis(expected, best, -1)
    assert len({tuple(row) for row in best}) > 1  # the images differ, to the network
    assert answer["classes"].numpy().tolist() == best.tolist() == [p.classes for p in found]
    np.testing.assert_allclose(answer["probabilities"], shares, atol=1e-3)
    np.testing.assert_allclose([p.probabilities for p in found], shares, atol=1e-5)


def test_images_are_found_in_order(photos, tmp_path):
    names = [path.name for path in find_images([str(photos / "odd.jpg"), str(photos)])]
    assert names == ["odd.jpg", "cmyk.jpg", "grey.jpg", "odd.jpg", "small.jpeg", "upright.png"]
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    for name, said in (("none.jpg", "no image"), ("text.jpg", "is no"), ("empty", "holds no")):
        with pytest.raises(UsageError, match=f"{said}"):
            find_images([str(photos), str(tmp_path / name)])


def test_a_broken_image_is_named_and_the_others_are_done(model, photos, tmp_path, capsys):
    whole, cut = photos / "odd.jpg", tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:900])
    names = tuple(f"class {i}" for i in range(9))
    found = list(predict(classifier(model, names), find_images([str(cut), str(whole)]), top=2))
    assert [each.path.name for each in found] == ["odd.jpg"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{cut} cannot be read: ") and "Invalid JPEG" in said
    rows = found[0].rows(exact=True)
    assert [row["name"] for row in rows] == [f"class {row['class']}" for row in rows]
    assert rows[0]["probability"] > rows[1]["probability"]


def test_what_does_not_fit_is_told(model, photos):
    other = Classifier("tests", model, model.input_shape, crops(32).evaluate)
    with pytest.raises(UsageError, match=r"takes images of \(24, 24, 3\), its preprocessing cuts"):
        other.image(epath.Path(photos / "odd.jpg"))
    undefined = Classifier("tests", lambda x: x[:, 0, :, 0] / 0, (None,) * 4, crops(8).evaluate)
    with np.errstate(all="ignore"), pytest.raises(RunError, match="logits that are no numbers"):
        undefined.probabilities(np.ones((2, 8, 8, 3), np.float32))


def test_preprocessing_is_read_from_metadata():
    encoded = photograph(61, 97, 1)
    lines = ["pipeline.preprocessing = @data.preprocess.whole", "whole.image_size = 10"]
    assert recorded(lines, 8).evaluate(encoded).shape == (10, 10, 3)
    lines = ["pipeline.preprocessing = @crops", "crops.resize_method = 'bilinear'"]
    lines += ["crops.antialias = True", "crops.augmentations = (@auto_augment,)"]
    expected = crops(8, "bilinear", antialias=True).evaluate(encoded)
    np.testing.assert_array_equal(recorded(lines, 8).evaluate(encoded), expected)
    np.testing.assert_array_equal(recorded([], 8).evaluate(encoded), crops(8).evaluate(encoded))
    for line in ("pipeline.preprocessing = @other", "crops.image_size = %SIZE"):
        with pytest.raises(ValueError, match="is no "):
            recorded([line], 8)


def test_predictions_are_drawn(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "_MOST", 2)
    path = epath.Path(photos / "odd.jpg")
    each = Prediction(path, [3, 1], [0.75, 0.25], ["a $very$ long name, or two" * 3, None])
    output = epath.Path(tmp_path / "drawn.png")
    pictures.draw_predictions([each] * 3, lambda path: np.zeros((8, 8, 3)), output)
    pixels = np.asarray(Image.open(output).convert("RGB"))
    blue, light = (np.all(pixels == colour, axis=-1).sum() for colour in [(0, 114, 178)] * 2)
    assert blue == light > 1000
    assert "shows the first 2 of 3 images" in capsys.readouterr().err
