"""Optimizers, schedules and losses: those of TensorFlow 1 and the official recipes, by numbers."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from condconv import CondConv2D, Routing
from condconv.engine import optimization, schedules
from condconv.engine.backends.tensorflow import updates
from condconv.engine.errors import UsageError
from condconv.engine.schedules import Clock
from condconv.engine.tasks import classification
from condconv.normalization import BatchNormalization

GOLDEN = pathlib.Path(__file__).parent / "golden"


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() <= 3e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("key", "factory"),
    [
        ("rmsprop", optimization.rmsprop),
        ("momentum", optimization.momentum),
        ("nesterov", lambda rate: optimization.momentum(rate, nesterov=True)),
        ("sgd", lambda rate: optimization.momentum(rate, momentum=0.0)),
    ],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in keras.ops"])
def test_sixty_steps_are_those_of_tensorflow_1(key, factory, fused):
    golden = np.load(GOLDEN / "opt.npz")
    variable, rate = keras.Variable(golden["w0"]), optimization.HandedRate()
    optimizer = factory(rate)
    optimizer.build([variable])
    if fused:
        updates.prepare(optimizer)
    steps = []
    for rate.value, gradient in zip(golden["lr"], golden["grads"], strict=True):
        optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
        steps.append(variable.numpy())
    close(np.stack(steps), golden[key])


@pytest.mark.parametrize("factory", [optimization.rmsprop, optimization.momentum])
def test_routers_learn_at_their_rate_and_all_else_at_the_whole(factory):
    x = keras.Input((4, 4, 2))
    own = CondConv2D(3, 1, num_experts=2)(x)
    shared = CondConv2D(3, 1, num_experts=2)(own, Routing(2)(own))
    named = CondConv2D(3, 1, num_experts=2)(shared, Routing(2, name="block_routing")(shared))
    model = keras.Model(x, named)
    before = [v.numpy() for v in model.trainable_variables]

    def moved(routing_rate: float) -> list[np.ndarray]:
        for variable, value in zip(model.trainable_variables, before, strict=True):
            variable.assign(value)
        optimizer = factory(0.5, routing_rate=routing_rate)
        optimizer.build(model.trainable_variables)
        for _ in range(2):
            gradients = [tf.ones(v.shape) for v in model.trainable_variables]
            optimizer.apply(gradients, model.trainable_variables)
        return [v.numpy() - w for v, w in zip(model.trainable_variables, before, strict=True)]

    routers = {
        id(v)
        for layer in model._flatten_layers()
        if isinstance(layer, Routing)
        for v in layer.weights
    }
    assert len(routers) == 6
    for variable, whole, half in zip(
        model.trainable_variables, moved(1.0), moved(0.5), strict=True
    ):
        share = 0.5 if id(variable) in routers else 1.0
        np.testing.assert_allclose(half, share * whole, atol=1e-5)
        assert np.all(whole)


def test_the_moving_average_is_that_of_tensorflow_1():
    golden = np.load(GOLDEN / "opt.npz")
    values = golden["ema_values"]
    variable = keras.Variable(values[0])
    average = updates.MovingAverage([variable], decay=0.9999)
    shadows = golden["ema_shadow"]
    first = len(values) - len(shadows)  # the values may begin with the initial one
    got = []
    for step in range(len(shadows)):
        variable.assign(values[first + step])
        average.update(tf.constant(step + 1))
        got.append(average.averages[0].numpy())
    close(np.stack(got), shadows)


IMAGENET = 1_281_167
TOTAL = 218_949


@pytest.mark.parametrize(
    ("key", "batch_size", "factory"),
    [
        ("exp_bs2048", 2048, schedules.exponential),
        ("exp_bs128", 128, schedules.exponential),
        ("cosine", 2048, lambda clock: schedules.cosine(clock, base_learning_rate=0.016)),
        ("constant", 2048, lambda clock: schedules.constant(clock, base_learning_rate=0.016)),
        ("poly", 2048, lambda clock: schedules.polynomial(clock, base_learning_rate=0.25)),
    ],
)
def test_learning_rates_are_the_official_ones(key, batch_size, factory):
    golden = np.load(GOLDEN / "lr.npz")
    clock = Clock(batch_size=batch_size, num_examples=IMAGENET, total_steps=TOTAL)
    schedule = factory(clock)
    close(np.array([float(schedule(int(step))) for step in golden["steps"]]), golden[key])


def test_losses_are_those_of_tensorflow_1():
    golden = np.load(GOLDEN / "loss.npz")
    logits = tf.constant(golden["logits"], tf.float32)
    labels, soft = tf.constant(golden["labels"]), tf.constant(golden["soft"], tf.float32)
    cases = {
        "ce": (labels, 0.0),
        "ce_smooth01": (labels, 0.1),
        "ce_soft_smooth01": (soft, 0.1),
    }
    for key, (targets, smoothing) in cases.items():
        got = classification.cross_entropy(targets, logits, smoothing).numpy()
        wanted = golden[key]
        np.testing.assert_allclose(got if wanted.ndim else got.mean(), wanted, rtol=1e-6)
    half = updates.half_squared_norm([keras.Variable(golden["logits"])])
    np.testing.assert_allclose(half.numpy(), golden["l2_loss"], rtol=1e-6)


def test_weight_decay_spares_batch_norm_alone():
    conv = CondConv2D(4, 3, 2, name="conv")
    model = keras.Sequential([keras.Input((8, 8, 3)), conv, BatchNormalization()])
    decayed = {v.path.split("conv/")[1] for v in optimization.decayed_variables(model)}
    assert decayed == {"kernel", "bias", "routing/kernel", "routing/bias"}


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("500 steps", 500), ("2.4 epochs", 24), ("1e3 examples", 10), ("5 percent", 50)],
)
def test_durations(duration, steps):
    clock = Clock(batch_size=100, num_examples=1000, total_steps=1000)
    assert clock.steps(duration) == pytest.approx(steps)


CLOCK = Clock(batch_size=256, num_examples=2560, total_steps=100)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedules.cosine(CLOCK, -0.1), "cosine.base_learning_rate takes"),
        (lambda: schedules.exponential(CLOCK, every="0 epochs"), "exponential.every takes"),
        (lambda: schedules.exponential(CLOCK, factor=1.5), "exponential.factor takes"),
        (lambda: optimization.momentum(0.1, momentum=1.0), "momentum.momentum takes"),
        (lambda: optimization.momentum(0.1, routing_rate=-1), "momentum.routing_rate takes"),
        (lambda: optimization.rmsprop(0.1, decay=-0.1), "rmsprop.decay takes"),
        (lambda: optimization.rmsprop(0.1, epsilon=0.0), "rmsprop.epsilon takes"),
    ],
)
def test_numbers_out_of_range_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()


@pytest.mark.parametrize(
    "duration", ["5", "epochs", "5 weeks", "-1 steps", "1.2.3 steps", "1e400 steps", ""]
)
def test_what_is_no_duration_is_refused(duration):
    with pytest.raises(UsageError, match="such as '5 epochs'"):
        schedules.check_duration(duration, "Experiment.duration")
