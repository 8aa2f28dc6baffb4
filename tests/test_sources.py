"""Sources: records as TFDS writes them, folders of files, made-up photographs."""

import io
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from stored_records import SYNSETS, features, labelled, picture, store

from data import imagenet
from data.folder import image_folder
from data.pipeline import Pipeline
from data.preprocess import crops, whole
from data.records import tfds_dataset
from data.synthetic import synthetic


def everything(source, split: str, batch_size: int = 7) -> dict[str, np.ndarray]:
    pipeline = Pipeline(source, whole(20))
    batches = list(pipeline.eval_batches(split, batch_size=batch_size).as_numpy_iterator())
    columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    order = np.argsort(columns["index"])[(columns["index"] < 0).sum() :]
    return {name: column[order] for name, column in columns.items()}


def test_any_data_set_of_tfds_is_read_by_name(tmp_path):
    folder = store(
        tmp_path, "shapes", "", features(["a", "b", "c"]), train=labelled(30, 3), odd=labelled(5, 3)
    )
    source = tfds_dataset("shapes", folder)
    assert (source.name, source.num_classes, list(source.class_names)) == ("shapes", 3, [*"abc"])
    assert {name: split.num_examples for name, split in source.splits.items()} == {
        "train": 30,
        "odd": 5,
    }
    read = everything(source, "odd")
    np.testing.assert_array_equal(np.sort(read["label"]), [0, 0, 1, 1, 2])
    assert read["readable"].all()


def test_minival_is_the_end_of_train_and_never_trained_on(tmp_path):
    folder = store(tmp_path, "imagenet2012", "", features(SYNSETS), train=labelled(200))
    every = everything(tfds_dataset("imagenet2012", folder), "train")["label"]
    source = imagenet.imagenet2012(folder, minival_percent=1)
    train, minival = (everything(source, name)["label"] for name in ("train", "minival"))
    assert (len(train), len(minival)) == (198, 2)
    np.testing.assert_array_equal(np.concatenate([train, minival]), every)
    trained = Pipeline(source, whole(20)).train_batches("train", batch_size=99, seed=0).take(4)
    assert not set(minival) & {int(v) for batch in trained for v in batch["label"]}
    assert source.class_names[0] == "tench, Tinca tinca"
    assert set(imagenet.imagenet2012(folder, minival_percent=0).splits) == {"train"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet2012"}, "imagenet2012 is not prepared in .*prepare_imagenet"),
        ({"name": "no_such_data"}, "has no data set 'no_such_data'"),
        (
            {"name": "shapes", "label": "kind"},
            "shapes has no feature 'kind' of classes; it has file",
        ),
        ({"name": "shapes", "image": "picture"}, "shapes has no image 'picture'; it has file_n"),
        ({"name": "shapes", "minival_percent": 100}, "minival_percent takes 0 to 99"),
    ],
)
def test_what_tfds_does_not_have_is_named(tmp_path, arguments, message):
    folder = store(tmp_path, "shapes", "", features(["a"]), train=labelled(3, 1))
    with pytest.raises(ValueError, match=message):
        tfds_dataset(data_dir=folder, **arguments)


def test_the_variants_of_imagenet_v2(tmp_path):
    for variant in imagenet.V2_VARIANTS:
        store(tmp_path, "imagenet_v2", variant, features(SYNSETS), test=labelled(3))
        source = imagenet.imagenet_v2(variant, str(tmp_path))
        assert (source.num_classes, source.splits["test"].num_examples) == (1000, 3)
    with pytest.raises(ValueError, match="variant takes one of matched-frequency, thre"):
        imagenet.imagenet_v2("top", str(tmp_path))


def test_sketches_are_answered_from_all_classes(tmp_path):
    folder = store(tmp_path, "imagenet_sketch", "", features(SYNSETS), test=labelled(5))
    source = imagenet.imagenet_sketch(folder)
    assert (source.num_classes, source.answers) == (1000, None)


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_answers_are_chosen_from_the_classes_that_occur(tmp_path, name):
    own = np.random.default_rng(0).permutation(1000)[:200]
    records = [r | {"label": int(own[i % 200])} for i, r in enumerate(labelled(230))]
    source = getattr(imagenet, name)(
        store(tmp_path / "all", name, "", features(SYNSETS), test=records)
    )
    assert list(source.answers) == sorted(own)
    assert source.num_classes == 1000
    folder = store(tmp_path / "part", name, "", features(SYNSETS), test=records[:199])
    with pytest.raises(ValueError, match=f"{name} has 200 classes, but 199 occur .*: prepare all"):
        getattr(imagenet, name)(folder)


def test_real_labels_are_any_number_of_classes(tmp_path):
    own = features(SYNSETS) | {
        "original_label": tfds.features.ClassLabel(names=SYNSETS),
        "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=SYNSETS)),
    }
    del own["label"]
    sets = [[3], [], [7, 999], [0]]
    records = [
        {
            "image": picture(i),
            "original_label": i,
            "real_label": np.array(right, np.int64),
            "file_name": str(i),
        }
        for i, right in enumerate(sets)
    ]
    source = imagenet.imagenet2012_real(
        store(tmp_path, "imagenet2012_real", "", own, validation=records)
    )
    read = everything(source, "validation", batch_size=3)
    assert read["label"].shape == (4, 1000)
    found = sorted(sorted(np.where(row)[0].tolist()) for row in read["label"])
    assert found == sorted(sets)


# A folder of files ---------------------------------------------------------------------------


def save(path: pathlib.Path, image: Image.Image, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """What people's folders hold: every kind of file, and names that lie."""
    image = Image.fromarray(picture(5))
    root = tmp_path / "pictures"
    save(root / "train/cat/rgb.JPEG", image, format="JPEG", quality=98)
    save(root / "train/cat/cmyk.jpg", image.convert("CMYK"), format="JPEG", quality=98)
    save(root / "train/cat/.hidden.jpg", image, format="JPEG")
    save(root / "train/dog/grey.jpeg", image.convert("L"), format="JPEG", quality=98)
    save(root / "train/dog/really_png.JPEG", image, format="PNG")
    save(root / "train/dog/palette.png", image.convert("P"), format="PNG")
    save(root / "train/emu/first.gif", image, format="GIF")
    save(root / "train/emu/plain.bmp", image, format="BMP")
    (root / "train/emu/notes.txt").write_text("no image")
    save(root / "val/dog/one.png", image, format="PNG")
    return root


def test_a_folder_of_every_kind_of_file(folder):
    source = image_folder(str(folder))
    assert (source.name, list(source.class_names)) == ("pictures", ["cat", "dog", "emu"])
    assert source.splits["train"].num_examples == 7
    read = everything(source, "train")
    np.testing.assert_array_equal(read["label"], [0, 0, 1, 1, 1, 2, 2])
    assert everything(source, "val")["label"].tolist() == [1]
    files = sorted(p for p in (folder / "train").glob("*/[a-z]*.*") if p.suffix != ".txt")
    split, encoded = source.splits["train"], crops(16)
    for index, file in enumerate(files):
        example = split.parse(tf.constant(index, tf.int64))
        assert example["id"].numpy().decode() == f"train/{file.parent.name}/{file.name}"
        want = np.asarray(Image.open(file).convert("RGB"), np.float64)
        got = tf.io.decode_image(example["image"], channels=3, expand_animations=False).numpy()
        assert np.abs(got - want).max() <= (12 if "cmyk" in file.name else 3), file
        assert encoded.train(example["image"], [0, index]).shape == (16, 16, 3)
        assert encoded.evaluate(example["image"]).shape == (16, 16, 3)


def test_minival_of_a_folder_is_spread_over_the_classes(tmp_path):
    for name in "abcd":
        for number in range(25):
            save(tmp_path / f"train/{name}/{number:02}.png", Image.new("RGB", (8, 8)))
    source = image_folder(str(tmp_path), minival_percent=8)
    assert source.splits["train"].num_examples == 92
    np.testing.assert_array_equal(everything(source, "minival")["label"], [0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "training"}, "has no folder 'training'; it has train, val"),
        ({"data_dir": "/nowhere"}, "there is no folder /nowhere"),
        ({"minival_percent": 100}, "minival_percent takes 0 to 99, not 100"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(folder, change, message):
    with pytest.raises(ValueError, match=message):
        image_folder(**{"data_dir": str(folder)} | change)


def test_classes_that_training_does_not_have_are_named(folder):
    save(folder / "val/fox/one.png", Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="has 1 classes that the training split .* 'fox'"):
        image_folder(str(folder))


def test_a_split_without_images_is_named(folder):
    (folder / "test" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"test holds no images \(.jpeg, .jpg"):
        image_folder(str(folder))


def test_a_truncated_file_is_named_in_evaluation(folder, caplog):
    file = folder / "train/cat/rgb.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(tf.errors.OpError, match=r"pictures: train/cat/rgb\.JPEG cannot be read"):
        everything(image_folder(str(folder)), "train")
    pipeline = Pipeline(image_folder(str(folder)), crops(16), max_broken=1)
    for batch in pipeline.train_batches("train", batch_size=3, seed=0).take(3):
        assert batch["image"].shape == (3, 16, 16, 3)
    assert "pictures: train/cat/rgb.JPEG cannot be read" in caplog.text


def test_photographs_of_nothing():
    source = synthetic(num_examples=30, num_classes=7)
    sizes = {name: split.num_examples for name, split in source.splits.items()}
    assert sizes == {"train": 30, "minival": 3, "validation": 3}
    example = source.splits["train"].parse(tf.constant(23, tf.int64))
    encoded = example["image"].numpy()
    assert Image.open(io.BytesIO(encoded)).size == (500, 375)
    assert 70e3 < len(encoded) < 130e3
    assert int(example["label"]) == 23 % 7
    with pytest.raises(ValueError, match="synthetic.height takes at least 1, not 0"):
        synthetic(height=0)
