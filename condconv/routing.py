"""Routing: how much each expert counts for an example."""

from collections.abc import Callable
from typing import Any

import keras
from keras import activations, initializers, ops, regularizers

from condconv import arguments
from condconv.arguments import at_least_one, at_least_zero
from condconv.normalization import at_least_float32

Tensor = Any
Shape = tuple[int | None, ...]


def reseeded(initializer: Any, index: int) -> Callable[..., Tensor]:
    """Returns an initializer that draws otherwise for each ``index``; at 0 as the one given.

    Keras' initializers repeat themselves, so weights that share one would start alike.
    """
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    copy = initializer.clone()
    copy.seed = (seed + index * 0x9E3779B1) % 2**31  # a stride coprime to 2^31: all differ
    return copy


@keras.saving.register_keras_serializable(package="condconv")
class Routing(keras.layers.Layer):
    """Weighs the experts for each example: global average pool, dense, activation.

    Computes in the precision of its variables, also under a mixed precision policy, and at least
    in float32.

    Weights: ``kernel`` (C, n) and ``bias`` (n,); with h hidden units ``hidden_kernel`` (C, h) and
    ``hidden_bias`` (h,) before them, and ``kernel`` (h, n). Called as ``layer(x, weights)``, with
    the m weights of a routing before this one, it has C + m channels in place of C.

    Args:
        num_experts: how many experts to weigh, n.
        activation: any of Keras'. The paper's is "sigmoid": several experts may serve an example.
        use_bias: whether the dense layer, and the hidden one, have a bias.
        data_format: "channels_last" or "channels_first"; Keras' own setting if None.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: as in
            ``keras.layers.Dense``. Glorot-uniform and zero, as in the official code, so that
            every expert starts with a weight near 0.5.
        hidden_units: of a hidden dense layer with ReLU between pool and dense; 0 for none.

    Raises:
        ValueError: if an argument is out of range, or inputs or weights do not fit.
    """

    def __init__(
        self,
        num_experts: int,
        activation: Any = "sigmoid",
        use_bias: bool = True,
        data_format: str | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        hidden_units: int = 0,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.num_experts = at_least_one(num_experts, "num_experts")
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.data_format = arguments.data_format(data_format)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.hidden_units = at_least_zero(hidden_units, "hidden_units")
        self._previous_experts: int | None = None  # of the routing before; unknown before build

    def build(self, inputs_shape: Shape, previous_weights_shape: Shape | None = None) -> None:
        """Makes the weights for inputs, and weights of a routing before, of these shapes."""
        self._previous_experts = self._experts_of(previous_weights_shape)
        channels = self._channels(inputs_shape) + self._previous_experts
        self.hidden_kernel = self.hidden_bias = None
        if self.hidden_units:
            kernel = reseeded(self.kernel_initializer, 1)
            self.hidden_kernel = self._kernel("hidden_kernel", channels, self.hidden_units, kernel)
            self.hidden_bias = self._bias("hidden_bias", self.hidden_units)
            channels = self.hidden_units
        self.kernel = self._kernel("kernel", channels, self.num_experts, self.kernel_initializer)
        self.bias = self._bias("bias", self.num_experts)

    def _channels(self, shape: Shape) -> int:
        if len(shape) not in (2, 4):
            raise ValueError(
                "Routing takes (batch, height, width, channels) or (batch, channels). "
                f"Received: shape {shape}"
            )
        return shape[1 if self.data_format == "channels_first" else -1]

    def _experts_of(self, shape: Shape | None) -> int:
        if shape is None:
            return 0
        if len(shape) != 2:
            raise ValueError(
                f"{self.name} takes the weights (batch, experts) of a routing before it. "
                f"Received: shape {shape}"
            )
        return shape[1]

    def _kernel(self, name: str, channels: int, units: int, initializer: Any) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=(channels, units),
            initializer=initializer,
            regularizer=self.kernel_regularizer,
            autocast=False,
        )

    def _bias(self, name: str, units: int) -> keras.Variable | None:
        if not self.use_bias:
            return None
        return self.add_weight(
            name=name,
            shape=(units,),
            initializer=self.bias_initializer,
            regularizer=self.bias_regularizer,
            autocast=False,
        )

    def call(self, inputs: Tensor, previous_weights: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) or (B, C) to routing weights (B, n).

        Args:
            inputs: what the routed layers see.
            previous_weights: (B, m), of a routing before this one, which it then sees as well:
                hierarchical routing. Either in every call or in none.
        """
        self._check_previous(previous_weights)
        x = ops.cast(inputs, at_least_float32(self.variable_dtype))
        if len(inputs.shape) == 4:
            x = ops.mean(x, axis=(2, 3) if self.data_format == "channels_first" else (1, 2))
        if previous_weights is not None:
            x = ops.concatenate([x, ops.cast(previous_weights, x.dtype)], axis=-1)
        if self.hidden_kernel is not None:
            x = ops.relu(_dense(x, self.hidden_kernel, self.hidden_bias))
        return self.activation(_dense(x, self.kernel, self.bias))

    def _check_previous(self, weights: Tensor | None) -> None:
        experts = self._experts_of(None if weights is None else tuple(weights.shape))
        if self._previous_experts not in (None, experts):
            raise ValueError(
                f"{self.name} sees {self._previous_experts or 'no'} weights of a routing before "
                f"it, as in its first call. Received: {experts or 'none'}"
            )

    def compute_output_spec(
        self, inputs: Tensor, previous_weights: Tensor | None = None
    ) -> keras.KerasTensor:
        """Returns the spec of (B, n), in the precision that it computes in."""
        self._check_previous(previous_weights)
        dtype = at_least_float32(self.variable_dtype)
        return keras.KerasTensor((inputs.shape[0], self.num_experts), dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "data_format": self.data_format,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "hidden_units": self.hidden_units,
        }


def _dense(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    x = ops.matmul(x, ops.cast(kernel, x.dtype))
    return x if bias is None else ops.add(x, ops.cast(bias, x.dtype))
