"""Networks of ours as contenders: one bare step of Keras, and the same step as the engine runs it.

Both are without dropout and stochastic depth, which other libraries' networks do not draw either.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, count_cost
from condconv.stochastic import Dropout, StochasticDepth

from .keras_network import build, rounds, surroundings
from .worker import Made, steps
from .workload import Workload


def bare(
    create: str,
    arguments: Mapping[str, Any],
    workload: Mapping[str, Any],
    replaced: str | None = None,
) -> Made:
    """Returns the rounds of a network, and what it costs.

    Args:
        create: "module:function" that makes it.
        arguments: of this function.
        workload: the fields of a ``Workload``.
        replaced: "module:function" that gives classes, names of their methods and other methods,
            to be used in this process.
    """
    work = Workload(**workload)
    importlib.import_module(create.split(":")[0])  # the layers that methods are replaced of
    if replaced:
        module, function = replaced.split(":")
        for kind, name, method in getattr(importlib.import_module(module), function)():
            setattr(kind, name, method)
    model = without_noise(build(create, arguments, work.precision))
    return rounds(model, work, _costs(model))


def in_engine(create: str, arguments: Mapping[str, Any], workload: Mapping[str, Any]) -> Made:
    """Returns the rounds of the engine's own training step; arguments as those of ``bare``."""
    from condconv.engine import backends
    from condconv.engine.experiment import Experiment
    from condconv.engine.optimization import momentum
    from condconv.engine.schedules import constant

    work = Workload(**workload)
    experiment = Experiment(
        model=lambda num_classes: without_noise(build(create, arguments, work.precision)),
        data=lambda: InMemory(work),
        optimizer=functools.partial(momentum, momentum=work.momentum),
        schedule=constant,
        duration="1e9 steps",
        batch_size=work.batch_size,
        precision=work.precision,
        xla=work.xla,
    )
    run = backends.choose().build(experiment)
    batches, numbers = run.batches(0), itertools.count()
    rates = np.full(1, work.learning_rate, np.float32)

    def step() -> float:
        return run.steps(batches, next(numbers), rates).sums["objective"]

    return Made({"steps": steps(step, work.batch_size, work.seconds)}, surroundings)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Data to train on: the same batch over and over."""

    work: Workload
    name = "random"
    class_names = ()
    answers = None

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self.work.num_classes

    def num_examples(self, split: str) -> int:
        """Those of a batch."""
        return self.work.batch_size

    def image_spec(self, split: str) -> Any:
        """Returns shape and dtype of an image."""
        size = self.work.image_size
        return types.SimpleNamespace(shape=(size, size, 3), dtype="uint8")

    def train_batches(self, split: str, **_: Any) -> Iterator[dict[str, Any]]:
        """Returns the batch, without end."""
        return itertools.repeat({"image": self.work.images(), "label": self.work.labels()})


def without_noise(model: keras.Model) -> keras.Model:
    """Returns the network, its dropout and stochastic depth turned off."""
    for layer in model.layers:
        if isinstance(layer, Dropout):
            layer.rate = 0.0
        elif isinstance(layer, StochasticDepth):
            layer.survival = 1
    return model


def _costs(model: keras.Model) -> dict[str, int]:
    """Returns what a network of ours costs.

    Of a conditional network also the weights of one expert over all layers, and of those the ones
    whose mixtures are written for each example: a dense layer mixes what comes out of it.
    """
    kinds = (CondConv2D, DepthwiseCondConv2D, CondDense)
    layers = [layer for layer in model.layers if isinstance(layer, kinds)]
    mixed = [layer for layer in layers if not isinstance(layer, CondDense)]
    return {
        "parameters": model.count_params(),
        "multiply_adds": count_cost(model).multiply_adds,
        "num_experts": max((layer.num_experts for layer in layers), default=0),
        "expert_weights": sum(map(_expert_weights, layers)),
        "mixed_weights": sum(map(_expert_weights, mixed)),
    }


def _expert_weights(layer: Any) -> int:
    weights = [weight for weight in (layer.kernel, layer.bias) if weight is not None]
    return sum(math.prod(weight.shape[1:]) for weight in weights)
