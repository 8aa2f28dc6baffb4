"""Experts: what every conditional layer has, a kernel and a bias of each expert, and a routing."""

from collections.abc import Callable
from typing import Any

import keras
from keras import activations, constraints, initializers, ops, regularizers

from condconv import arguments
from condconv import ops as conditional
from condconv.arguments import at_least_one
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


class ConditionalLayer(keras.layers.Layer):
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
        self.kernel = self._add_experts("kernel", self.expert_shape(channels))
        self.bias = None
        if self.use_bias:
            self.bias = self._add_experts("bias", (self.output_channels(channels),))

    def _add_experts(self, name: str, shape: Shape) -> keras.Variable:
        """Adds the weights ``name`` of all experts, each of this shape."""
        return self.add_weight(
            name=name,
            shape=(self.num_experts, *shape),
            initializer=_each_expert(getattr(self, f"{name}_initializer")),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=_constrain_each_expert(getattr(self, f"{name}_constraint")),
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
