"""Photographs in the place of data that is not there: same names and numbers, nothing read."""

import functools
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from stored_records import SYNSETS, features, labelled, picture, store

from condconv.engine import config
from condconv.engine.errors import UsageError
from data import imagenet, stand_in
from data.class_names import imagenet_subset
from data.folder import image_folder
from data.pipeline import Pipeline, pipeline
from data.preprocess import Preprocessing, whole
from data.records import sizes, tfds_dataset
from data.source import Source, indexed

TRAIN, HELD_OUT = 1_268_355, 12_812  # of ImageNet, with 1 % held out
ONE_PIXEL = Preprocessing({}, lambda encoded: tf.zeros((1, 1, 3), tf.uint8))


def instead(source, **bound) -> Pipeline:
    return pipeline(functools.partial(source, **bound), lambda: whole(8), stand_in=True)


def counts(source: Source) -> dict[str, int]:
    return {name: split.num_examples for name, split in source.splits.items()}


def facts(source: Source) -> tuple:
    """All that is promised but the number of examples."""
    one = tf.data.Dataset.from_tensors((tf.constant(0, tf.int64),) * 3)
    specs = {
        name: split.read(one).map(lambda payload, _, split=split: split.parse(payload)).element_spec
        for name, split in source.splits.items()
    }
    answers = source.answers and list(source.answers)
    return source.name, source.num_classes, list(source.class_names), answers, specs


@pytest.mark.parametrize(
    ("source", "bound", "expected"),
    [
        ("imagenet2012", {}, {"train": TRAIN, "validation": 50_000, "minival": HELD_OUT}),
        (
            "imagenet2012",
            {"minival_percent": 0},
            {"train": 1_281_167, "validation": 50_000},
        ),
        *(("imagenet_v2", {"variant": name}, {"test": 10_000}) for name in imagenet.V2_VARIANTS),
        ("imagenet_sketch", {}, {"test": 50_889}),
        ("imagenet_a", {}, {"test": 7_500}),
        ("imagenet_r", {}, {"test": 30_000}),
        ("imagenet2012_real", {}, {"validation": 50_000}),
    ],
)
def test_what_is_known_without_the_data(source, bound, expected):
    made_up = instead(getattr(imagenet, source), data_dir="/nowhere", **bound)
    assert (made_up.name, made_up.num_classes) == (source, 1000)
    assert counts(made_up.source) == expected
    assert made_up.class_names[999] == "toilet tissue, toilet paper, bathroom tissue"
    answers = {"imagenet_a": 200, "imagenet_r": 200}.get(source)
    assert answers == (made_up.answers and len(set(made_up.answers)))


def test_it_equals_a_data_set_that_is_prepared(tmp_path, monkeypatch):
    images = {"train": 157, "validation": 3}
    monkeypatch.setattr(imagenet, "IMAGES", images)
    records = {name: labelled(count) for name, count in images.items()}
    folder = store(tmp_path, "imagenet2012", "", features(SYNSETS), **records)
    for percent in (0, 1, 10, 33):
        real = imagenet.imagenet2012(folder, percent)
        made_up = imagenet.imagenet2012(None, percent, stand_in=True)
        assert counts(made_up) == counts(real)
    assert facts(made_up) == facts(real)


@pytest.mark.parametrize(
    ("name", "answers"), [(letter, imagenet_subset(letter.upper())) for letter in "ar"]
)
def test_answers_equal_those_of_a_data_set_that_is_prepared(tmp_path, name, answers):
    records = [r | {"label": answers[i]} for i, r in enumerate(labelled(200))]
    folder = store(tmp_path, f"imagenet_{name}", "", features(SYNSETS), test=records)
    source = getattr(imagenet, f"imagenet_{name}")
    assert facts(source(stand_in=True)) == facts(source(folder))


def test_several_right_labels_stay_several(tmp_path):
    own = features(SYNSETS) | {
        "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=SYNSETS))
    }
    del own["label"]
    right = {"image": picture(0), "file_name": "0", "real_label": np.array([3, 4], np.int64)}
    folder = store(tmp_path, "imagenet2012_real", "", own, validation=[right])
    real = imagenet.imagenet2012_real(folder)
    for made_up in (
        imagenet.imagenet2012_real(stand_in=True),
        stand_in.instead_of(lambda: real),  # a factory that knows of no stand-in
    ):
        assert facts(made_up) == facts(real)
        label = made_up.splits["validation"].parse(tf.constant(7, tf.int64))["label"]
        np.testing.assert_array_equal(np.where(label), [[7]])


@pytest.mark.parametrize("whole_train", [1_281_167, 50, 101, 257, 1_797])
def test_percentages_are_cut_as_tfds_cuts_them(whole_train):
    template = tfds.core.ShardedFileTemplate(
        data_dir="/nowhere", dataset_name="x", filetype_suffix="tfrecord"
    )
    info = tfds.core.SplitInfo("train", [whole_train], 0, template)
    known = tfds.core.splits.SplitDict([info])
    for percent in range(1, 100):
        cut = sizes({"train": whole_train}, percent)
        assert cut["train"] == known[f"train[:{100 - percent}%]"].num_examples
        assert cut["minival"] == known[f"train[{100 - percent}%:]"].num_examples


# Batches -------------------------------------------------------------------------------------

OF_IMAGENET = [
    "pipeline.source = @held/imagenet2012",
    "held/imagenet2012.minival_percent = 10",
    "imagenet2012.data_dir = '/nowhere'",
    "pipeline.mixing = @mixup",
    "crops.image_size = 32",
    "mobilenet_v1.image_size = 32",
]


def test_a_config_of_imagenet_gives_batches_at_once():
    experiment = config.load(["configs/synthetic.gin"], OF_IMAGENET)
    begin = time.perf_counter()
    data = experiment.data(stand_in=True)
    assert data.num_examples("train") == 1_153_050
    (first,) = data.train_batches("train", batch_size=8, seed=0).take(1)
    assert time.perf_counter() - begin < 15  # not the minutes that a list in Python would take
    assert (first["image"].shape, first["label"].shape) == ((8, 32, 32, 3), (8, 1000))
    assert first["label"].numpy().max() < 1  # mixed, as the config asks for
    (later,) = data.train_batches("train", batch_size=8, seed=0, start=99_999).take(1)
    assert not np.array_equal(first["image"], later["image"])


def test_a_config_cannot_ask_for_it():
    for name in ("pipeline", "imagenet2012"):
        with pytest.raises(UsageError, match="stand_in"):
            config.load(["configs/synthetic.gin"], [*OF_IMAGENET, f"{name}.stand_in = True"])


def test_every_example_is_evaluated_once_and_its_label_is_an_answer():
    source = imagenet.imagenet_a(stand_in=True)
    batches = list(Pipeline(source, ONE_PIXEL).eval_batches("test", batch_size=512))
    index, label = (np.concatenate([b[name] for b in batches]) for name in ("index", "label"))
    np.testing.assert_array_equal(np.sort(index[index >= 0]), np.arange(7_500))
    assert set(label) == set(imagenet_subset("A"))


def test_photographs_are_as_large_as_imagenets_and_made_once(monkeypatch):
    encoded = imagenet.imagenet_a(stand_in=True).splits["test"].parse(tf.constant(7, tf.int64))
    assert tf.io.decode_jpeg(encoded["image"]).shape == (375, 500, 3)
    monkeypatch.setattr(stand_in, "photograph", None)
    assert imagenet.imagenet_r(stand_in=True).num_classes == 1000


# Data sets whose numbers are in the data -----------------------------------------------------


def test_a_folder_that_is_there_gives_its_numbers_and_is_not_read(tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg", "val/cat/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image at all")
    made_up = instead(image_folder, data_dir=str(tmp_path))
    assert facts(made_up.source) == facts(image_folder(str(tmp_path)))
    assert counts(made_up.source) == {"train": 3, "val": 1}
    (batch,) = made_up.train_batches("train", batch_size=3, seed=0).take(1)
    assert batch["image"].numpy().std() > 10


@pytest.mark.parametrize(
    ("source", "bound", "message"),
    [
        (image_folder, {}, "class count is not known without it: there is no folder .*nowhere"),
        (tfds_dataset, {"name": "cifar10"}, "not known without it: cifar10 is not prepared in"),
        (imagenet.imagenet_v2, {"variant": "top"}, "^imagenet_v2.variant takes one of match"),
        (imagenet.imagenet2012, {"minival_percent": 100}, "^minival_percent takes 0 to 99"),
    ],
)
def test_what_cannot_be_known_is_said_in_one_line(tmp_path, source, bound, message):
    with pytest.raises(ValueError, match=message) as raised:
        instead(source, data_dir=str(tmp_path / "nowhere"), **bound)
    assert "\n" not in str(raised.value)


def test_what_is_always_there_needs_no_stand_in():
    digits = config.load(["configs/digits.gin"], []).data
    for made_up in (digits(stand_in=True), digits()):
        example = made_up.source.splits["test"].parse(tf.constant(5, tf.int64))
        assert tf.io.decode_png(example["image"]).shape == (8, 8, 1)
    bound = ["synthetic.height = 40", "synthetic.width = 30", "synthetic.num_classes = 3"]
    synthetic = config.load(["configs/synthetic.gin"], bound).data(stand_in=True)
    example = synthetic.source.splits["train"].parse(tf.constant(5, tf.int64))
    assert tf.io.decode_jpeg(example["image"]).shape == (40, 30, 3)
    assert (synthetic.num_classes, int(example["label"])) == (3, 2)


def test_a_source_of_ones_own_keeps_its_answers():
    example = lambda index: {"image": "?", "label": index, "id": ""}  # noqa: E731
    own = Source("own", 9, {"odd": indexed(5, example)}, answers=[1, 7])
    made_up = stand_in.instead_of(lambda: own)
    assert facts(made_up) == facts(own)
    labels = [int(made_up.splits["odd"].parse(tf.constant(i, tf.int64))["label"]) for i in range(5)]
    assert labels == [1, 7, 1, 7, 1]
