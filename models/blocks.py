"""The blocks that all networks are built from, as functions on symbolic tensors.

An architecture is a table of :class:`Stage` rows. A block never knows whether it is static or
conditional: it asks its :class:`Convs` for convolutions, and the one object that makes them
decides. It has one routing, so that all convolutions of a block share it (arXiv:1904.04971,
section 3); where that comes from is the matter of ``models.routing``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D
from condconv.depthwise import DepthwiseConv2D
from condconv.normalization import BatchNormalization, at_least_float32
from condconv.stochastic import StochasticDepth

Tensor = Any

PADDINGS = ("same", "symmetric", "fixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of an architecture: one kind of block, several times.

    Attributes:
        block: the function that builds one block, ``block(x, stage, convs, survival)``.
        repeats: how many blocks. The first one takes ``strides``, the others stride 1.
        filters: the channels of a block's output (of its inner convolutions in a bottleneck).
        strides: of the first block.
        kernel_size: of the spatial convolution.
        expansion: inner channels over input channels (over ``filters`` in a bottleneck).
        se_ratio: squeeze-and-excite channels over the block's input channels; 0 for none.
    """

    block: Callable[..., Tensor]
    repeats: int
    filters: int
    strides: int = 1
    kernel_size: int = 3
    expansion: int = 1
    se_ratio: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """What all convolutions of a network have in common; see ``models.network.Network``."""

    activation: str | Callable[[Tensor], Tensor]
    kernel_initializer: Any
    batch_norm_momentum: float
    batch_norm_epsilon: float
    padding: str


class Convs:
    """Makes the convolutions of one block: all static, or all following one routing.

    Args:
        style: what the network's convolutions have in common.
        name: of the block; layers are called ``name_part``, so that paths of weights are stable.
        routing_weights: (B, n), of the block's n experts; None for a static block.
    """

    def __init__(self, style: Style, name: str, routing_weights: Tensor | None = None):
        self.style = style
        self.name = name
        self._routing_weights = routing_weights

    def conv(
        self,
        x: Tensor,
        part: str,
        filters: int,
        kernel_size: int = 1,
        strides: int = 1,
        linear: bool = False,
        gamma: str = "ones",
    ) -> Tensor:
        """Convolution, batch normalisation and, unless ``linear``, activation."""
        x, padding = self._pad(x, part, kernel_size, strides)
        arguments = {
            "filters": filters,
            "kernel_size": kernel_size,
            "strides": strides,
            "padding": padding,
            "use_bias": False,
            "kernel_initializer": self.kernel_initializer(),
        }
        x = self._apply(x, part, keras.layers.Conv2D, CondConv2D, arguments)
        return self._normalize(x, part, linear, gamma)

    def depthwise(self, x: Tensor, part: str, kernel_size: int, strides: int) -> Tensor:
        """Depthwise convolution, batch normalisation and activation."""
        x, padding = self._pad(x, part, kernel_size, strides)
        arguments = {
            "kernel_size": kernel_size,
            "strides": strides,
            "padding": padding,
            "use_bias": False,
        }
        initializer = (
            "depthwise_initializer" if self._routing_weights is None else "kernel_initializer"
        )
        arguments[initializer] = self.kernel_initializer()
        x = self._apply(x, part, DepthwiseConv2D, DepthwiseCondConv2D, arguments)
        return self._normalize(x, part, linear=False, gamma="ones")

    def dense(self, x: Tensor, part: str, units: int, kernel_initializer: Any) -> Tensor:
        """Dense layer with bias, at least in float32 under every policy."""
        dtype = at_least_float32()
        arguments = {"units": units, "kernel_initializer": kernel_initializer, "dtype": dtype}
        return self._apply(x, part, keras.layers.Dense, CondDense, arguments)

    def kernel_initializer(self) -> Any:
        """One for each layer: Keras' repeat themselves, so layers of one shape would start alike.

        One with a seed that was asked for keeps it; what has none is nobody's to copy.
        """
        initializer = keras.initializers.get(self.style.kernel_initializer)
        return initializer.clone() if hasattr(initializer, "seed") else initializer

    def _apply(
        self,
        x: Tensor,
        part: str,
        static: Callable[..., Any],
        conditional: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Tensor:
        name = f"{self.name}_{part}" if part else self.name
        if self._routing_weights is None:
            return static(name=name, **arguments)(x)
        layer = conditional(name=name, num_experts=self._routing_weights.shape[1], **arguments)
        return layer(x, self._routing_weights)

    def _normalize(self, x: Tensor, part: str, linear: bool, gamma: str) -> Tensor:
        x = BatchNormalization(
            momentum=self.style.batch_norm_momentum,
            epsilon=self.style.batch_norm_epsilon,
            gamma_initializer=gamma,
            name=f"{self.name}_{part}_bn",
        )(x)
        return x if linear else self.activate(x, part)

    def activate(self, x: Tensor, part: str) -> Tensor:
        """The network's activation."""
        return keras.layers.Activation(self.style.activation, name=f"{self.name}_{part}_act")(x)

    def _pad(self, x: Tensor, part: str, kernel_size: int, strides: int) -> tuple[Tensor, str]:
        explicit = self.style.padding != "same" and strides > 1
        if not explicit or kernel_size == 1:
            return x, "same"
        before = (kernel_size - 1) // 2
        pads = (before, kernel_size - 1 - before)
        x = keras.layers.ZeroPadding2D((pads, pads), name=f"{self.name}_{part}_pad")(x)
        return x, "valid"


def separable(x: Tensor, stage: Stage, convs: Convs, survival: float) -> Tensor:
    """Depthwise, then pointwise convolution (MobileNetV1, arXiv:1704.04861)."""
    x = convs.depthwise(x, "depthwise", stage.kernel_size, stage.strides)
    return convs.conv(x, "pointwise", stage.filters)


def inverted_bottleneck(x: Tensor, stage: Stage, convs: Convs, survival: float) -> Tensor:
    """Expand, depthwise, squeeze-and-excite, project (MobileNetV2, arXiv:1801.04381).

    There is no expansion where it would not widen, and a residual connection where stride and
    channels allow one. The squeeze-and-excite layers are always static.
    """
    y, channels = x, x.shape[-1]
    if stage.expansion != 1:
        y = convs.conv(y, "expand", channels * stage.expansion)
    y = convs.depthwise(y, "depthwise", stage.kernel_size, stage.strides)
    if stage.se_ratio:
        y = _squeeze_excite(y, max(1, int(channels * stage.se_ratio)), convs)
    y = convs.conv(y, "project", stage.filters, linear=True)
    if stage.strides != 1 or channels != stage.filters:
        return y
    return _add(x, y, convs, survival)


def bottleneck(x: Tensor, stage: Stage, convs: Convs, survival: float) -> Tensor:
    """Reduce, convolve with the stride, expand, add (ResNet "v1.5", arXiv:1512.03385).

    The last batch normalisation starts at zero, so that a block starts as the identity.
    """
    filters = stage.filters * stage.expansion
    shortcut = x
    if stage.strides != 1 or x.shape[-1] != filters:
        shortcut = convs.conv(x, "shortcut", filters, 1, stage.strides, linear=True)
    y = convs.conv(x, "reduce", stage.filters)
    y = convs.conv(y, "conv", stage.filters, stage.kernel_size, stage.strides)
    y = convs.conv(y, "expand", filters, linear=True, gamma="zeros")
    return convs.activate(_add(shortcut, y, convs, survival), "out")


def _squeeze_excite(x: Tensor, reduced: int, convs: Convs) -> Tensor:
    """Scales each channel by a gate computed from all of them (arXiv:1709.01507)."""
    name = f"{convs.name}_se"
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    for part, filters, activation in (
        ("reduce", reduced, convs.style.activation),
        ("expand", x.shape[-1], "sigmoid"),
    ):
        gate = keras.layers.Conv2D(
            filters,
            1,
            activation=activation,
            kernel_initializer=convs.kernel_initializer(),
            name=f"{name}_{part}",
        )(gate)
    return keras.layers.Multiply(name=f"{name}_scale")([x, gate])


def _add(shortcut: Tensor, branch: Tensor, convs: Convs, survival: float) -> Tensor:
    if survival < 1:
        branch = StochasticDepth(survival, name=f"{convs.name}_survival")(branch)
    return keras.layers.Add(name=f"{convs.name}_add")([shortcut, branch])
