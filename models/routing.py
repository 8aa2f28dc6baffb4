"""How the conditional parts of a network come by their routing weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras

from condconv import Routing
from condconv.stochastic import Dropout

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingStyle:
    """How a network routes: what the paper's ablation of routing varies.

    By default each conditional part (stem, block, head, classifier) has a routing of its own, as
    in all published networks (arXiv:1904.04971, section 3). The ablation (Table 3) is of a
    MobileNetV1 of width 0.25 with 32 experts. Of its top-1, the default's 62.0 % and softmax's
    60.5 % are quoted by others; the numbers below are recalled and not confirmed, as are the exact
    form of sharing and hierarchy. Costs decide what they can: one routing for all serves the
    classifier too, and a hidden layer is in the classifier's routing too.

    Attributes:
        activation: of the routing weights, any of Keras'; "sigmoid" lets several experts serve an
            example, "softmax" makes them compete.
        hidden: units of a hidden layer with ReLU in each routing, over the channels of its input
            (at least one unit); 0 for none. The paper's are 1/8, 1 and 8 (57.7, 62.2, 54.1 %).
        shared_by: how many conditional parts in a row follow one routing, which sees the input of
            the first of them; "all" for one routing in the network (56.5 %; 62.5 % partially
            shared).
        hierarchical: whether a routing also sees the weights of the routing before it, next to the
            pooled input, as they are without any dropping of experts (60.3 %).
        kernel_initializer: of the routings, any of Keras' by name; "zeros" mixes the experts alike
            in the first step. The paper does not say; the authors' code leaves Keras' default.
    """

    activation: str = "sigmoid"
    hidden: float = 0.0
    shared_by: int | str = 1
    hierarchical: bool = False
    kernel_initializer: str = "glorot_uniform"

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "RoutingStyle":
        """Returns the style with these attributes and the other ones at their defaults.

        Raises:
            ValueError: if there is no such attribute, or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        names = attributes if isinstance(attributes, Mapping) else [attributes]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"routing takes a dict of {', '.join(known)}, not {unknown[0]!r}")
        return cls(**attributes)

    def __post_init__(self):
        activates = _is_known(keras.activations.get, self.activation)
        checks = (
            ("activation", activates, "one of Keras', such as 'softmax'"),
            ("kernel_initializer", self._starts(), "the name of one of Keras', such as 'zeros'"),
            ("hidden", self._widens(), "a multiple of the channels, or 0"),
            ("shared_by", self._shares(), "a positive integer or 'all'"),
            ("hierarchical", isinstance(self.hierarchical, bool), "True or False"),
        )
        for attribute, fits, allowed in checks:
            if not fits:
                value = getattr(self, attribute)
                raise ValueError(f"routing: {attribute} takes {allowed}, not {value!r}")
        if self.hierarchical and self.shared_by == "all":
            raise ValueError(
                "routing: hierarchical takes several routings, and shared_by='all' leaves one: "
                "leave one of the two out"
            )
        if self.hidden and self.kernel_initializer == "zeros":
            raise ValueError(
                "routing: a hidden layer whose kernels are all zeros never learns: "
                "leave hidden or kernel_initializer out"
            )

    def _starts(self) -> bool:
        name = self.kernel_initializer
        return isinstance(name, str) and _is_known(keras.initializers.get, name)

    def _widens(self) -> bool:
        return type(self.hidden) in (int, float) and 0 <= self.hidden < math.inf

    def _shares(self) -> bool:
        return self.shared_by == "all" or (type(self.shared_by) is int and self.shared_by >= 1)


def _is_known(get: Callable[[Any], Any], name: Any) -> bool:
    try:
        return callable(get(name))
    except (ValueError, TypeError):
        return False


class RoutingWeights:
    """The routing weights of the conditional parts of one network, asked for in their order.

    Args:
        style: how it routes.
        num_experts: of each conditional part.
        expert_dropout: see ``models.network.Network``; parts that share a routing share the draw.
    """

    def __init__(self, style: RoutingStyle, num_experts: int, expert_dropout: float = 0.0):
        self._style = style
        self._num_experts = num_experts
        self._expert_dropout = expert_dropout
        self._parts = 0
        self._previous: tuple[Tensor, ...] = ()
        self._current: Tensor = None

    def of(self, name: str, x: Tensor) -> Tensor:
        """Returns the routing weights (B, n) of the part ``name``, whose input is ``x``."""
        shared_by = self._style.shared_by
        if self._parts % (math.inf if shared_by == "all" else shared_by) == 0:
            self._current = self._drop(name, self._weigh(name, x))
        self._parts += 1
        return self._current

    def _weigh(self, name: str, x: Tensor) -> Tensor:
        hidden = self._style.hidden
        routing = Routing(
            self._num_experts,
            activation=self._style.activation,
            kernel_initializer=self._style.kernel_initializer,
            hidden_units=max(1, int(hidden * x.shape[-1])) if hidden else 0,
            name=f"{name}_routing",
        )
        weights = routing(x, *self._previous)
        if self._style.hierarchical:
            self._previous = (weights,)
        return weights

    def _drop(self, name: str, weights: Tensor) -> Tensor:
        if not self._expert_dropout:
            return weights
        return Dropout(self._expert_dropout, name=f"{name}_expert_dropout")(weights)
