"""What is drawn for training images is spread as the official recipe spreads it.

Sources of the expectations: for AutoAugment and RandAugment, tensorflow/tpu,
models/official/efficientnet/autoaugment.py, in the notation of the policy's paper; for crops, what
TensorFlow's kernel of sample_distorted_bounding_box does, simulated with numpy's own generator.
"""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from data import augment, autoaugment, preprocess

DRAWS = 20_000
SURE = 1e-4  # a statistic less likely than that is a failure


def drawn(function, count: int = DRAWS) -> np.ndarray:
    """Calls a function with ``count`` seeds, the way a pipeline does."""
    seeds = tf.data.Dataset.range(count).map(lambda place: tf.stack([7, place]))
    mapped = seeds.map(function, num_parallel_calls=tf.data.AUTOTUNE)
    return next(iter(mapped.batch(count))).numpy()


def assert_shares(counts: np.ndarray, shares: np.ndarray) -> None:
    """Chi-square; what has no share at all must not have come at all."""
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    possible = shares > 1e-9
    assert not counts[~possible].any()
    expected = shares[possible] * counts.sum()
    if len(expected) > 1:
        assert stats.chisquare(counts[possible], expected).pvalue > SURE


def test_half_of_the_images_are_flipped():
    image = tf.constant([[[0, 0, 0], [1, 1, 1]]], tf.uint8)
    flipped = drawn(lambda seed: augment.random_flip(image, seed)[0, 0, 0])
    assert_shares(np.bincount(flipped, minlength=2), [0.5, 0.5])


# Policy v0: of each sub-policy, operation, tenths of probability and level, twice.
RECIPE = """
Equalize 8 1 ShearY 8 4 | Color 4 9 Equalize 6 3 | Color 4 1 Rotate 6 8
Solarize 8 3 Equalize 4 7 | Solarize 4 2 Solarize 6 2 | Color 2 0 Equalize 8 8
Equalize 4 8 SolarizeAdd 8 3 | ShearX 2 9 Rotate 6 8 | Color 6 1 Equalize 10 2
Invert 4 9 Rotate 6 0 | Equalize 10 9 ShearY 6 3 | Color 4 7 Equalize 6 0
Posterize 4 6 AutoContrast 4 7 | Solarize 6 8 Color 6 9 | Solarize 2 4 Rotate 8 9
Rotate 10 7 TranslateY 8 9 | ShearX 0 0 Solarize 8 4 | ShearY 8 0 Color 6 4
Color 10 0 Rotate 6 2 | Equalize 8 4 Equalize 0 8 | Equalize 10 4 AutoContrast 6 2
ShearY 4 7 SolarizeAdd 6 7 | Posterize 8 2 Solarize 6 10 | Solarize 6 8 Equalize 6 1
Color 8 6 Rotate 4 5
"""
ENTRIES = [entry.split() for entry in RECIPE.strip().replace("\n", "|").split("|")]
POLICY = [
    tuple((entry[i], int(entry[i + 1]) / 10, int(entry[i + 2])) for i in (0, 3))
    for entry in ENTRIES
]
# What a level of AutoAugment means, and which values come with either sign.
VALUES = {
    "ShearX": lambda level: 0.3 * level / 10,
    "ShearY": lambda level: 0.3 * level / 10,
    "TranslateX": lambda level: 250 * level / 10,
    "TranslateY": lambda level: 250 * level / 10,
    "Rotate": lambda level: 30 * level / 10,
    "Posterize": lambda level: int(4 * level / 10),
    "Solarize": lambda level: int(256 * level / 10),
    "SolarizeAdd": lambda level: int(110 * level / 10),
    "Color": lambda level: 0.1 + 1.8 * level / 10,
    "Contrast": lambda level: 0.1 + 1.8 * level / 10,
    "Brightness": lambda level: 0.1 + 1.8 * level / 10,
    "Sharpness": lambda level: 0.1 + 1.8 * level / 10,
}
SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
NAMES = list(autoaugment.OPERATIONS)


def notes(monkeypatch) -> tf.Tensor:
    """Has each operation note its number and value, instead of changing an image.

    Returns:
        An empty list of four notes, (4, 2), to be passed in place of the image.
    """

    def note(number):
        def apply(written, value, *seed, **variant):
            pair = tf.stack([float(number), tf.cast(value, tf.float32)])
            return tf.concat([pair[None], written[:-1]], axis=0)

        return apply

    for number, name in enumerate(NAMES):
        row = dataclasses.replace(autoaugment.OPERATIONS[name], apply=note(number))
        monkeypatch.setitem(autoaugment.OPERATIONS, name, row)
    last = autoaugment.Operation(note(len(NAMES)), scale=10.0)  # its value is its level
    monkeypatch.setitem(autoaugment.OPERATIONS, "Choice", last)
    return tf.fill((4, 2), -1.0)


@pytest.fixture(scope="module")
def auto_augmented() -> np.ndarray:
    """Returns notes (DRAWS, 4, 2), latest first; the first is the number of the sub-policy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        empty = notes(monkeypatch)
        numbered = [
            (*pair, ("Choice", 1.0, number)) for number, pair in enumerate(autoaugment.POLICY_V0)
        ]
        monkeypatch.setattr(autoaugment, "POLICY_V0", tuple(numbered))
        return drawn(lambda seed: autoaugment.auto_augment(empty, seed))


def test_the_policy_is_that_of_the_recipe():
    assert tuple(POLICY) == autoaugment.POLICY_V0
    assert len(NAMES) == 16


def test_sub_policies_come_equally_often(auto_augmented):
    assert np.all(auto_augmented[:, 0, 0] == len(NAMES))
    choices = auto_augmented[:, 0, 1].astype(int)
    assert_shares(np.bincount(choices, minlength=25), np.full(25, 1 / 25))


@pytest.mark.parametrize("number", range(25))
def test_a_sub_policy_applies_each_operation_as_often_as_the_recipe_says(auto_augmented, number):
    mine = auto_augmented[auto_augmented[:, 0, 1] == number]
    seen = collections.Counter(
        tuple(NAMES[int(place)] for place in row if place >= 0) for row in mine[:, 2:0:-1, 0]
    )
    expected = collections.Counter()
    (first, p, _), (second, q, _) = POLICY[number]
    expected[first, second] += p * q
    expected[first,] += p * (1 - q)
    expected[second,] += (1 - p) * q  # the same outcome where both are the same operation
    expected[()] += (1 - p) * (1 - q)
    assert set(seen) <= set(expected)
    assert_shares([seen[outcome] for outcome in expected], list(expected.values()))


@pytest.mark.parametrize("number", range(25))
def test_a_sub_policy_applies_the_values_of_the_recipe(auto_augmented, number):
    mine = auto_augmented[auto_augmented[:, 0, 1] == number][:, 1:3].reshape(-1, 2)
    for name in {name for name, _, _ in POLICY[number]} & set(VALUES):
        got = mine[mine[:, 0] == NAMES.index(name), 1]
        levels = {level for other, p, level in POLICY[number] if other == name and p}
        wanted = {np.float32(VALUES[name](level)) for level in levels}
        assert set(np.abs(got)) == wanted
        if name not in SIGNED:
            assert np.all(got >= 0)
        elif wanted and wanted != {0}:
            assert stats.binomtest(int(np.sum(got > 0)), len(got)).pvalue > SURE


def test_signs_come_equally_often_and_independently(auto_augmented):
    numbers = [NAMES.index(name) for name in SIGNED]
    latest_and_first = auto_augmented[:, 1:3]
    signed = np.isin(latest_and_first[..., 0], numbers) & (latest_and_first[..., 1] != 0)
    positive = latest_and_first[..., 1] > 0
    for place in (0, 1):
        signs = positive[signed[:, place], place]
        assert stats.binomtest(int(signs.sum()), len(signs)).pvalue > SURE
    pairs = positive[signed.all(axis=1)] @ [1, 2]
    assert len(pairs) > 500
    assert_shares(np.bincount(pairs, minlength=4), np.full(4, 1 / 4))


def test_rand_augment_draws_of_sixteen_operations_equally_often_and_independently(monkeypatch):
    empty = notes(monkeypatch)
    monkeypatch.delitem(autoaugment.OPERATIONS, "Choice")
    got = drawn(lambda seed: autoaugment.rand_augment(empty, seed, layers=2, magnitude=5.0))
    latest, first = got[:, 0, 0].astype(int), got[:, 1, 0].astype(int)
    assert np.all(got[:, 2:] == -1)
    assert_shares(np.bincount(16 * latest + first, minlength=256), np.full(256, 1 / 256))
    values = {**VALUES, "TranslateX": lambda level: 10.0 * level}  # 100 pixels at level 10
    values |= {"TranslateY": values["TranslateX"], "Cutout": lambda level: 4.0 * level}
    for name, value in values.items():
        seen = got[latest == NAMES.index(name), 0, 1]
        assert set(np.abs(seen)) == {np.float32(value(5))}, name
        if name in SIGNED:
            assert stats.binomtest(int(np.sum(seen > 0)), len(seen)).pvalue > SURE
        else:
            assert np.all(seen > 0)


AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # the recipe's


def simulated_boxes(height: int, width: int, count: int) -> np.ndarray:
    """TensorFlow's sampler with the recipe's arguments.

    Returns:
        (count, 4) of top, left, height, width; those of the whole image if ten attempts failed.
    """
    rng = np.random.RandomState(1)
    boxes = np.tile([0, 0, height, width], (count, 1))
    left = np.arange(count)
    for _ in range(10):
        box, fits = attempt(rng, height, width, len(left))
        boxes[left[fits]] = box[fits]
        left = left[~fits]
    return boxes


def attempt(rng, height: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws boxes (count, 4), and says which of them fit.

    An aspect ratio is drawn evenly, then a height, evenly among the integers from the one that
    gives the smallest area up to the one that gives the largest or fills the image. If rounding
    puts the area out of bounds, one pixel more or less is tried. Too little is seen below a tenth
    of the image, though the smallest area is 8 %. Top and left are drawn evenly, but never so
    that the box touches the bottom or the right, unless it fills the image.
    """
    aspect = rng.uniform(*ASPECT, count).astype(np.float32)
    least, most = (np.float32(share) * np.float32(height * width) for share in AREA)

    def wide(tall):
        return np.rint(tall * aspect).astype(int)

    highest = np.rint(np.sqrt(most / aspect)).astype(int)
    filling = np.floor((width + 0.5) / aspect).astype(int)
    filling -= wide(filling) > width
    highest = np.minimum(np.where(wide(highest) > width, filling, highest), height)
    lowest = np.minimum(np.rint(np.sqrt(least / aspect)).astype(int), highest)
    tall = lowest + np.floor(rng.uniform(size=count) * (highest - lowest + 1)).astype(int)
    tall += tall * wide(tall) < least
    tall -= tall * wide(tall) > most
    extent = np.stack([tall, wide(tall)], axis=1)
    area = extent.prod(axis=1)
    seen = area.astype(np.float32) / np.float32(height * width)
    fits = (area >= least) & (area <= most) & np.all(extent <= [height, width], axis=1)
    corner = np.floor(rng.uniform(size=extent.shape) * ([height, width] - extent)).astype(int)
    return np.concatenate([corner, extent], axis=1), fits & (seen >= np.float32(0.1))


def with_centre(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts the centre of evaluation where a box is the whole image; says where."""
    side = int(np.float32(224 / 256) * np.float32(min(height, width)))
    whole = np.all(boxes == [0, 0, height, width], axis=1)
    centre = [(height - side + 1) // 2, (width - side + 1) // 2, side, side]
    return np.where(whole[:, None], centre, boxes), whole


def crops(height: int, width: int, count: int = DRAWS) -> np.ndarray:
    def box(seed):
        return preprocess.distorted_box(tf.constant([height, width]), seed, 224)

    return drawn(box, count)


MEASURES = {
    "area": lambda box: box[:, 2] * box[:, 3],
    "aspect ratio": lambda box: box[:, 3] / box[:, 2],
    "height": lambda box: box[:, 2],
    "width": lambda box: box[:, 3],
    "top": lambda box: box[:, 0],
    "left": lambda box: box[:, 1],
    "middle of the height": lambda box: 2 * box[:, 0] + box[:, 2],
    "middle of the width": lambda box: 2 * box[:, 1] + box[:, 3],
}


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 333), (64, 64), (500, 500), (48, 160), (30, 360)]
)
def test_crops_are_spread_as_those_of_tensorflows_sampler(size):
    got = crops(*size)
    wanted, _ = with_centre(simulated_boxes(*size, 10 * DRAWS), *size)
    for name, measure in MEASURES.items():
        ours, theirs = measure(got), measure(wanted)
        assert stats.ks_2samp(ours, theirs).pvalue > SURE, name
        low, high = np.quantile(theirs, (0.001, 0.999))  # the test is blind to the very ends
        assert ours.min() <= low <= high <= ours.max(), name
        assert theirs.min() <= np.quantile(ours, 0.001) <= np.quantile(ours, 0.999) <= theirs.max()
    centre, _ = with_centre(np.array([[0, 0, *size]]), *size)
    sampled = got[np.any(got != centre, axis=1)]
    assert MEASURES["area"](sampled).min() >= 0.1 * np.prod(size)


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 50)])
def test_where_no_crop_can_fit_it_is_always_the_centre(size):
    whole = np.array([[0, 0, *size]])
    assert np.all(simulated_boxes(*size, 1000) == whole)
    centre, _ = with_centre(whole, *size)
    np.testing.assert_array_equal(crops(*size, 500), np.tile(centre, (500, 1)))


@pytest.mark.parametrize("size", [(30, 360), (360, 30), (41, 500)])
def test_where_a_crop_rarely_fits_it_is_the_centre_as_often_as_ten_attempts_fail(size):
    got = crops(*size)
    wanted, failed = with_centre(simulated_boxes(*size, 10 * DRAWS), *size)
    assert 0.02 < failed.mean() < 0.98
    # No crop is as small as the centre of so thin an image: where it is the centre, all failed.
    centre = np.all(got == wanted[failed][0], axis=1)
    assert 0.1 * np.prod(size) > np.prod(wanted[failed][0, 2:])
    table = [[np.sum(fell_back), np.sum(~fell_back)] for fell_back in (centre, failed)]
    assert stats.chi2_contingency(table).pvalue > SURE
