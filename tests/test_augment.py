"""Erasing, jitter and flips: what they draw and what they do, against independent references."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import stats

from data import augment

MEAN = 255 * np.array([0.485, 0.456, 0.406])
DEVIATION = 255 * np.array([0.229, 0.224, 0.225])
GREY = np.array([0.2989, 0.587, 0.114])

SURE = 1e-4  # a statistic less likely than that is a failure


def drawn(function, image, count: int, **arguments) -> np.ndarray:
    """Applies a function to one image with ``count`` seeds, the way a pipeline does."""
    function = functools.partial(function, **arguments)
    seeds = tf.stack([tf.range(count), tf.fill([count], 3)], axis=1)
    seeds = tf.data.Dataset.from_tensor_slices(seeds)
    mapped = seeds.map(lambda seed: function(image, seed), num_parallel_calls=tf.data.AUTOTUNE)
    return next(iter(mapped.batch(count))).numpy()


def photo(height: int = 12, width: int = 9, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(dtype)


FUNCTIONS = {
    "random_flip": augment.random_flip,
    "random_erasing": functools.partial(augment.random_erasing, probability=0.5),
    "color_jitter": functools.partial(augment.color_jitter, hue=0.1),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_seed_decides_everything_and_shape_and_type_stay(name, dtype):
    image = photo(dtype=dtype)
    compiled = drawn(FUNCTIONS[name], image, 12)
    assert compiled.dtype == dtype
    eager = [FUNCTIONS[name](image, [seed, 3]).numpy() for seed in range(12)]
    np.testing.assert_allclose(compiled, eager, atol=1e-3 if dtype == np.float32 else 0)
    assert len({output.tobytes() for output in compiled}) > 1
    traced = tf.function(FUNCTIONS[name]).get_concrete_function(
        tf.TensorSpec((None, None, 3), dtype), tf.TensorSpec((2,), tf.int64)
    )
    assert traced.output_shapes.as_list() == [None, None, 3]
    assert traced(tf.constant(image), tf.constant([5, 3], tf.int64)).shape == image.shape


def test_a_flip_swaps_left_and_right_and_touches_no_value():
    image = photo(dtype=np.float32) * 2 - 99
    flips = drawn(augment.random_flip, image, 20)
    flipped = np.all(flips == image[:, ::-1], axis=(1, 2, 3))
    kept = np.all(flips == image, axis=(1, 2, 3))
    assert np.all(flipped ^ kept)
    assert 0 < flipped.sum() < 20


def rectangles(height: int, width: int, count: int, **arguments) -> np.ndarray:
    """Returns (top, left, height, width) of what is erased, all 0 where nothing is."""

    def erased(image, seed):
        constant = augment.random_erasing(image, seed, fill="constant", **arguments)
        return tf.reduce_any(tf.abs(constant - MEAN) < 1e-3, axis=-1)

    inside = drawn(erased, tf.zeros((height, width, 3)), count)
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    boxes = np.stack(
        [rows.argmax(axis=1), columns.argmax(axis=1), rows.sum(axis=1), columns.sum(axis=1)], axis=1
    )
    np.testing.assert_array_equal(inside.sum(axis=(1, 2)), boxes[:, 2] * boxes[:, 3])
    ends = boxes[:, :2] + boxes[:, 2:]
    last = (height - rows[:, ::-1].argmax(axis=1), width - columns[:, ::-1].argmax(axis=1))
    found = boxes[:, 2] > 0
    np.testing.assert_array_equal(ends[found], np.stack(last, axis=1)[found])
    return boxes


def simulated_rectangles(height, width, count, area, aspect_ratio) -> np.ndarray:
    """The same from the description in timm, with numpy's generator."""
    rng = np.random.RandomState(0)
    boxes = np.zeros((count, 4), int)
    for box in boxes:
        for _ in range(10):
            pixels = rng.uniform(*area) * height * width
            aspect = np.exp(rng.uniform(*np.log(aspect_ratio)))
            h, w = round(np.sqrt(pixels * aspect)), round(np.sqrt(pixels / aspect))
            if h < height and w < width:
                box[:] = rng.randint(0, height - h + 1), rng.randint(0, width - w + 1), h, w
                break
    return boxes


@pytest.mark.parametrize(
    ("size", "area", "aspect_ratio"),
    [
        ((31, 44), (0.02, 1 / 3), (0.3, 3.3)),
        ((44, 31), (0.1, 0.6), (0.2, 2.0)),
        ((24, 60), (0.7, 1.0), (0.5, 8.0)),  # most attempts fail, and some images get none
    ],
)
def test_rectangles_are_spread_as_those_of_an_independent_sampler(size, area, aspect_ratio):
    count = 10_000
    got = rectangles(*size, count, probability=1, area=area, aspect_ratio=aspect_ratio)
    wanted = simulated_rectangles(*size, count, area, aspect_ratio)
    found = [boxes[:, 2] > 0 for boxes in (got, wanted)]
    if not all(every.all() for every in found):
        table = [[every.sum(), (~every).sum()] for every in found]
        assert stats.chi2_contingency(table).pvalue > SURE
    got, wanted = got[found[0]], wanted[found[1]]
    for what in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 2] / b[:, 3],  # aspect ratio
        lambda b: b[:, 0] / (size[0] - b[:, 2]),
        lambda b: b[:, 1] / (size[1] - b[:, 3]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert stats.ks_2samp(what(got), what(wanted)).pvalue > SURE


@pytest.mark.parametrize("probability", [0, 0.25, 0.8, 1])
def test_an_image_is_erased_as_often_as_asked(probability):
    erased = np.sum(rectangles(16, 16, 4000, probability=probability)[:, 2] > 0)
    assert stats.binomtest(int(erased), 4000, probability).pvalue > SURE


def test_a_constant_patch_is_the_mean_and_the_rest_of_the_image_stays():
    image = photo(31, 44)
    boxes = rectangles(31, 44, 50, probability=0.7)
    erased = drawn(augment.random_erasing, image, 50, probability=0.7, fill="constant")
    for (top, left, height, width), got in zip(boxes, erased, strict=True):
        wanted = image.copy()
        wanted[top : top + height, left : left + width] = [124, 116, 104]
        np.testing.assert_array_equal(got, wanted)


def test_noise_has_the_mean_and_deviation_of_imagenet():
    arguments = {"probability": 1, "area": (0.5, 0.6), "aspect_ratio": (1, 1)}
    top, left, height, width = rectangles(60, 60, 1, **arguments)[0]
    inside = np.s_[:, top : top + height, left : left + width]
    image = photo(60, 60, np.float32)
    noisy = drawn(augment.random_erasing, image, 1, **arguments)
    noise = noisy[inside].reshape(-1, 3)
    for channel, mean, deviation in zip(noise.T, MEAN, DEVIATION, strict=True):
        assert stats.kstest(channel, "norm", (mean, deviation)).pvalue > SURE
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert stats.pearsonr(noise[:, a], noise[:, b]).pvalue > SURE
    assert stats.pearsonr(noise[1:, 0], noise[:-1, 0]).pvalue > SURE
    whole = drawn(augment.random_erasing, image.astype(np.uint8), 1, **arguments)
    np.testing.assert_array_equal(whole, np.clip(np.rint(noisy), 0, 255))
    noisy[inside] = image[inside[1:]]
    np.testing.assert_array_equal(noisy[0], image)


def test_where_no_rectangle_fits_the_image_stays():
    image = photo()
    erased = drawn(augment.random_erasing, image, 20, probability=1, area=(1.0, 1.0))
    np.testing.assert_array_equal(erased, np.stack([image] * 20))


def test_what_is_not_erased_costs_a_draw_and_a_branch():
    traced = tf.function(augment.random_erasing).get_concrete_function(
        tf.TensorSpec((224, 224, 3), tf.uint8), tf.TensorSpec((2,), tf.int32)
    )
    outside = [operation.type for operation in traced.graph.get_operations()]
    assert "If" in "".join(outside)
    assert not {"Pad", "PadV2", "SelectV2", "Cast", "Sqrt"} & set(outside)
    assert not any("Normal" in operation for operation in outside)


def fade(pixels: np.ndarray, towards: np.ndarray | float, factor: np.ndarray) -> np.ndarray:
    return factor * pixels + (1 - factor) * towards


def turn_hue(pixels: np.ndarray, turns: np.ndarray) -> np.ndarray:
    hue, saturation, value = np.moveaxis(rgb_to_hsv(pixels / 255), -1, 0)
    hue, saturation, value = np.broadcast_arrays(hue + turns[..., 0], saturation, value)
    return 255 * hsv_to_rgb(np.stack([hue % 1, saturation, value], axis=-1))


def change(kind: str, pixels: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Changes images (N, H, W, 3) in double precision, each by its own amount."""
    amount = np.reshape(amount, (-1, 1, 1, 1))
    grey = np.sum(pixels * GREY, axis=-1, keepdims=True)
    changed = {
        "brightness": lambda: fade(pixels, 0, amount),
        "contrast": lambda: fade(pixels, grey.mean(axis=(1, 2, 3), keepdims=True), amount),
        "saturation": lambda: fade(pixels, grey, amount),
        "hue": lambda: turn_hue(pixels, amount),
    }[kind]()
    return np.clip(changed, 0, 255)


# Pixels that no amount below 2.5 drives to 0 or 255, and how to read the amount off the result.
PROBE = np.float32([[[100, 80, 90], [60, 85, 75]]])
READ = {
    "brightness": lambda out: out[:, 0, 0, 0] / 100,
    "contrast": lambda out: (out[:, 0, 0, 0] - out[:, 0, 1, 0]) / 40,
    "saturation": lambda out: (out[:, 0, 0, 0] - out[:, 0, 0, 1]) / 20,
    "hue": lambda out: (
        (rgb_to_hsv(out[:, 0, 0] / 255)[:, 0] - rgb_to_hsv(PROBE[0, 0] / 255)[0] + 0.5) % 1 - 0.5
    ),
}
NONE = dict.fromkeys(READ, 0)


def amounts(kind: str, strength: float, count: int) -> np.ndarray:
    """Returns by how much each seed changes one thing."""
    changed = drawn(augment.color_jitter, PROBE, count, **{**NONE, kind: strength})
    amount = READ[kind](changed.astype(np.float64))
    np.testing.assert_allclose(changed, change(kind, PROBE[None], amount), atol=1e-3)
    return amount


@pytest.mark.parametrize(
    ("kind", "strength", "low", "high"),
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.4, 0.6, 1.4),
        ("contrast", 1.5, 0, 2.5),
        ("saturation", 0.4, 0.6, 1.4),
        ("saturation", 1.2, 0, 2.2),
        ("hue", 0.1, -0.1, 0.1),
        ("hue", 0.5, -0.5, 0.5),
    ],
)
def test_each_change_is_the_reference_and_its_amount_evenly_drawn(kind, strength, low, high):
    amount = amounts(kind, strength, 4000)
    assert stats.kstest(amount, "uniform", (low, high - low)).pvalue > SURE
    assert amount.min() < low + (high - low) / 100
    assert amount.max() > high - (high - low) / 100


def test_amounts_are_drawn_independently_of_one_another():
    drawn_amounts = [amounts(kind, 0.4, 2000) for kind in READ]
    for a, b in itertools.combinations(drawn_amounts, 2):
        assert stats.spearmanr(a, b).pvalue > SURE


def test_changes_are_those_of_the_reference_in_one_of_24_equally_frequent_orders():
    count, image = 6000, photo(4, 3, np.float32)
    strengths = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    got = drawn(augment.color_jitter, image, count, **strengths)
    each = {kind: amounts(kind, strength, count) for kind, strength in strengths.items()}
    wanted = []
    for order in itertools.permutations(READ):
        pixels = np.repeat(image[None].astype(np.float64), count, axis=0)
        for kind in order:
            pixels = change(kind, pixels, each[kind])
        wanted.append(pixels.reshape(count, -1))
    wanted = np.stack(wanted)  # (orders, count, values)
    distance = np.abs(wanted - got.reshape(count, -1)).max(axis=-1)
    assert distance.min(axis=0).max() < 0.05
    # Which order it was shows where no two of them give the same: a matter of the amounts alone.
    apart = np.full(count, np.inf)
    for a, b in itertools.combinations(wanted, 2):
        apart = np.minimum(apart, np.abs(a - b).max(axis=-1))
    orders = distance.argmin(axis=0)[apart > 0.5]
    assert len(orders) > 24 * 20
    assert stats.chisquare(np.bincount(orders, minlength=24)).pvalue > SURE


def test_bytes_are_rounded_once_in_the_end():
    arguments = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    exact = drawn(augment.color_jitter, photo(dtype=np.float32), 50, **arguments)
    whole = drawn(augment.color_jitter, photo(), 50, **arguments)
    np.testing.assert_array_equal(whole, np.rint(exact))


def test_without_strength_the_image_stays():
    image = photo(dtype=np.float32) * 2 - 99
    np.testing.assert_array_equal(augment.color_jitter(image, [0, 0], **NONE), image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probability": 1.5}, "probability takes a number from 0 to 1, not 1.5"),
        ({"probability": float("nan")}, "probability takes a number from 0 to 1, not nan"),
        (
            {"area": (0.5, 0.2)},
            r"area takes two shares above 0 and up to 1, rising, not \(0.5, 0.2\)",
        ),
        ({"area": (0.0, 0.2)}, r"area takes two shares .* not \(0.0, 0.2\)"),
        ({"area": (0.1, 1.2)}, r"area takes two shares .* not \(0.1, 1.2\)"),
        ({"area": 0.3}, "area takes two shares .* not 0.3"),
        (
            {"aspect_ratio": (0, 2)},
            r"aspect_ratio takes two above 0 and up to 1000, rising, not \(0, 2\)",
        ),
        ({"aspect_ratio": (1, 2, 3)}, r"aspect_ratio takes two .* not \(1, 2, 3\)"),
        ({"fill": "black"}, "fill takes one of noise, constant, not 'black'"),
    ],
)
def test_what_erasing_does_not_take_is_named(arguments, message):
    with pytest.raises(ValueError, match=r"^random_erasing\." + message) as error:
        augment.random_erasing(photo(), [0, 0], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"brightness": -0.1}, "brightness takes a number from 0 to 1000, not -0.1"),
        ({"contrast": "much"}, "contrast takes a number from 0 to 1000, not 'much'"),
        ({"saturation": float("inf")}, "saturation takes a number from 0 to 1000, not inf"),
        ({"hue": 0.6}, "hue takes a number of turns from 0 to 0.5, not 0.6"),
    ],
)
def test_what_jitter_does_not_take_is_named(arguments, message):
    with pytest.raises(ValueError, match=r"^color_jitter\." + message) as error:
        augment.color_jitter(photo(), [0, 0], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("image", "received"),
    [
        (np.zeros((4, 4, 1), np.uint8), r"\(4, 4, 1\) uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\) uint8"),
        (np.zeros((4, 4, 3), np.int32), r"\(4, 4, 3\) int32"),
    ],
)
def test_an_image_of_another_shape_or_type_is_named(name, image, received):
    wanted = rf"^{name} takes an image \(height, width, 3\) uint8 or float32, not {received}$"
    with pytest.raises(ValueError, match=wanted):
        FUNCTIONS[name](image, [0, 0])
