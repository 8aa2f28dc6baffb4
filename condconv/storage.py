"""Experts kept in half precision, for inference."""

import keras
import numpy as np
from keras import ops

from condconv.copying import copy_state
from condconv.layers import CondConv2D, DepthwiseCondConv2D

_CONVOLUTIONS = (CondConv2D, DepthwiseCondConv2D)
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def store_experts(model: keras.Model, dtype: str = "float16") -> keras.Model:
    """Returns a copy of a model for inference whose convolutions keep their experts in ``dtype``.

    For one image a CondConv network waits for its experts to be read; in half precision they are
    half as many bytes, in memory and on disk. They are still mixed in float32, and the convolution
    is computed as before: only the rounding of the experts changes the result, in a network of
    random weights by a thousandth of the largest logit in "float16", and by eight in "bfloat16".
    The classifier, a ``CondDense``, stays as it is.

    Args:
        model: a Functional or a built Sequential model, which is left as it is. Layers are copied
            by their configs.
        dtype: "float16" or "bfloat16"; "float32" or "float64" brings experts back to these.

    Raises:
        ValueError: for another dtype, for a subclassed model, and for experts that are too large
            for ``dtype``.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"store_experts takes a dtype of {', '.join(_DTYPES)}, not {dtype!r}")
    copies: list[tuple[keras.Layer, keras.Layer]] = []

    def copy(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, _CONVOLUTIONS):
            config["experts_dtype"] = dtype
        copies.append((layer, type(layer).from_config(config)))
        return copies[-1][1]

    copied = keras.models.clone_model(model, clone_function=copy, recursive=True)
    for old, new in copies:
        with np.errstate(over="ignore"):  # the check that follows says more
            copy_state(old, new)
        if isinstance(new, _CONVOLUTIONS):
            _check_range(new, dtype)
    return copied


def _check_range(layer: keras.Layer, dtype: str) -> None:
    if not ops.all(ops.isfinite(layer.kernel)):
        raise ValueError(
            f"experts of {layer.name} are too large for {dtype}, or no numbers: take bfloat16, "
            "which has the range of float32"
        )
