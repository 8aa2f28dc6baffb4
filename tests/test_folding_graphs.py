"""What a folded model keeps, what it shares, and which models cannot be folded."""

from typing import Any

import keras
import numpy as np
import pytest
from folded_models import block, chain, difference, disturb, functional, left, numbers, outputs
from keras import layers, ops

from condconv import CondConv2D
from condconv import fold_batch_norm as fold
from condconv.normalization import BatchNormalization

BACKEND = keras.backend.backend()


class Twice(layers.Conv2D):
    def call(self, inputs):
        return super().call(inputs) * 2


class Reciprocal(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 1 / super().call(inputs, training=training, mask=mask)


class Standardised(layers.DepthwiseConv2D):
    @property
    def kernel(self):
        return self._own - ops.mean(self._own)

    @kernel.setter
    def kernel(self, value):
        self._own = value


def read_twice(x: Any) -> Any:
    x = layers.Conv2D(4, 3)(x)
    return layers.Add()([x, layers.BatchNormalization()(x)])


def ends_the_model_too(x: Any) -> Any:
    x = layers.Conv2D(4, 3)(x)
    return [x, layers.BatchNormalization()(x)]


def normalised_in_two_ways(x: Any) -> Any:
    conv = layers.Conv2D(4, 3, padding="same")
    return layers.BatchNormalization()(conv(layers.BatchNormalization()(conv(x))))


def normalises_two(x: Any) -> Any:
    norm = layers.BatchNormalization()
    x = norm(layers.Conv2D(4, 3)(x))
    return norm(layers.Conv2D(4, 3)(x))


def normalises_the_input_too(x: Any) -> Any:
    norm = layers.BatchNormalization()
    return norm(layers.Conv2D(4, 3)(norm(x)))


def with_the_batchs_own_statistics(x: Any) -> Any:
    return layers.BatchNormalization()(layers.Conv2D(4, 3)(x), training=True)


def in_a_model_with_the_batchs_own_statistics(x: Any) -> Any:
    inner = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization()])
    return inner(x, training=True)


def in_a_model_that_is_also_called_so(x: Any) -> Any:
    inner = keras.Sequential([layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()])
    middle = keras.Sequential([inner])
    return middle(inner(x), training=True)


def adapted(x: Any) -> Any:
    dense = layers.Dense(4)
    x = layers.BatchNormalization()(dense(x))
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(numbers(*dense.lora_kernel_b.shape))
    return x


KEPT = {
    "after an activation": chain(layers.Conv2D(4, 3, activation="relu"), BatchNormalization()),
    "rows instead of channels": chain(layers.Conv2D(4, 3), BatchNormalization(axis=1)),
    "behind a padding": chain(layers.Conv2D(4, 3), layers.ZeroPadding2D(1), BatchNormalization()),
    "before a convolution": chain(BatchNormalization(), layers.Conv2D(4, 3)),
    "in another precision": chain(
        layers.Conv2D(4, 3, dtype="float16"), BatchNormalization(dtype="float32")
    ),
    "with a penalty between": chain(
        layers.Conv2D(4, 3, activity_regularizer="l2"), BatchNormalization()
    ),
    "after another's layer": chain(Twice(4, 3), layers.BatchNormalization()),
    "after another's kernel": chain(Standardised(3), layers.BatchNormalization()),
    "another's normalisation": chain(layers.Conv2D(4, 3), Reciprocal()),
    "after a transposed one": chain(layers.Conv2DTranspose(4, 3), BatchNormalization()),
    **{
        f.__name__.replace("_", " "): f
        for f in (
            read_twice,
            ends_the_model_too,
            normalised_in_two_ways,
            normalises_two,
            normalises_the_input_too,
            with_the_batchs_own_statistics,
            in_a_model_with_the_batchs_own_statistics,
            in_a_model_that_is_also_called_so,
            adapted,
        )
    },
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_be_folded_stays_as_it_is(case):
    model = functional(KEPT[case])
    folded = fold(model)
    assert left(folded) == left(model) != []
    assert difference(folded, model, numbers(3, 9, 8, 4)) <= 1e-6
    assert [layer.get_config() for layer in folded.layers] == [
        layer.get_config() for layer in model.layers
    ]


class Stranger(keras.Model):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv, self.norm = layers.Conv2D(4, 3), layers.BatchNormalization(name="norm")

    def call(self, inputs):
        return self.norm(self.conv(inputs))


class Doubled(keras.Model):
    def call(self, inputs):
        return super().call(inputs) * 2


def test_a_convolution_and_its_normalisation_may_be_called_together_again_and_again():
    conv, norm = CondConv2D(4, 3, 2, padding="same"), BatchNormalization()

    def stack(x: Any) -> Any:
        for _ in range(3):
            x = layers.ReLU()(norm(conv(x)))
        return x

    model = functional(stack)
    folded = fold(model)
    assert not left(folded)
    assert difference(folded, model, numbers(3, 9, 8, 4)) <= 1e-5
    assert len(folded.layers) == len(model.layers)


def test_models_in_models_are_folded_and_keep_names_paths_and_sharing():
    inner = functional(
        chain(block("first"), layers.Conv2D(4, 1, name="last"), BatchNormalization())
    )
    outer = functional(chain(layers.ELU(), inner, inner, block("second")))
    outer.get_layer("second").trainable = False
    folded = fold(outer)
    assert not left(folded)
    assert difference(folded, outer, numbers(3, 9, 8, 4)) <= 1e-5
    assert [layer.name for layer in folded.layers] == [layer.name for layer in outer.layers]
    assert [type(layer) for layer in folded.layers] == [type(layer) for layer in outer.layers]
    # The shift has the place and the name of the normalisation.
    paths = {v.path.replace("/beta", "/bias") for v in outer.variables if "moving" not in v.path}
    paths -= {p for p in paths if "batch_normalization" in p or p.endswith("/gamma")}
    assert {v.path for v in folded.variables} == paths
    assert [layer.trainable for layer in folded.layers] == [True, True, True, False]


def test_a_layer_that_is_read_outside_of_its_model_too_is_not_folded():
    conv, norm = layers.Conv2D(4, 1), layers.BatchNormalization()
    inner = functional(chain(conv, norm))
    model = functional(lambda x: layers.Add()([conv(x), inner(x)]))
    assert left(fold(model)) == [norm.name]
    assert difference(fold(model), model, numbers(3, 9, 8, 4)) <= 1e-6


def test_a_subclassed_model_within_is_left_alone():
    model = functional(chain(layers.Conv2D(4, 1), layers.BatchNormalization(), Stranger()))
    assert left(fold(model)) == ["norm"]
    assert difference(fold(model), model, numbers(3, 9, 8, 4)) <= 1e-5


def test_sequential_models_stay_sequential():
    model = keras.Sequential([layers.Conv2D(4, 3), BatchNormalization(), layers.Flatten()])
    model(numbers(1, 9, 8, 4))
    disturb(model)
    folded = fold(model)
    assert [type(layer) for layer in folded.layers] == [layers.Conv2D, layers.Flatten]
    assert folded.name == model.name
    assert difference(folded, model, numbers(3, 9, 8, 4)) <= 1e-5


def test_several_inputs_and_outputs_keep_their_structure():
    images = {"a": keras.Input((6, 6, 2), name="a"), "b": keras.Input((6, 6, 2), name="b")}
    conv, norm = layers.Conv2D(3, 3), BatchNormalization()
    both = {"sum": layers.Add()([norm(conv(images["b"])), norm(conv(images["a"]))])}
    model = disturb(keras.Model(images, {**both, "again": norm(conv(images["a"]))}))
    folded = fold(model)
    assert not left(folded)
    inputs = {"a": numbers(2, 6, 6, 2), "b": numbers(2, 6, 6, 2, seed=1)}
    assert set(folded(inputs)) == {"sum", "again"}
    assert difference(folded, model, inputs) <= 1e-5


def test_the_model_is_left_as_it_was_and_shares_nothing_with_its_copy():
    model = functional(chain(block("block"), layers.Dense(3, name="dense")))
    calls = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    config, weights = model.get_config(), [w.copy() for w in model.get_weights()]
    folded = fold(model)
    folded.set_weights([w + 1 for w in folded.get_weights()])
    assert [len(layer._inbound_nodes) for layer in model._flatten_layers()] == calls
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_model_with_nothing_to_fold_is_copied():
    def stack(x: Any) -> Any:
        x = layers.Normalization(mean=0.5, variance=2.0)(x) if BACKEND == "tensorflow" else x
        x = layers.Dropout(0.5)(layers.ELU()(x * 2.0))
        return layers.LayerNormalization()(CondConv2D(4, 3, 2)(x))

    model = functional(stack)
    folded = fold(fold(model))
    assert folded is not model
    assert folded.get_config() == model.get_config()
    result, expected = (outputs(m, numbers(2, 9, 8, 4))[0] for m in (folded, model))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras' Normalization needs TensorFlow")
def test_what_a_layer_derives_from_its_weights_is_copied_too():
    normalization = layers.Normalization()
    normalization.adapt(numbers(50, 4) * 3 + 1)
    model = functional(chain(normalization, layers.Dense(3), layers.BatchNormalization()), (4,))
    assert difference(fold(model), model, numbers(5, 4)) <= 1e-5


def test_models_that_hide_what_follows_what_are_refused():
    inputs = keras.Input((4,))
    refused = {
        Stranger(name="strange"): "'strange', a Stranger whose call is its own",
        Doubled(inputs, layers.Dense(2)(inputs), name="twice"): "'twice', a Doubled whose call",
        keras.Sequential(
            [layers.Dense(2)], name="early"
        ): "'early', a Sequential that is not built",
    }
    for model, reason in refused.items():
        with pytest.raises(ValueError, match=f"takes a Functional .* model, not {reason}"):
            fold(model)
