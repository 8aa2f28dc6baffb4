"""The whole way of ImageNet: tar files, records, training, evaluation, other sets; memory."""

import json
import os
import pathlib
import subprocess
import sys

import imagenet_tars
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tiny_runs import judged

from condconv.engine.tasks.classification import classification
from data.folder import image_folder
from data.pipeline import Pipeline
from data.preprocess import Preprocessing, whole
from data.source import Source, indexed

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = [
    "--gin_file=configs/synthetic.gin",
    "--gin_param=crops.image_size = 32",
    "--gin_param=mobilenet_v1.image_size = 32",
    "--gin_param=mobilenet_v1.width = 0.1",
    "--gin_param=Experiment.batch_size = 8",
    "--gin_param=Experiment.steps_per_call = 1",
]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_tar_files_are_prepared_trained_on_and_scored(tmp_path):
    train, val = imagenet_tars.make_tars(tmp_path / "tars")
    prepared = call(
        "scripts/prepare_imagenet.py",
        f"--train_tar={train}",
        f"--val_tar={val}",
        f"--data_dir={tmp_path / 'data'}",
        "--allow_incomplete",
    )
    assert prepared.returncode == 0, prepared.stderr
    source = [
        "--gin_param=pipeline.source = @imagenet2012",
        f"--gin_param=imagenet2012.data_dir = '{tmp_path / 'data'}'",
        "--gin_param=imagenet2012.minival_percent = 10",
        "--gin_param=Experiment.duration = '4 epochs'",
        "--gin_param=Experiment.log_every = '1 epochs'",
        "--gin_param=crops.augmentations = (@auto_augment,)",
        "--gin_param=pipeline.mixing = @mixup",
    ]
    trained = call("train.py", *CONFIG, *source, f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    scored = call("eval.py", f"--workdir={tmp_path / 'run'}")
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout.splitlines()[-1])
    assert (result["dataset"], result["split"]) == ("imagenet2012", "validation")
    assert result["images"] == 10
    assert 0 < result["loss"] < 100


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    root = tmp_path / "pictures"
    for split, count in {"train": 12, "minival": 4, "validation": 6}.items():
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (40, 36), (20 * number, 100 * (name == "cat"), 50))
                image.save(root / split / name / f"{number}.jpg")
    return root


def of_folder(root: pathlib.Path) -> list[str]:
    return [
        *CONFIG,
        "--gin_param=pipeline.source = @image_folder",
        f"--gin_param=image_folder.data_dir = '{root}'",
        "--gin_param=Experiment.duration = '6 steps'",
    ]


@pytest.mark.slow
def test_a_broken_image_ends_a_run_in_one_line_unless_it_is_allowed(folder, tmp_path):
    (folder / "train/dog/7.jpg").write_bytes(b"no image at all")
    (folder / "validation/cat/2.jpg").write_bytes(b"")
    run = f"--workdir={tmp_path / 'strict'}"
    done = call("train.py", *of_folder(folder), run)
    assert done.returncode == 1
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("train.py: ")]
    assert "pictures: train/dog/7.jpg cannot be read" in line
    assert "0 broken images are allowed" in line
    assert "Traceback" not in done.stderr

    run = f"--workdir={tmp_path / 'lenient'}"
    done = call("train.py", *of_folder(folder), run, "--gin_param=pipeline.max_broken = 1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train/dog/7.jpg cannot be read") == 1
    assert "broken image 1 of 1 allowed" in done.stderr
    done = call("eval.py", run)
    assert done.returncode == 1
    assert "pictures: validation/cat/2.jpg cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = call("eval.py", run, "--gin_param=pipeline.broken_are_wrong = True")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 12


# What is right, in evaluation ----------------------------------------------------------------

CLASSES = 6


def scored_by_hand(logits: np.ndarray, right: np.ndarray, answers: list[int]) -> tuple:
    """Returns rank and loss of an example, as one would work it out on paper."""
    order = sorted(answers, key=lambda c: (-logits[c], c))
    rank = min(order.index(c) for c in np.where(right)[0])
    share = np.exp(logits[answers]) / np.exp(logits[answers]).sum()
    return rank, -np.log(sum(share[answers.index(c)] for c in np.where(right)[0]))


@pytest.mark.parametrize("answers", [None, [0, 2, 3, 5]])
@pytest.mark.parametrize("several", [False, True])
def test_evaluation_counts_as_one_would_by_hand(answers, several):
    random = np.random.default_rng(0)
    count = 23
    logits = random.normal(size=(count, CLASSES)).astype(np.float32).round(1)
    allowed = answers or list(range(CLASSES))
    right = np.zeros((count, CLASSES), bool)
    for row in right:
        how_many = random.integers(0, 3) if several else 1
        row[random.choice(allowed, how_many, replace=False)] = True

    def example(index: tf.Tensor) -> dict[str, tf.Tensor]:
        label = tf.constant(right)[index] if several else tf.argmax(tf.constant(right)[index])
        return {"image": tf.strings.as_string(index), "label": label, "id": ""}

    source = Source("by hand", CLASSES, {"all": indexed(count, example)}, answers=answers)
    as_image = lambda text: tf.fill((1, 1, 3), tf.strings.to_number(text))  # noqa: E731
    pipeline = Pipeline(source, Preprocessing({}, as_image))
    inputs = keras.Input((1, 1, 3))
    number = keras.ops.cast(inputs[:, 0, 0, 0], "int32")
    model = keras.Model(inputs, keras.ops.take(keras.ops.convert_to_tensor(logits), number, axis=0))
    found = judged(model, pipeline, 5, "all")
    np.testing.assert_array_equal(found["scored"], right.any(axis=1))
    for index in np.where(found["scored"])[0]:
        rank, loss = scored_by_hand(logits[index], right[index], allowed)
        assert found["rank"][index] == rank
        np.testing.assert_allclose(found["loss"][index], loss, rtol=1e-5)
        assert found["answer"][index] == min(allowed, key=lambda c: (-logits[index, c], c))
    assert classification(pipeline).summary(found)["images"] == right.any(axis=1).sum()


def test_an_unreadable_image_counts_as_wrong(folder):
    (folder / "validation/cat/2.jpg").write_bytes(b"")
    source = image_folder(str(folder))
    inputs = keras.Input((8, 8, 3))
    always_cat = keras.ops.stack([inputs[:, 0, 0, 0] * 0 + 9, inputs[:, 0, 0, 0] * 0], axis=1)
    pipeline = Pipeline(source, whole(8), broken_are_wrong=True)
    model = keras.Model(inputs, always_cat)
    found = judged(model, pipeline, 5, "validation")
    summary = classification(pipeline).summary(found)
    assert summary["images"] == 12
    assert summary["top1"] == pytest.approx(5 / 12)
    assert summary["top5"] == pytest.approx(11 / 12)
    assert np.isclose(found["loss"], np.log(2)).sum() == 1


# Memory --------------------------------------------------------------------------------------

EPOCH = """
import sys
import tensorflow as tf
from data.pipeline import Pipeline
from data.preprocess import crops
from data.source import Source, record_files
from data.synthetic import photograph

folder, files, records = sys.argv[1], 64, 50_000
images = [photograph(150, 200, seed) for seed in range(16)]
paths, lengths = [], []
for number in range(files):
    paths.append(f"{folder}/{number}")
    lengths.append(len(range(number, records, files)))
    with tf.io.TFRecordWriter(paths[-1]) as writer:
        for place in range(lengths[-1]):
            writer.write(images[place % 16])

def parse(record):
    return {"image": record, "label": tf.constant(0, tf.int64), "id": ""}

split = record_files(paths, [0] * files, lengths, parse)
pipeline = Pipeline(Source("many", 1, {"train": split}), crops(224))
seen = 0
for batch in pipeline.train_batches("train", batch_size=128, seed=0).take(records // 128):
    seen += len(batch["label"])
# Not ru_maxrss, which begins with what the process that started this one holds.
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seen, int(peak.split()[1]) / 1024)
"""


@pytest.mark.slow
def test_an_epoch_of_50000_records_takes_less_than_1500_megabytes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    seen, megabytes = done.stdout.split()
    assert int(seen) == 50_000 // 128 * 128
    assert float(megabytes) < 1500
