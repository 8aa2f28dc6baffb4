"""Normalisation of pixels, and of batches through TensorFlow's fused operation."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

Tensor = Any


def at_least_float32(dtype: Any = None) -> str:
    """Returns the dtype for what must not lose precision: "float64" under float64, else "float32".

    Args:
        dtype: a dtype, or a dtype policy or its name, which stands for the dtype that it computes
            in; None for Keras' policy in force.
    """
    if not isinstance(dtype, str | dict | keras.DTypePolicy | None):
        dtype = keras.backend.standardize_dtype(dtype)
    compute_dtype = keras.dtype_policies.get(dtype).compute_dtype
    return "float64" if compute_dtype == "float64" else "float32"


@keras.saving.register_keras_serializable(package="condconv")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalisation, with the same statistics and weights, in one operation.

    Keras 3 composes it of a dozen operations on TensorFlow, which makes a training step of these
    networks about 1.3 times slower. The fused operation serves four-dimensional channels-last
    input; anything else takes Keras' way, as do synchronised statistics and other backends.
    Gamma, beta and the statistics stay in float32 under a mixed precision policy.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, autocast=False, **kwargs)

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """Adds a weight that keeps its precision in every call."""
        return super().add_weight(*args, **{**kwargs, "autocast": False})

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None):
        """Normalises (B, H, W, C), by the batch in training and by the moving statistics else."""
        x = ops.cast(inputs, self.compute_dtype)
        if not self._can_fuse(x, mask):
            return super().call(x, training=training, mask=mask)
        if training and self.trainable:
            return self._normalize_by_batch(x)
        return self._fused(x, self.moving_mean, self.moving_variance, is_training=False)[0]

    def _can_fuse(self, x: Tensor, mask: Tensor | None) -> bool:
        return (
            keras.backend.backend() == "tensorflow"
            and mask is None
            and len(x.shape) == 4
            and self.axis in (-1, 3)
            and self.center
            and self.scale
            and not self.synchronized
            and not self.renorm
            and keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16", "float32")
        )

    def _normalize_by_batch(self, x: Tensor) -> Tensor:
        y, mean, variance = self._fused(x, [], [], is_training=True)
        # The operation reports the unbiased variance; Keras and the official EfficientNet keep
        # the biased one.
        variance = variance * _biased_share(math.prod(ops.shape(x)[:-1]), variance.dtype)
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = ops.cast(moving, batch.dtype)
            moving.assign(old * self.momentum + batch * (1.0 - self.momentum))
        return y

    def _fused(self, x: Tensor, mean: Any, variance: Any, *, is_training: bool) -> tuple:
        import tensorflow as tf

        outputs = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=ops.cast(self.gamma, "float32"),
            offset=ops.cast(self.beta, "float32"),
            mean=ops.cast(mean, "float32"),
            variance=ops.cast(variance, "float32"),
            epsilon=self.epsilon,
            is_training=is_training,
        )
        return outputs.y, outputs.batch_mean, outputs.batch_variance


def _biased_share(count: int | Tensor, dtype: Any) -> float | Tensor:
    """Returns the biased over the unbiased variance of so many numbers."""
    if isinstance(count, int):  # in a graph of hundreds of these, every operation takes its time
        return max(count - 1, 1) / max(count, 1)
    count = ops.cast(count, dtype)
    return ops.maximum(count - 1, 1) / count


@keras.saving.register_keras_serializable(package="condconv")
class BatchNormShift(keras.layers.Layer):
    """What is left of a batch normalisation once its scale is in the layer before it.

    A static convolution has a bias for the shift. The biases of experts are weighted by the
    routing, whose weights do not sum to one, so after a conditional layer it is added here, at
    least in float32 under every policy. ``count_cost`` accounts it as the normalisation it was.

    Weights: ``bias`` (C,).

    Args:
        axis: that of the channels.
    """

    def __init__(self, axis: int = -1, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.axis = int(axis)
        self.supports_masking = True

    def build(self, input_shape: tuple) -> None:
        """Makes the bias (C,)."""
        channels = input_shape[self.axis]
        self.bias = self.add_weight(
            name="bias", shape=(channels,), initializer="zeros", autocast=False
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Adds the bias to ``inputs`` (B, …), the same for all of a channel."""
        dtype = at_least_float32(self.compute_dtype)
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        y = ops.cast(inputs, dtype) + ops.reshape(ops.cast(self.bias, dtype), shape)
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns ``input_shape``."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "axis": self.axis}


@keras.saving.register_keras_serializable(package="condconv")
class FromBatchNorm(keras.initializers.Zeros):
    """Zeros; marks a bias as the shift of a folded batch normalisation, in saved files too."""


@keras.saving.register_keras_serializable(package="condconv")
class PixelNormalization(keras.layers.Layer):
    """Maps pixels to (pixel − mean) / deviation, at least in float32 under every policy.

    Keras' own ``Normalization`` needs TensorFlow on every backend.

    Args:
        mean, deviation: one number for each channel, on the scale of the pixels.

    Raises:
        ValueError: if they are not as many as the channels, or a deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": at_least_float32(kwargs.get("dtype"))})
        self.mean = tuple(float(value) for value in mean)
        self.deviation = tuple(float(value) for value in deviation)
        if len(self.mean) != len(self.deviation) or not all(d > 0 for d in self.deviation):
            raise ValueError(
                "PixelNormalization takes a mean and a positive deviation for each channel. "
                f"Received: mean={mean}, deviation={deviation}"
            )

    def build(self, input_shape: tuple) -> None:
        """Checks that there are as many channels as means."""
        if input_shape[-1] not in (None, len(self.mean)):
            raise ValueError(
                f"{self.name} has means and deviations of {len(self.mean)} channels, and its input "
                f"has {input_shape[-1]}: give one of each for a channel. "
                f"Received: shape {tuple(input_shape)}"
            )

    def call(self, inputs: Tensor) -> Tensor:
        """Normalises (B, H, W, C), uint8 or float."""
        dtype = self.compute_dtype
        pixels = ops.cast(inputs, dtype)
        return (pixels - ops.array(self.mean, dtype)) / ops.array(self.deviation, dtype)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns ``input_shape``."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of this layer."""
        return {**super().get_config(), "mean": self.mean, "deviation": self.deviation}
