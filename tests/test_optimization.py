"""Optimizers, schedules and losses: those of TensorFlow 1 and the official recipes, by numbers."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from condconv import CondConv2D
from condconv.engine import optimization
from condconv.engine.errors import UsageError
from condconv.engine.optimization import Clock
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
def test_sixty_steps_are_those_of_tensorflow_1(key, factory):
    golden = np.load(GOLDEN / "opt.npz")
    rates = tf.constant(golden["lr"], tf.float32)

    class Given(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return tf.gather(rates, tf.cast(step, tf.int32))

    variable = keras.Variable(golden["w0"])
    optimizer = factory(Given())
    optimizer.build([variable])
    steps = []
    for gradient in golden["grads"]:
        optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
        steps.append(variable.numpy())
    close(np.stack(steps), golden[key])


def test_the_moving_average_is_that_of_tensorflow_1():
    golden = np.load(GOLDEN / "opt.npz")
    values = golden["ema_values"]
    variable = keras.Variable(values[0])
    average = optimization.MovingAverage([variable], decay=0.9999)
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
        ("exp_bs2048", 2048, optimization.exponential),
        ("exp_bs128", 128, optimization.exponential),
        ("cosine", 2048, lambda clock: optimization.cosine(clock, base_learning_rate=0.016)),
        ("constant", 2048, lambda clock: optimization.constant(clock, base_learning_rate=0.016)),
        ("poly", 2048, lambda clock: optimization.polynomial(clock, base_learning_rate=0.25)),
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
        got = optimization.cross_entropy(targets, logits, smoothing).numpy()
        wanted = golden[key]
        np.testing.assert_allclose(got if wanted.ndim else got.mean(), wanted, rtol=1e-6)
    half = optimization.half_squared_norm([keras.Variable(golden["logits"])])
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
        (lambda: optimization.cosine(CLOCK, -0.1), "cosine.base_learning_rate takes"),
        (lambda: optimization.exponential(CLOCK, every="0 epochs"), "exponential.every takes"),
        (lambda: optimization.exponential(CLOCK, factor=1.5), "exponential.factor takes"),
        (lambda: optimization.momentum(0.1, momentum=1.0), "momentum.momentum takes"),
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
        optimization.check_duration(duration, "Experiment.duration")
