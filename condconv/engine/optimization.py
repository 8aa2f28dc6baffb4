"""Optimizers, loss and moving average of the official recipes.

Sources: tensorflow/tpu, models/official/efficientnet (utils.py, main.py). Its optimizers are those
of TensorFlow 1, whose steps differ from Keras'.
"""

import re
from typing import Any

import gin
import keras
import tensorflow as tf

from condconv.engine.schedules import check_range

# Layers of ``Routing`` as networks here name them, or Keras on its own.
_ROUTER = re.compile(r"(?:^|[/_])routing(?:_\d+)?/")


class _Optimizer(keras.optimizers.Optimizer):
    """An optimizer of TensorFlow 1: the buffers of each variable, and its operation for one step.

    That passes over memory once, where the same in single operations takes twice as long.
    """

    buffers: dict[str, str] = {}  # initializer by name

    def __init__(self, learning_rate: Any, momentum: float, routing_rate: float, name: str):
        check_range(f"{name}.momentum", momentum, 0 <= momentum < 1, "a share from 0 to below 1")
        check_range(
            f"{name}.routing_rate", routing_rate, routing_rate >= 0, "a factor of at least 0"
        )
        super().__init__(learning_rate=learning_rate, name=name)
        self.momentum, self.routing_rate = momentum, routing_rate

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes the buffers."""
        if self.built:
            return
        super().build(variables)
        for buffer, initializer in self.buffers.items():
            made = [
                self.add_variable_from_reference(v, name=buffer, initializer=initializer)
                for v in variables
            ]
            setattr(self, buffer, made)

    def buffer(self, name: str, variable: Any) -> tf.Tensor:
        """Returns the handle of a variable's buffer, on this replica."""
        return getattr(self, name)[self._get_variable_index(variable)].value.handle

    def rate(self, learning_rate: Any, variable: Any) -> tf.Tensor:
        """Returns the learning rate of a variable, which of routers is ``routing_rate`` as high."""
        path = self._trainable_variables[self._get_variable_index(variable)].path
        factor = self.routing_rate if _ROUTER.search(path) else 1.0
        return tf.cast(learning_rate * factor, variable.dtype)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Leaves gradients as they are: the training step has summed them over the replicas."""
        return grads_and_vars


class _Momentum(_Optimizer):
    buffers = {"momentums": "zeros"}

    def __init__(self, learning_rate: Any, momentum: float, nesterov: bool, routing_rate: float):
        super().__init__(learning_rate, momentum, routing_rate, "momentum")
        self.nesterov = nesterov

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=self.buffer("momentums", variable),
            lr=self.rate(learning_rate, variable),
            grad=gradient,
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )


class _RMSProp(_Optimizer):
    buffers = {"mean_squares": "ones", "momentums": "zeros"}

    def __init__(
        self,
        learning_rate: Any,
        decay: float,
        momentum: float,
        epsilon: float,
        routing_rate: float,
    ):
        super().__init__(learning_rate, momentum, routing_rate, "rmsprop")
        check_range("rmsprop.decay", decay, 0 <= decay < 1, "a share from 0 to below 1")
        check_range("rmsprop.epsilon", epsilon, epsilon > 0, "a number above 0")
        self.decay, self.epsilon = decay, epsilon

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self.buffer("mean_squares", variable),
            mom=self.buffer("momentums", variable),
            lr=self.rate(learning_rate, variable),
            rho=self.decay,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


@gin.register(denylist=["learning_rate"])
def momentum(
    learning_rate: Any, momentum: float = 0.9, nesterov: bool = False, routing_rate: float = 1.0
) -> keras.optimizers.Optimizer:
    """Gradient descent with momentum: m ← μm + g, w ← w − lr·m (Nesterov: g + μm for m).

    Keras' own multiplies the learning rate into the buffer, which differs as soon as it changes.
    Routers learn at ``routing_rate`` times the learning rate: below 1 where maps are so small that
    routing sees hardly more than a pixel, and would change faster than the experts learn.
    Routers are the layers whose names end in "routing", as in all networks here, and Keras' own
    "routing_1" and so on.
    """
    return _Momentum(learning_rate, momentum, nesterov, routing_rate)


@gin.register(denylist=["learning_rate"])
def rmsprop(
    learning_rate: Any,
    decay: float = 0.9,
    momentum: float = 0.9,
    epsilon: float = 1e-3,
    routing_rate: float = 1.0,
) -> keras.optimizers.Optimizer:
    """TensorFlow 1's RMSProp: mean square from one on, epsilon inside the root.

    s ← ρs + (1−ρ)g², m ← μm + lr·g/√(s+ε), w ← w − m. Keras' own starts the mean square at zero.
    ``routing_rate`` is that of ``momentum``.
    """
    return _RMSProp(learning_rate, decay, momentum, epsilon, routing_rate)


def apply_summed(
    optimizer: keras.optimizers.Optimizer, gradients: list[tf.Tensor], model: keras.Model
) -> None:
    """Applies gradients that are already summed over the replicas, within each of them."""
    if not isinstance(optimizer, _Optimizer):  # Keras' own sum them (again)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        gradients = [gradient / replicas for gradient in gradients]
    optimizer.apply(gradients, model.trainable_variables)


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


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Returns the cross-entropy of each example, (B,).

    Args:
        labels: (B,) classes, or (B, classes) probabilities.
        logits: (B, classes).
        smoothing: share of each label that is spread evenly over all classes.
    """
    classes = logits.shape[-1]
    if labels.shape.rank == 1:
        labels = tf.one_hot(labels, classes)
    labels = tf.cast(labels, logits.dtype) * (1 - smoothing) + smoothing / classes
    return tf.nn.softmax_cross_entropy_with_logits(labels, logits)


def likeliest(labels: tf.Tensor) -> tf.Tensor:
    """Returns the class of each label, (B,) int64; of mixed ones (B, classes) the largest share."""
    return tf.cast(labels, tf.int64) if labels.shape.rank == 1 else tf.argmax(labels, axis=-1)


def decayed_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what weight decay acts on: all trainable variables but those of batch norm.

    So biases, experts and routings decay too, as officially.
    """
    exempt = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.trainable_variables
    }
    return [v for v in model.trainable_variables if id(v) not in exempt]


def half_squared_norm(variables: list[keras.Variable]) -> tf.Tensor:
    """Returns ½·Σ‖v‖²."""
    return tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v)) for v in variables])


class MovingAverage:
    """The average of weights and batch-norm statistics that evaluation uses.

    a ← a − (1−d)(a − w) after each step, with d = min(decay, (1+n)/(10+n)) for the n-th step: the
    warm-up of the decay lets a short run forget its initial weights. Keras' own average covers
    neither the statistics nor the warm-up.
    """

    def __init__(self, variables: list[keras.Variable], decay: float):
        self.decay = decay
        self.variables = variables
        self.averages = [tf.Variable(v.value, trainable=False, name="average") for v in variables]
        self._strategy = tf.distribute.get_strategy()

    def restart(self) -> None:
        """Makes the averages what the variables are; outside of any replica."""
        for average, variable in zip(self.averages, self.variables, strict=True):
            average.assign(variable.numpy())

    def update(self, steps_done: tf.Tensor) -> None:
        """Moves the averages towards the variables; outside of any replica."""
        done = tf.cast(steps_done, tf.float32)
        rate = 1 - tf.minimum(self.decay, (1 + done) / (10 + done))

        def move(average: tf.Variable, variable: tf.Tensor) -> None:
            average.assign_sub(tf.cast(rate, average.dtype) * (average - variable))

        for average, variable in zip(self.averages, self.variables, strict=True):
            self._strategy.extended.update(average, move, args=(variable.value,))
