"""What a step changes beside the weights' gradients: fused optimizers, averages, loss scale."""

import keras
import tensorflow as tf

from condconv.engine import optimization


def _momentum(
    optimizer: optimization.Momentum, gradient: tf.Tensor, variable: tf.Variable, rate: tf.Tensor
) -> None:
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle,
        accum=optimizer.buffer("momentums", variable).value.handle,
        lr=rate,
        grad=gradient,
        momentum=optimizer.momentum,
        use_nesterov=optimizer.nesterov,
    )


def _rmsprop(
    optimizer: optimization.RMSProp, gradient: tf.Tensor, variable: tf.Variable, rate: tf.Tensor
) -> None:
    tf.raw_ops.ResourceApplyRMSProp(
        var=variable.handle,
        ms=optimizer.buffer("mean_squares", variable).value.handle,
        mom=optimizer.buffer("momentums", variable).value.handle,
        lr=rate,
        rho=optimizer.decay,
        momentum=optimizer.momentum,
        epsilon=optimizer.epsilon,
        grad=gradient,
    )


_FUSED = {optimization.Momentum: _momentum, optimization.RMSProp: _rmsprop}


def prepare(optimizer: keras.optimizers.Optimizer) -> None:
    """Has our own optimizers step in one operation."""
    if type(optimizer) in _FUSED:
        optimizer.fused = _FUSED[type(optimizer)]


def apply_summed(
    optimizer: keras.optimizers.Optimizer, gradients: list[tf.Tensor], model: keras.Model
) -> None:
    """Applies gradients that are already summed over the replicas, within each of them."""
    if type(optimizer) not in _FUSED:  # Keras' own sum them (again)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        gradients = [gradient / replicas for gradient in gradients]
    optimizer.apply(gradients, model.trainable_variables)


def half_squared_norm(variables: list[keras.Variable]) -> tf.Tensor:
    """Returns ½·Σ‖v‖²."""
    return tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v)) for v in variables])


class LossScale:
    """The factor that keeps float16's gradients from vanishing (arXiv:1710.03740, section 3.2).

    It is halved at a gradient that is not finite, whose step is left out, and doubled after 2,000
    steps in a row without one.
    """

    def __init__(self, initial: float = 2.0**15, patience: int = 2000):
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        scale = tf.Variable(initial, trainable=False, aggregation=first, name="scale")
        good = tf.Variable(0, trainable=False, dtype=tf.int64, aggregation=first, name="good_steps")
        self.variables = {"scale": scale, "good_steps": good}
        self._patience = patience

    def read(self) -> tf.Tensor:
        """Returns the factor, a float32 scalar."""
        return tf.convert_to_tensor(self.variables["scale"])

    def is_least(self) -> tf.Tensor:
        """Returns whether the factor cannot be made smaller, so that it is not what overflows."""
        return self.read() <= 1.0

    def update(self, finite: tf.Tensor) -> None:
        """Takes note of a step; outside of any replica."""
        scale, good = self.read(), tf.convert_to_tensor(self.variables["good_steps"]) + 1
        grown = tf.where(good >= self._patience, scale * 2, scale)
        self.variables["scale"].assign(tf.where(finite, grown, tf.maximum(scale / 2, 1.0)))
        self.variables["good_steps"].assign(
            tf.where(finite & (good < self._patience), good, tf.zeros_like(good))
        )


class MovingAverage:
    """The average of weights and batch-norm statistics that evaluation uses.

    a ← a − (1−d)(a − w) after each step; see ``optimization.averaging_rate``.
    """

    def __init__(self, variables: list[keras.Variable], decay: float):
        self.decay = decay
        self.variables = variables
        self.averages = [tf.Variable(v.value, trainable=False, name="average") for v in variables]
        self._strategy = tf.distribute.get_strategy()

    def update(self, steps_done: tf.Tensor) -> None:
        """Moves the averages towards the variables; outside of any replica."""
        rate = optimization.averaging_rate(self.decay, tf.cast(steps_done, tf.float32))

        def move(average: tf.Variable, variable: tf.Tensor) -> None:
            average.assign_sub(tf.cast(rate, average.dtype) * (average - variable))

        for average, variable in zip(self.averages, self.variables, strict=True):
            self._strategy.extended.update(average, move, args=(variable.value,))
