"""CondConv layers: convolutions whose kernel is a mixture of experts, weighted for each example.

``CondConv2D(x) = activation((r_1(x)·W_1 + … + r_n(x)·W_n) * x + r(x)·b)`` (Yang et al., NeurIPS
2019, arXiv:1904.04971, section 3). One :class:`Routing` can serve several layers, as it does for
the layers of a block in the paper's networks:

    routing_weights = Routing(num_experts=8)(x)
    x = CondConv2D(64, 1, num_experts=8)(x, routing_weights)
    x = DepthwiseCondConv2D(3, num_experts=8)(x, routing_weights)

A layer called without routing weights owns a ``Routing`` on its input, so that it works in a
Sequential model too.
"""

from typing import Any

import keras
from keras import ops

from condconv import ops as conditional
from condconv.arguments import at_least_one, pair
from condconv.experts import ConditionalLayer
from condconv.formulations import Geometry
from condconv.normalization import at_least_float32

Tensor = Any
Shape = tuple[int | None, ...]


class _ConditionalConv(ConditionalLayer):
    """What the two convolutions share: the geometry of their window, and how it is computed.

    Attributes:
        formulation: how the convolution is computed, one of those of ``condconv.ops``; None, as it
            begins, picks the fastest for each call. It changes no result, and is not saved: a file
            binds no machine that loads it.
    """

    operation: str  # of condconv.ops

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        num_experts: int,
        strides: int | tuple[int, int],
        padding: str,
        dilation_rate: int | tuple[int, int],
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.formulation: str | None = None
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.strides = pair(strides, "strides")
        self.dilation_rate = pair(dilation_rate, "dilation_rate")
        self.padding = str(padding).lower()
        if self.padding not in ("valid", "same"):
            raise ValueError(f"`padding` takes 'valid' or 'same'. Received: {padding!r}")
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "`strides` above 1 do not go with `dilation_rate` above 1. "
                f"Received: strides={strides}, dilation_rate={dilation_rate}"
            )

    @property
    def _geometry(self) -> Geometry:
        return Geometry(self.strides, self.padding, self.dilation_rate)

    def choose_formulation(
        self, inputs_shape: Shape, training: bool = False, xla: bool | None = None
    ) -> conditional.Choice:
        """Returns how such inputs would be computed where ``formulation`` is None, and why.

        Args:
            inputs_shape: of the inputs; None for what is unknown while tracing.
            training: whether a gradient will be asked for.
            xla: whether XLA compiles the call; None for what holds where this is called.
        """
        batch, *rest = inputs_shape
        first = self._channel_axis == 1
        *sizes, channels = (*rest[1:], rest[0]) if first else rest
        case = conditional.Case.here(
            kernel_size=self.kernel_size,
            geometry=self._geometry,
            batch=batch,
            sizes=tuple(sizes),
            channels=channels,
            multiplier=getattr(self, "depth_multiplier", 1),
            training=training,
            **({} if xla is None else {"xla": xla}),
        )
        return conditional.choose(self.operation, case)

    def build(self, inputs_shape: Shape, routing_weights_shape: Shape | None = None) -> None:
        """Makes the weights for images of shape ``inputs_shape``."""
        if len(inputs_shape) != 4:
            raise ValueError(
                f"{type(self).__name__} takes images, of four dimensions. "
                f"Received: shape {inputs_shape}"
            )
        super().build(inputs_shape, routing_weights_shape)

    def apply_experts(self, x: Tensor, routing_weights: Tensor, training: bool) -> Tensor:
        """Mixes the kernels and convolves each example with its own."""
        kernels = ops.cast(conditional.mix(self.kernel, routing_weights, training), x.dtype)
        convolve = getattr(conditional, self.operation)
        return convolve(x, kernels, self._geometry, training, self.formulation)

    def compute_output_shape(
        self, inputs_shape: Shape, routing_weights_shape: Shape | None = None
    ) -> Shape:
        """Returns the shape of the output, as the static layer would."""
        self._check_routing(inputs_shape, routing_weights_shape)
        first = self._channel_axis == 1
        batch, *rest = inputs_shape
        sizes = rest[1:] if first else rest[:-1]
        sizes = [
            size if size is None else self._output_size(size, axis)
            for axis, size in enumerate(sizes)
        ]
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(
                f"The window of {self.name} (kernel_size {self.kernel_size}, dilation_rate "
                f"{self.dilation_rate}) is larger than its input. Received: shape {inputs_shape}"
            )
        channels = self.output_channels(inputs_shape[self._channel_axis])
        return (batch, channels, *sizes) if first else (batch, *sizes, channels)

    def _output_size(self, size: int, axis: int) -> int:
        if self.padding == "valid":
            size -= (self.kernel_size[axis] - 1) * self.dilation_rate[axis]
        return -(-size // self.strides[axis])

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
        }


@keras.saving.register_keras_serializable(package="condconv")
class CondConv2D(_ConditionalConv):
    """A two-dimensional convolution whose kernel is mixed for each example.

    Names, defaults and meaning follow ``keras.layers.Conv2D``. Call it as
    ``layer(x, routing_weights)``, or as ``layer(x)`` and it routes for itself.

    Weights: ``kernel`` (n, kernel height, kernel width, in, filters), ``bias`` (n, filters).

    Args:
        filters: the channels of the output.
        kernel_size: height and width of the window, one integer or two.
        num_experts: how many kernels are mixed, n. One is a CondConv with one routed expert.
        strides, padding, dilation_rate: as in ``Conv2D``.
        groups: 1; grouped convolutions are not offered.
        **kwargs: as in ``Conv2D``: ``data_format``, ``activation``, ``use_bias``; the
            initializers and constraints of kernel and bias, which act on each expert on its own;
            their regularizers, which act on the sum; ``name``, ``dtype``, ``trainable``.

    Raises:
        ValueError: if an argument is out of range, or routing weights do not fit.
    """

    operation = "conv2d"

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int],
        num_experts: int,
        strides: int | tuple[int, int] = 1,
        padding: str = "valid",
        dilation_rate: int | tuple[int, int] = 1,
        data_format: str | None = None,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        groups: int = 1,
        **kwargs: Any,
    ):
        if groups != 1:
            raise ValueError(f"CondConv2D takes `groups=1` only. Received: groups={groups}")
        super().__init__(
            kernel_size,
            num_experts,
            strides,
            padding,
            dilation_rate,
            data_format=data_format,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        self.filters = at_least_one(filters, "filters")

    def expert_shape(self, channels: int) -> Shape:
        """Returns (kernel height, kernel width, in, filters)."""
        return (*self.kernel_size, channels, self.filters)

    def output_channels(self, channels: int) -> int:
        """Returns ``filters``."""
        return self.filters

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable(package="condconv")
class DepthwiseCondConv2D(_ConditionalConv):
    """A depthwise convolution whose kernel is mixed for each example.

    Names, defaults and meaning follow ``keras.layers.DepthwiseConv2D``. Call it as
    ``layer(x, routing_weights)``, or as ``layer(x)`` and it routes for itself.

    Weights: ``kernel`` (n, kernel height, kernel width, in, depth_multiplier), ``bias``
    (n, in · depth_multiplier).

    Args:
        kernel_size: height and width of the window, one integer or two.
        num_experts: how many kernels are mixed, n. One is a CondConv with one routed expert.
        strides, padding, depth_multiplier, dilation_rate: as in ``DepthwiseConv2D``.
        **kwargs: as in ``CondConv2D``.

    Raises:
        ValueError: if an argument is out of range, or routing weights do not fit.
    """

    operation = "depthwise_conv2d"

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        num_experts: int,
        strides: int | tuple[int, int] = 1,
        padding: str = "valid",
        depth_multiplier: int = 1,
        dilation_rate: int | tuple[int, int] = 1,
        **kwargs: Any,
    ):
        super().__init__(kernel_size, num_experts, strides, padding, dilation_rate, **kwargs)
        self.depth_multiplier = at_least_one(depth_multiplier, "depth_multiplier")

    def expert_shape(self, channels: int) -> Shape:
        """Returns (kernel height, kernel width, in, depth_multiplier)."""
        return (*self.kernel_size, channels, self.depth_multiplier)

    def output_channels(self, channels: int) -> int:
        """Returns in · depth_multiplier."""
        return channels * self.depth_multiplier

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}


@keras.saving.register_keras_serializable(package="condconv")
class CondDense(ConditionalLayer):
    """A dense layer whose kernel is mixed for each example.

    Names, defaults and meaning follow ``keras.layers.Dense``. Call it as
    ``layer(x, routing_weights)``, or as ``layer(x)`` with x of shape (batch, channels) and it
    routes for itself.

    Weights: ``kernel`` (n, in, units), ``bias`` (n, units).

    Args:
        units: the channels of the output.
        num_experts: how many kernels are mixed, n. One is a CondDense with one routed expert.
        **kwargs: as in ``CondConv2D``, but for ``data_format``.

    Raises:
        ValueError: if an argument is out of range, or routing weights do not fit.
    """

    def __init__(self, units: int, num_experts: int, **kwargs: Any):
        super().__init__(num_experts, **kwargs, data_format="channels_last")
        self.units = at_least_one(units, "units")

    def expert_shape(self, channels: int) -> Shape:
        """Returns (in, units)."""
        return (channels, self.units)

    def output_channels(self, channels: int) -> int:
        """Returns ``units``."""
        return self.units

    def apply_experts(self, x: Tensor, routing_weights: Tensor, training: bool) -> Tensor:
        """Applies all experts in one matrix product."""
        return conditional.dense(x, self.kernel, routing_weights)

    def compute_output_shape(
        self, inputs_shape: Shape, routing_weights_shape: Shape | None = None
    ) -> Shape:
        """Returns (batch, …, units)."""
        self._check_routing(inputs_shape, routing_weights_shape)
        return (*inputs_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        config = {**super().get_config(), "units": self.units}
        del config["data_format"]
        return config


@keras.saving.register_keras_serializable(package="condconv")
class Logits(keras.layers.Layer):
    """Marks the logits of a network, at least float32 under every policy, with its cost's rule.

    Args:
        cost_rule: "R" or "M", the accounting under which the paper printed the multiply-adds of
            this network (see ``condconv.count_cost``). Kept in the saved file.
    """

    def __init__(self, cost_rule: str = "R", **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": at_least_float32(kwargs.get("dtype"))})
        self.cost_rule = cost_rule

    def call(self, inputs: Tensor) -> Tensor:
        """Returns ``inputs`` (B, classes), which Keras casts on the way in."""
        return inputs

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns ``input_shape``."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "cost_rule": self.cost_rule}
