"""The static depthwise convolution, computed as the conditional one is."""

from typing import Any

import keras

from condconv import ops
from condconv.formulations import Geometry

Tensor = Any


@keras.saving.register_keras_serializable(package="condconv")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Keras' depthwise convolution, with the same weights and results, where it is slow faster.

    XLA's is tens of times slower on a CPU than the sum of shifted inputs, and TensorFlow's
    gradient of a 5×5 kernel twice as slow as two forward convolutions (see ``condconv.ops``).
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Convolves (B, H, W, C), or (B, C, H, W) where channels come first."""
        if self.data_format != "channels_last":
            return super().call(inputs)
        geometry = Geometry(tuple(self.strides), self.padding, tuple(self.dilation_rate))
        y = ops.static_depthwise_conv2d(inputs, self.kernel, geometry, bool(training))
        if self.bias is not None:
            y = keras.ops.add(y, self.bias)
        return self.activation(y)
