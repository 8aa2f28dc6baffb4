import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import BACKEND, Array, Layer, to_numpy

from condconv.stochastic import Dropout, StochasticDepth, seed_scope

COMPILED = ("function", "jit") if BACKEND == "tensorflow" else ("jit",)
# Every layer with the share that it keeps.
LAYERS = {
    "dropout": (lambda **kwargs: Dropout(0.3, **kwargs), 0.7),
    "depth": (lambda **kwargs: StochasticDepth(0.8, **kwargs), 0.8),
}


def draw(layer: Layer, x: Array, seed: tuple[int, int] | None = None) -> Array:
    if seed is None:
        return to_numpy(layer(x, training=True))
    with seed_scope(ops.array(seed, dtype="int32")):
        return to_numpy(layer(x, training=True))


def compiled(mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=mode == "jit")


def ones(batch: int = 64) -> Array:
    return np.ones((batch, 3, 2, 2), "float32")


@pytest.mark.parametrize("training", [False, None])
@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_inference_changes_nothing(make: Callable, scoped: bool, training: bool | None):
    layer, x = make(), np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    if scoped:
        with seed_scope(ops.array([1, 2])):
            y = layer(x, training=training)
    else:
        y = layer(x, training=training)
    np.testing.assert_array_equal(to_numpy(y), x)


@pytest.mark.parametrize("layer", [Dropout(0.0), Dropout(0), StochasticDepth(1.0)])
def test_nothing_to_drop_changes_nothing(layer: Layer):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_array_equal(draw(layer, x), x)


def check_share(kept: list[int], trials: int, share: float) -> None:
    """Whether counts of successes come from independent trials: a chi-square and a normal test."""
    deviations = (np.array(kept) - trials * share) / np.sqrt(trials * share * (1 - share))
    n = len(kept)
    assert abs(np.sum(deviations)) < 5 * np.sqrt(n)
    assert abs(np.sum(deviations**2) - n) < 5 * np.sqrt(2 * n)
    assert len(set(kept)) > n / 10


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize(("make", "share"), LAYERS.values(), ids=LAYERS)
def test_the_expectation_is_the_input(make: Callable, share: float, scoped: bool):
    keras.utils.set_random_seed(3)
    layer, x = make(name="drops"), np.full((400, 1), 3.0, "float32")
    kept = []
    for step in range(50):
        y = draw(layer, x, (7, step) if scoped else None)
        np.testing.assert_allclose(y[y != 0], 3 / share, rtol=1e-6)
        kept.append(np.count_nonzero(y))
    check_share(kept, 400, share)


@pytest.mark.parametrize("scoped", [False, True])
def test_dropout_draws_for_each_element(scoped: bool):
    keras.utils.set_random_seed(3)
    x = np.ones((50, 8, 5, 10), "float32")
    y = draw(Dropout(0.3, name="drops"), x, (5, 6) if scoped else None) != 0
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        counts = y.sum(axes)
        check_share(list(counts), x.size // len(counts), 0.7)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 3, 4, 2), "float32"), ((64, 5), "mixed_bfloat16"), ((64,), "mixed_float16")],
)
def test_stochastic_depth_drops_whole_examples_and_scales_the_others(
    shape: tuple[int, ...], dtype: str
):
    x = 1 + np.random.default_rng(0).uniform(size=shape).astype("float32")
    layer = StochasticDepth(0.5, dtype=dtype, name="drops")
    tensor = layer(ops.array(x), training=True)
    assert keras.backend.standardize_dtype(tensor.dtype) == dtype.removeprefix("mixed_")
    y = draw(layer, x, (1, 2))
    rounded = to_numpy(ops.cast(x, dtype.removeprefix("mixed_")))
    kept = y.reshape(64, -1).any(1)
    np.testing.assert_array_equal(y[kept], 2 * rounded[kept])
    assert not y[~kept].any()
    assert 10 < kept.sum() < 54


@pytest.mark.parametrize("seed_dtype", ["int32", "int64", "uint32"])
@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_a_seed_repeats_its_mask(make: Callable, seed_dtype: str):
    if seed_dtype == "int64" and BACKEND == "jax":
        pytest.skip("off by default on JAX")
    one, other = make(name="block"), make(name="block")
    expected = draw(one, ones(), (3, 4))
    assert 0 < np.count_nonzero(expected) < expected.size
    np.testing.assert_array_equal(draw(one, ones(), (3, 4)), expected)
    np.testing.assert_array_equal(draw(other, ones(), (3, 4)), expected)
    with seed_scope(ops.array([3, 4], dtype=seed_dtype)):
        for _ in range(2):
            np.testing.assert_array_equal(to_numpy(one(ones(), training=True)), expected)


@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_seeds_and_names_give_masks_of_their_own(make: Callable):
    layers = [make(name=name) for name in ("block", "block_1", "block_2")]
    seeds = [(0, 0), (0, 1), (1, 0), (1, 1), (2**31 - 3, 5)]
    masks = [draw(layer, ones(), seed).tobytes() for layer in layers for seed in seeds]
    assert len(set(masks)) == len(layers) * len(seeds)


@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_a_scope_leaves_the_layers_own_generator_alone(make: Callable):
    layer = make()
    state = to_numpy(layer.seed_generator.state)
    draw(layer, ones(), (1, 2))
    np.testing.assert_array_equal(to_numpy(layer.seed_generator.state), state)
    draw(layer, ones())
    assert np.any(to_numpy(layer.seed_generator.state) != state)


@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_calls_outside_a_scope_differ(make: Callable):
    layer = make()
    masks = {draw(layer, ones()).tobytes() for _ in range(5)}
    assert len(masks) == 5
    assert draw(make(), ones()).tobytes() not in masks


def test_scopes_nest_and_end_also_after_an_error():
    layer = Dropout(0.3, name="drops")
    outer, inner = (draw(layer, ones(), seed) for seed in ((1, 2), (3, 4)))
    with seed_scope(ops.array([1, 2])):
        with pytest.raises(RuntimeError), seed_scope(ops.array([3, 4])):
            np.testing.assert_array_equal(draw(layer, ones()), inner)
            raise RuntimeError
        np.testing.assert_array_equal(draw(layer, ones()), outer)
    assert np.any(draw(layer, ones()) != draw(layer, ones()))


def test_a_scope_holds_for_its_own_thread_only():
    layer, drawn = Dropout(0.3, name="drops"), {}

    def draw_in_scope(name: str, seed: tuple[int, int]) -> None:
        with seed_scope(ops.array(seed)):
            barrier.wait(timeout=30)
            drawn[name] = draw(layer, ones())
            barrier.wait(timeout=30)

    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=draw_in_scope, args=arguments)
        for arguments in (("one", (1, 2)), ("other", (3, 4)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(drawn["one"], draw(layer, ones(), (1, 2)))
    np.testing.assert_array_equal(drawn["other"], draw(layer, ones(), (3, 4)))


@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_a_compiled_step_takes_the_seed_as_a_tensor(make: Callable, mode: str):
    layer = make(name="block")

    def step(x: Any, seed: Any) -> Any:
        with seed_scope(seed):
            return layer(x, training=True)

    run = compiled(mode, step)
    x, seeds = ops.array(ones()), [ops.array([5, i], dtype="int32") for i in range(3)]
    masks = [to_numpy(run(x, seed)) for seed in seeds]
    np.testing.assert_array_equal(to_numpy(run(x, seeds[1])), masks[1])
    assert len({mask.tobytes() for mask in masks}) == 3
    if mode == "function" or BACKEND == "jax":  # TensorFlow may generate otherwise when compiled
        for seed, mask in enumerate(masks):
            np.testing.assert_array_equal(draw(layer, ones(), (5, seed)), mask)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX has no variables in its functions")
@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_a_compiled_step_outside_a_scope_draws_anew(make: Callable, mode: str):
    layer = make()
    run = compiled(mode, lambda x: layer(x, training=True))
    assert len({to_numpy(run(ops.array(ones()))).tobytes() for _ in range(4)}) == 4


def test_a_model_repeats_itself_in_a_scope():
    inputs = keras.Input((3, 2, 2))
    x = StochasticDepth(0.5)(Dropout(0.5)(inputs))
    model = keras.Model(inputs, StochasticDepth(0.5)(x))
    assert model.output_shape == (None, 3, 2, 2)
    expected = draw(model, ones(), (1, 2))
    np.testing.assert_array_equal(draw(model, ones(), (1, 2)), expected)
    assert np.any(draw(model, ones(), (1, 3)) != expected)
    # Both stochastic depths draw for themselves: a quarter of the examples passes both.
    assert 4 < np.count_nonzero(expected.reshape(64, -1).any(1)) < 29


@pytest.mark.parametrize("layer", [Dropout(0.25, name="mine"), StochasticDepth(0.75, name="mine")])
def test_configuration_round_trip(layer: Layer):
    description = keras.saving.serialize_keras_object(layer)
    assert description["registered_name"] == f"condconv>{type(layer).__name__}"
    copy = keras.saving.deserialize_keras_object(description)
    assert copy.get_config() == layer.get_config()
    assert type(copy) is type(layer)
    assert copy.name == "mine"
    assert vars(copy).get("rate", vars(copy).get("survival")) in (0.25, 0.75)
    np.testing.assert_array_equal(draw(copy, ones(), (1, 2)), draw(layer, ones(), (1, 2)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_names_a_bad_rate(rate: float):
    with pytest.raises(ValueError, match=f"Dropout takes a rate.*Received: {rate}"):
        Dropout(rate)


@pytest.mark.parametrize("survival", [0.0, -0.1, 1.5, float("nan")])
def test_stochastic_depth_names_a_bad_survival(survival: float):
    with pytest.raises(ValueError, match=f"StochasticDepth takes a survival.*Received: {survival}"):
        StochasticDepth(survival)
