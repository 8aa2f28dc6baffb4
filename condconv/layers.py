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

from collections.abc import Callable
from typing import Any

import keras
from keras import activations, constraints, initializers, ops, regularizers

from condconv import arguments
from condconv import ops as conditional
from condconv.arguments import at_least_one, pair
from condconv.formulations import Geometry
from condconv.normalization import at_least_float32
from condconv.routing import Routing, reseeded

Tensor = Any
Shape = tuple[int | None, ...]


def _each_expert(initializer: Any) -> Callable[..., Tensor]:
    """Makes an initializer of stacked experts from one of a single expert's shape.

    Drawing the stack at once would count the experts as fan and shrink the kernels; drawing with
    one initializer again and again would give equal experts, for Keras' initializers repeat
    themselves. So each expert gets a copy with a seed of its own.
    """
    initializer = initializers.get(initializer)

    def draw(shape: Shape, dtype: str | None = None) -> Tensor:
        experts = (reseeded(initializer, e) for e in range(shape[0]))
        return ops.stack([expert(shape[1:], dtype=dtype) for expert in experts])

    return draw


def _constrain_each_expert(constraint: Any) -> Callable[[Tensor], Tensor] | None:
    constraint = constraints.get(constraint)
    if constraint is None:
        return None

    def constrain(experts: Tensor) -> Tensor:
        each = ops.unstack(ops.convert_to_tensor(experts))
        return ops.stack([constraint(expert) for expert in each])

    return constrain


class _Conditional(keras.layers.Layer):
    """What the conditional layers share: experts, a bias for each, and the routing they follow.

    A subclass gives the shape of one expert and how to apply the mixture.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        data_format: str | None = None,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        # Without autocast the experts are mixed in their own precision, and only the mixture is
        # cast: casting all n of them in every call costs more than the mixing.
        super().__init__(activity_regularizer=activity_regularizer, autocast=False, **kwargs)
        self.num_experts = at_least_one(num_experts, "num_experts")
        self.data_format = arguments.data_format(data_format)
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.routing = None

    def expert_shape(self, channels: int) -> Shape:
        """Returns the shape of one expert's kernel for inputs of ``channels``."""
        raise NotImplementedError

    def output_channels(self, channels: int) -> int:
        """Returns how many channels come out of inputs of ``channels``."""
        raise NotImplementedError

    def apply_experts(self, x: Tensor, routing_weights: Tensor, training: bool) -> Tensor:
        """Applies to ``x`` (channels last) the mixture of the experts."""
        raise NotImplementedError

    @property
    def _channel_axis(self) -> int:
        return 1 if self.data_format == "channels_first" else -1

    def build(self, inputs_shape: Shape, routing_weights_shape: Shape | None = None) -> None:
        """Makes ``kernel`` (n, …), ``bias`` (n, channels) and, if none is given, the routing."""
        channels = inputs_shape[self._channel_axis]
        if channels is None:
            raise ValueError(
                f"{type(self).__name__} needs inputs of a known number of channels. "
                f"Received: shape {inputs_shape}"
            )
        if routing_weights_shape is None:
            self.routing = Routing(
                self.num_experts,
                data_format=self.data_format,
                dtype=self.dtype_policy,
                name="routing",
            )
            self.routing.build(inputs_shape)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_experts, *self.expert_shape(channels)),
            initializer=_each_expert(self.kernel_initializer),
            regularizer=self.kernel_regularizer,
            constraint=_constrain_each_expert(self.kernel_constraint),
            autocast=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts, self.output_channels(channels)),
                initializer=_each_expert(self.bias_initializer),
                regularizer=self.bias_regularizer,
                constraint=_constrain_each_expert(self.bias_constraint),
                autocast=False,
            )

    def call(
        self, inputs: Tensor, routing_weights: Tensor | None = None, training: bool | None = None
    ) -> Tensor:
        """Applies the layer.

        Args:
            inputs: (B, H, W, C), or (B, C, H, W) where channels come first; (B, …, C) for a
                dense layer.
            routing_weights: (B, n), as a ``Routing`` gives them; computed from ``inputs`` by a
                routing of the layer's own if left out.
            training: whether a gradient will be asked for.

        Returns:
            What the static layer would return, in the compute dtype.
        """
        if routing_weights is None:
            routing_weights = self._own_routing(inputs)
        # Asks for the shape for the sake of its checks, which Keras makes in symbolic calls only.
        self.compute_output_shape(tuple(inputs.shape), tuple(routing_weights.shape))
        x = ops.cast(inputs, self.compute_dtype)
        swap = self._channel_axis == 1 and len(inputs.shape) == 4
        if swap:
            x = ops.transpose(x, (0, 2, 3, 1))
        y = self.apply_experts(x, routing_weights, bool(training))
        if self.bias is not None:
            bias = ops.cast(conditional.mix(self.bias, routing_weights), y.dtype)
            y = y + ops.reshape(bias, (-1, *(1,) * (len(y.shape) - 2), bias.shape[-1]))
        y = self.activation(y)
        return ops.transpose(y, (0, 3, 1, 2)) if swap else y

    def _check_routing(self, inputs_shape: Shape, shape: Shape | None) -> None:
        if shape is None:
            return
        if len(shape) != 2 or shape[1] != self.num_experts:
            raise ValueError(
                f"{self.name} takes routing weights of shape (batch, {self.num_experts}). "
                f"Received: shape {shape}"
            )
        if None not in (inputs_shape[0], shape[0]) and inputs_shape[0] != shape[0]:
            raise ValueError(
                f"{self.name} takes routing weights for each of its {inputs_shape[0]} examples. "
                f"Received: inputs of shape {inputs_shape}, routing weights of shape {shape}"
            )

    def _own_routing(self, inputs: Tensor) -> Tensor:
        if self.routing is None:
            raise ValueError(
                f"{self.name} was first called with routing weights, so it has no routing of its "
                f"own: call it as layer(x, routing_weights)."
            )
        return self.routing(inputs)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "data_format": self.data_format,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }


class _ConditionalConv(_Conditional):
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
        case = conditional.here(
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

    def apply_experts(self, x: Tensor, routing_weights: Tensor, training: bool) -> Tensor:
        """Mixes the kernels and convolves each example with its own."""
        kernels = ops.cast(conditional.mix(self.kernel, routing_weights, training), x.dtype)
        return conditional.conv2d(x, kernels, self._geometry, training, self.formulation)

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

    def apply_experts(self, x: Tensor, routing_weights: Tensor, training: bool) -> Tensor:
        """Mixes the kernels and convolves each example's channels with their own."""
        kernels = ops.cast(conditional.mix(self.kernel, routing_weights, training), x.dtype)
        return conditional.depthwise_conv2d(x, kernels, self._geometry, training, self.formulation)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}


@keras.saving.register_keras_serializable(package="condconv")
class CondDense(_Conditional):
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
