"""Optimizers, weight decay and moving average of the official recipes, in Keras' own terms.

Sources: tensorflow/tpu, models/official/efficientnet (utils.py, main.py). Its optimizers are those
of TensorFlow 1, whose steps differ from Keras'. Keras' own can be named in a config too.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import gin
import keras
from keras import ops

from condconv.engine.errors import UsageError
from condconv.engine.schedules import check_range

Tensor = Any

# Layers of ``Routing`` as networks here name them, or Keras on its own.
_ROUTER = re.compile(r"(?:^|[/_])routing(?:_\d+)?/")

ENGINES_OWN = {
    "clipnorm": "Experiment.clip_norm",
    "clipvalue": "Experiment.clip_norm",
    "global_clipnorm": "Experiment.clip_norm",
    "use_ema": "Experiment.ema_decay",
    "ema_momentum": "Experiment.ema_decay",
    "ema_overwrite_frequency": "Experiment.ema_decay",
    "loss_scale_factor": "Experiment.precision = 'mixed_float16'",
    "gradient_accumulation_steps": "Experiment.accumulation_steps",
}
"""What the engine does itself, by the arguments of Keras' optimizers, and where it is asked to."""

WRAPPERS = {
    "LossScaleOptimizer": "the engine scales losses itself, with Experiment.precision = "
    "'mixed_float16'",
    "MultiOptimizer": "a run has one optimizer for all of its weights",
    "ScheduleFreeAdamW": "its weights are not those to evaluate; AdamW with Experiment.ema_decay "
    "averages them",
}
"""Optimizers of Keras that no run can have, with the reason."""


class HandedRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate that the step under way was handed, for the optimizer to ask for."""

    value: Tensor = 0.0

    def __call__(self, step: Tensor) -> Tensor:
        """Returns it, whatever ``step`` the optimizer counts."""
        return self.value


class _Optimizer(keras.optimizers.Optimizer):
    """An optimizer of TensorFlow 1: the buffers of each variable, and its step.

    Attributes:
        fused: the step as one operation, where a backend has it: that passes over memory once.
    """

    buffers: dict[str, str] = {}  # initializer by name
    fused: Callable[[Any, Tensor, Any, Tensor], None] | None = None

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

    def buffer(self, name: str, variable: Any) -> keras.Variable:
        """Returns a buffer of a variable."""
        return getattr(self, name)[self._get_variable_index(variable)]

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Moves a variable; routers at ``routing_rate`` times the learning rate."""
        path = self._trainable_variables[self._get_variable_index(variable)].path
        factor = self.routing_rate if _ROUTER.search(path) else 1.0
        rate = ops.cast(learning_rate * factor, keras.backend.standardize_dtype(variable.dtype))
        if self.fused:
            self.fused(self, gradient, variable, rate)
        else:
            self.assign_sub(variable, self.moved(gradient, variable, rate))

    def moved(self, gradient: Tensor, variable: Any, rate: Tensor) -> Tensor:
        """Moves the buffers of a variable; returns what is to be taken off it."""
        raise NotImplementedError

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Leaves gradients as they are: the training step has summed them over the replicas."""
        return grads_and_vars


class Momentum(_Optimizer):
    """See ``momentum``."""

    buffers = {"momentums": "zeros"}

    def __init__(self, learning_rate: Any, momentum: float, nesterov: bool, routing_rate: float):
        super().__init__(learning_rate, momentum, routing_rate, "momentum")
        self.nesterov = nesterov

    def moved(self, gradient: Tensor, variable: Any, rate: Tensor) -> Tensor:
        """See ``momentum``."""
        buffer = self.buffer("momentums", variable)
        momentum = buffer * self.momentum + gradient
        self.assign(buffer, momentum)
        return rate * (gradient + momentum * self.momentum if self.nesterov else momentum)


class RMSProp(_Optimizer):
    """See ``rmsprop``."""

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

    def moved(self, gradient: Tensor, variable: Any, rate: Tensor) -> Tensor:
        """See ``rmsprop``."""
        squares, momentums = (self.buffer(name, variable) for name in self.buffers)
        square = squares + (gradient * gradient - squares) * (1 - self.decay)
        momentum = momentums * self.momentum + rate * gradient / ops.sqrt(square + self.epsilon)
        self.assign(squares, square)
        self.assign(momentums, momentum)
        return momentum


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
    return Momentum(learning_rate, momentum, nesterov, routing_rate)


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
    return RMSProp(learning_rate, decay, momentum, epsilon, routing_rate)


def _register_own_of_keras() -> None:
    """Makes Keras' optimizers known to gin, less what the engine does itself.

    A config's value has to be of the type of the default.
    """
    loose = {"weight_decay": float | None, "adam_lr_ratio": float, "exclude_layers": Any}
    own = {*ENGINES_OWN, "name", "kwargs"}
    for name, kind in vars(keras.optimizers).items():
        is_optimizer = inspect.isclass(kind) and issubclass(kind, keras.optimizers.Optimizer)
        if not is_optimizer or name in WRAPPERS or kind is keras.optimizers.Optimizer:
            continue
        parameters = [
            p.replace(kind=p.KEYWORD_ONLY, annotation=loose.get(p.name, type(p.default)))
            for p in inspect.signature(kind).parameters.values()
            if p.name not in own
        ]
        gin.register(
            _named(kind, parameters), module="keras.optimizers", denylist=["learning_rate"]
        )


def _named(
    kind: type[keras.optimizers.Optimizer], parameters: list[inspect.Parameter]
) -> Callable[..., keras.optimizers.Optimizer]:
    """Returns a factory whose optimizers are called alike, as their variables in checkpoints."""

    def factory(*, learning_rate: Any, **arguments: Any) -> keras.optimizers.Optimizer:
        return kind(learning_rate, **arguments, name=kind.__name__.lower())

    factory.__name__ = factory.__qualname__ = kind.__name__
    factory.__doc__ = kind.__doc__
    factory.__signature__ = inspect.Signature(parameters)
    factory.__annotations__ = {p.name: p.annotation for p in parameters}
    return factory


_register_own_of_keras()


def build_optimizer(
    factory: Callable[..., keras.optimizers.Optimizer], rate: HandedRate, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Returns an optimizer of a model's weights; its own weight decay spares batch norm too.

    Raises:
        UsageError: if it does what is the engine's own matter.
    """
    optimizer = factory(learning_rate=rate)
    name = type(optimizer).__name__
    if name in WRAPPERS:
        raise UsageError(f"{name} cannot be a run's optimizer: {WRAPPERS[name]}")
    for argument in ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor",
                     "gradient_accumulation_steps"):  # fmt: skip
        if getattr(optimizer, argument):
            raise UsageError(
                f"{name}.{argument} is the engine's own matter: set {ENGINES_OWN[argument]}"
            )
    if optimizer.weight_decay:
        decayed = {id(v) for v in decayed_variables(model)}
        spared = [v for v in model.trainable_variables if id(v) not in decayed]
        optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(model.trainable_variables)
    return optimizer


def decayed_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what weight decay acts on: all trainable variables but those of batch norm.

    So biases, experts and routings decay too, as officially.
    """
    exempt = {
        id(variable)
        for layer in batch_normalizations(model)
        for variable in layer.trainable_variables
    }
    return [v for v in model.trainable_variables if id(v) not in exempt]


def batch_normalizations(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Returns the batch normalisations of a model, nested ones too."""
    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def averaging_rate(decay: float, steps_done: Tensor) -> Tensor:
    """Returns the share 1 − d by which the average of weights and statistics moves in a step.

    d = min(decay, (1+n)/(10+n)) for the n-th step: the warm-up of the decay lets a short run forget
    its initial weights. Keras' own average covers neither the statistics nor the warm-up.

    Args:
        decay: of the average.
        steps_done: this step included, a float32 scalar.
    """
    return 1 - ops.minimum(decay, (1 + steps_done) / (10 + steps_done))
