"""Conditionally parameterised convolutions for Keras (Yang et al., NeurIPS 2019, arXiv:1904.04971).

Importing it registers the layers with Keras, which then loads any file that holds them.
"""

# Not all of these have a name here, but each has something to register.
from condconv import activation, depthwise, layers, normalization, stochastic  # noqa: F401
from condconv.cost import Cost, count_cost
from condconv.export_forms import in_float32, portable, write_onnx
from condconv.folding import fold_batch_norm
from condconv.layers import CondConv2D, CondDense, DepthwiseCondConv2D
from condconv.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "CondConv2D",
    "CondDense",
    "Cost",
    "DepthwiseCondConv2D",
    "Routing",
    "count_cost",
    "fold_batch_norm",
    "in_float32",
    "portable",
    "write_onnx",
]
