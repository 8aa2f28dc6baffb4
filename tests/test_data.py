"""Input: every example once, in an order that can be sought, whatever the number of hosts."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from data.augment import shift_and_rotate
from data.digits import digits
from data.order import Order
from data.pipeline import Pipeline
from data.preprocess import Preprocessing, whole
from data.source import Source, Split, indexed, record_files

# Numbers of examples in each file; none at all stands for a source without files.
LAYOUTS = {"single": None, "few files": [7, 1, 12, 4], "one file": [10], "many files": [3] * 90}
SLOW = pytest.mark.slow


def split_of(num_examples: int, files: list[int] | None, folder: pathlib.Path) -> Split:
    """Examples whose image is their own number, as text."""

    def parse(payload: tf.Tensor) -> dict[str, tf.Tensor]:
        text = payload if payload.dtype == tf.string else tf.strings.as_string(payload)
        return {"image": text, "label": tf.strings.to_number(text, tf.int64), "id": "no. " + text}

    if files is None:
        return indexed(num_examples, parse)
    paths, number = [], 0
    for place, length in enumerate(files):
        paths.append(str(folder / f"{place}.tfrecord"))
        with tf.io.TFRecordWriter(paths[-1]) as writer:
            writer.write(b"99999")  # a record of another split
            for _ in range(length):
                writer.write(str(number).encode())
                number += 1
            writer.write(b"99999")
    return record_files(paths, [1] * len(files), files, parse)


def numbered(split: Split, **arguments) -> Pipeline:
    """Images that hold their own number; training adds a draw of its key."""

    def evaluate(encoded: tf.Tensor) -> tf.Tensor:
        return tf.fill((1, 1, 1), tf.strings.to_number(encoded))

    def train(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.concat([evaluate(encoded), tf.random.stateless_uniform((1, 1, 1), seed)], -1)

    source = Source("numbered", split.num_examples, {"all": split})
    return Pipeline(source, Preprocessing({"all": train}, evaluate), **arguments)


@pytest.fixture(
    params=[
        "single",
        "few files",
        pytest.param("one file", marks=SLOW),
        pytest.param("many files", marks=SLOW),
    ]
)
def split(request, tmp_path) -> Split:
    files = LAYOUTS[request.param]
    return split_of(sum(files or [17]), files, tmp_path)


def take(batches: tf.data.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    read = list(batches.take(count).as_numpy_iterator())
    return np.stack([b["label"] for b in read]), np.stack([b["image"] for b in read])


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=SLOW), 3, 8])
def test_an_epoch_holds_each_example_at_most_once_and_leaves_out_less_than_a_batch(
    split, batch_size
):
    order = Order(split, batch_size, seed=3)
    assert order.steps == split.num_examples // batch_size
    labels, images = take(
        numbered(split).train_batches("all", batch_size=batch_size, seed=3), 3 * order.steps
    )
    np.testing.assert_array_equal(labels, images[:, :, 0, 0, 0])
    epochs = labels.reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(split.num_examples))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other, _ = take(numbered(split).train_batches("all", batch_size=batch_size, seed=4), 3)
    assert tuple(other.ravel()) != tuple(labels[:3].ravel())


@pytest.mark.parametrize("batch_size", [18, 40])
def test_a_batch_larger_than_an_epoch_takes_several_passes(batch_size):
    labels, _ = take(
        numbered(split_of(17, None, None)).train_batches("all", batch_size=batch_size, seed=0), 4
    )
    for batch in labels:
        counts = np.bincount(batch, minlength=17)
        assert counts.max() - counts.min() <= 1
        assert sorted(batch[:17]) == list(range(17))


def test_no_place_of_an_epoch_prefers_an_example():
    """Over many epochs each example comes first about equally often (chi-square, p > 1e-6)."""
    pipeline = numbered(split_of(8, None, None))
    labels, _ = take(pipeline.train_batches("all", batch_size=8, seed=0), 2000)
    counts = np.bincount(labels[:, 0], minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 45


def test_neighbours_in_a_file_do_not_stay_neighbours(tmp_path):
    """In one large file, blocks are shuffled anew in each epoch."""
    split = split_of(500, [500], tmp_path)
    labels, _ = take(numbered(split).train_batches("all", batch_size=50, seed=0), 20)
    for epoch in labels.reshape(2, 500):
        assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.02
    assert np.mean(labels[:10].ravel() == labels[10:].ravel()) < 0.02


@pytest.mark.parametrize("start", [1, pytest.param(5, marks=SLOW), 23])
def test_starting_at_a_step_gives_the_same_batches_bit_for_bit(split, start):
    pipeline = numbered(split)
    labels, images = take(pipeline.train_batches("all", batch_size=4, seed=1), start + 6)
    sought = take(pipeline.train_batches("all", batch_size=4, seed=1, start=start), 6)
    np.testing.assert_array_equal(labels[start:], sought[0])
    np.testing.assert_array_equal(images[start:], sought[1])


def test_a_seek_across_large_files_and_blocks_is_exact(tmp_path):
    split = split_of(2300, [900, 700, 700], tmp_path)
    pipeline = numbered(split)
    labels, images = take(pipeline.train_batches("all", batch_size=6, seed=1), 800)
    for start in (57, 383, 700):
        sought = take(pipeline.train_batches("all", batch_size=6, seed=1, start=start), 3)
        np.testing.assert_array_equal(labels[start : start + 3], sought[0])
        np.testing.assert_array_equal(images[start : start + 3], sought[1])


@pytest.mark.parametrize("num_shards", [3, *(pytest.param(n, marks=SLOW) for n in (2, 4, 5))])
def test_shards_together_are_the_batches_of_one(split, num_shards):
    pipeline, size = numbered(split), 2 * num_shards
    whole = take(pipeline.train_batches("all", batch_size=size, seed=1, start=1), 5)
    parts = [
        take(
            pipeline.train_batches(
                "all", batch_size=2, seed=1, start=1, shard=s, num_shards=num_shards
            ),
            5,
        )
        for s in range(num_shards)
    ]
    for column in (0, 1):
        together = np.concatenate([part[column] for part in parts], axis=1)
        np.testing.assert_array_equal(whole[column], together)


def test_a_host_opens_only_the_files_of_its_own_lanes(tmp_path):
    split = split_of(640, [10] * 64, tmp_path)
    opened = []

    def read(segments: tf.data.Dataset) -> tf.data.Dataset:
        def note(part: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> tuple:
            [part] = tf.numpy_function(lambda p: opened.append(int(p)) or p, [part], [tf.int64])
            return tf.ensure_shape(part, ()), first, count

        return split.read(segments.map(note))

    watched = Split(split.lengths, read, split.parse, split.sequential)
    order = Order(watched, 32, seed=0)
    for _ in order.batches(0, shard=0, num_shards=4).take(order.steps):
        pass
    assert len(set(opened)) <= 64 / 4 + 2 * order.streams


@pytest.mark.parametrize("num_shards", [1, 3, *(pytest.param(n, marks=SLOW) for n in (2, 4, 5))])
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=SLOW), 5])
def test_evaluation_sees_each_example_once_and_marks_the_rest(split, batch_size, num_shards):
    pipeline, index, labels, lengths = numbered(split), [], [], set()
    for shard in range(num_shards):
        batches = list(
            pipeline.eval_batches(
                "all", batch_size=batch_size, shard=shard, num_shards=num_shards
            ).as_numpy_iterator()
        )
        assert all(batch["label"].shape == (batch_size,) for batch in batches)
        assert all(batch["readable"].all() for batch in batches)
        index += [batch["index"] for batch in batches]
        labels += [batch["label"] for batch in batches]
        lengths.add(len(batches))
    assert len(lengths) == 1
    index, labels = np.concatenate(index), np.concatenate(labels)
    assert sorted(index[index >= 0]) == list(range(split.num_examples))
    np.testing.assert_array_equal(labels[index >= 0], index[index >= 0])


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="numbered has no split 'train'; it has all"):
        numbered(split_of(3, None, None)).num_examples("train")


def test_a_late_start_says_how_far_it_reads(tmp_path, caplog):
    split = split_of(24, [7, 1, 12, 4], tmp_path)
    numbered(split).train_batches("all", batch_size=4, seed=1, start=8)
    assert "going on at step 2 of 6 in epoch 1, behind at most 48 records" in caplog.text


def broken(split: Split, which: set[int]) -> Split:
    """The same split, but some images are not to be read."""
    names = tf.constant([str(number) for number in sorted(which)])

    def parse(payload: tf.Tensor) -> dict[str, tf.Tensor]:
        record = split.parse(payload)
        ruined = tf.reduce_any(record["image"] == names)
        return record | {"image": tf.where(ruined, "no number", record["image"])}

    return Split(split.lengths, split.read, parse, split.sequential)


def test_training_skips_broken_images_and_names_them(split, caplog):
    damaged = numbered(broken(split, {2, 5, 6}), max_broken=3)
    steps = Order(split, 5, seed=1).steps
    whole = take(numbered(split).train_batches("all", batch_size=5, seed=1), 2 * steps)
    some = take(damaged.train_batches("all", batch_size=5, seed=1), 2 * steps)
    assert not np.isin(some[0], [2, 5, 6]).any()
    for before, after in zip(whole[0], some[0], strict=True):
        assert set(after) == set(before) - {2, 5, 6}
    assert caplog.text.count("cannot be read") == 3
    assert "numbered: no. 5 cannot be read (StringToNumberOp could not" in caplog.text
    assert "broken image 3 of 3 allowed" in caplog.text
    sought = take(damaged.train_batches("all", batch_size=5, seed=1, start=2), steps)
    np.testing.assert_array_equal(some[1][2 : 2 + steps], sought[1])


def test_too_many_broken_images_stop_training(split):
    damaged = numbered(broken(split, {2, 5, 6}), max_broken=2)
    with pytest.raises(
        tf.errors.OpError,
        match="and 2 broken images are allowed: mend or remove it, or raise pipeline.max_broken",
    ):
        take(damaged.train_batches("all", batch_size=5, seed=1), 2 * Order(split, 5, 1).steps)


def test_a_batch_of_broken_images_stops_training():
    damaged = numbered(broken(split_of(4, None, None), {0, 1, 2, 3}), max_broken=9)
    with pytest.raises(tf.errors.OpError, match="every image of a batch is broken"):
        take(damaged.train_batches("all", batch_size=2, seed=1), 2)


def test_a_broken_image_stops_evaluation_by_its_name(split):
    with pytest.raises(
        tf.errors.OpError, match=r"numbered: no\. 5 cannot be read .*broken_are_wrong = T"
    ):
        take(numbered(broken(split, {5})).eval_batches("all", batch_size=4), 99)


def test_a_broken_image_counts_as_unreadable_if_the_config_allows_it(split, caplog):
    pipeline = numbered(broken(split, {2, 5}), broken_are_wrong=True)
    batches = list(pipeline.eval_batches("all", batch_size=4).as_numpy_iterator())
    index = np.concatenate([batch["index"] for batch in batches])
    readable = np.concatenate([batch["readable"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sorted(index[index >= 0]) == list(range(split.num_examples))
    assert sorted(index[~readable]) == [2, 5]
    np.testing.assert_array_equal(labels[index >= 0], index[index >= 0])
    assert caplog.text.count("cannot be read") == 2


def test_a_failure_that_passes_is_not_taken_for_a_broken_image():
    split, failures = split_of(8, None, None), iter([True])

    def flaky(payload: tf.Tensor) -> dict[str, tf.Tensor]:
        def fail(text: bytes) -> bytes:
            if next(failures, False):
                raise OSError("the disk stumbled")
            return text

        record = split.parse(payload)
        text = tf.ensure_shape(tf.numpy_function(fail, [record["image"]], tf.string), ())
        return record | {"image": text}

    pipeline = numbered(Split(split.lengths, split.read, flaky, False), max_broken=5)
    with pytest.raises(tf.errors.OpError, match="a batch failed that can be read now"):
        take(pipeline.train_batches("all", batch_size=4, seed=1), 2)


def test_digits_are_split_once_and_for_all_by_class():
    pipeline = Pipeline(digits(), whole())
    sizes = {name: split.num_examples for name, split in pipeline.source.splits.items()}
    assert sizes == {"train": 1293, "minival": 144, "test": 360}
    target = load_digits().target
    everything = []
    for name in sizes:
        batches = pipeline.eval_batches(name, batch_size=sizes[name])
        labels = next(iter(batches))["label"].numpy()
        everything.append(labels)
        share = np.bincount(labels) / len(labels)
        np.testing.assert_allclose(share, np.bincount(target) / len(target), atol=0.01)
    np.testing.assert_array_equal(np.bincount(np.concatenate(everything)), np.bincount(target))


def test_digits_are_the_scans_scaled_up():
    pipeline = Pipeline(digits(), whole(image_size=8))
    images = next(iter(pipeline.eval_batches("test", batch_size=360)))["image"]
    scans = (load_digits().images * (255 / 16)).round()
    known = {scan.astype(np.uint8).tobytes() for scan in scans}
    for image in images.numpy():
        assert image[..., 0].tobytes() in known
        np.testing.assert_array_equal(image[..., 0], image[..., 2])
    large = Pipeline(digits(), whole(image_size=32)).eval_batches("test", batch_size=2)
    assert next(iter(large))["image"].shape == (2, 32, 32, 3)
    assert next(iter(large))["image"].dtype == tf.uint8


def blob(row: int, column: int) -> np.ndarray:
    image = np.zeros((33, 33, 1), np.uint8)
    image[row - 1 : row + 2, column - 1 : column + 2] = 255
    return image


def centre(image: np.ndarray) -> np.ndarray:
    weights = image[..., 0] / image.sum()
    return np.array([(np.arange(33)[:, None] * weights).sum(), (np.arange(33) * weights).sum()])


def draws(seed: int) -> np.ndarray:
    return tf.random.stateless_uniform([3], [seed, 0], -1, 1).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_moves_by_the_drawn_share(seed):
    moved = shift_and_rotate(tf.constant(blob(16, 16)), [seed, 0], 0.2, 0.0).numpy()
    shift = draws(seed)[1:] * 0.2 * 33
    np.testing.assert_allclose(centre(moved), 16 - shift, atol=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_rotation_turns_about_the_centre_by_the_drawn_angle(seed):
    turned = shift_and_rotate(tf.constant(blob(16, 26)), [seed, 0], 0.0, 45.0).numpy()
    angle = np.deg2rad(draws(seed)[0] * 45)
    wanted = 16 + 10 * np.array([-np.sin(angle), np.cos(angle)])
    np.testing.assert_allclose(centre(turned), wanted, atol=0.15)


def test_no_shift_and_no_rotation_change_nothing():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    same = shift_and_rotate(tf.constant(image), [0, 0], 0.0, 0.0)
    np.testing.assert_array_equal(same.numpy(), image)


@pytest.mark.parametrize("arguments", [{"max_shift": -1.0}, {"max_degrees": -1}])
def test_bad_arguments_of_a_shift_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        shift_and_rotate(tf.zeros((8, 8, 3), tf.uint8), [0, 0], **arguments)
