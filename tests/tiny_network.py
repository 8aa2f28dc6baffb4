"""A network with every kind of conditional layer, strides and both sizes of kernels."""

import dataclasses
import functools

import keras

from models.blocks import Stage, inverted_bottleneck, separable
from models.network import Network

_Bottleneck = functools.partial(Stage, block=inverted_bottleneck, se_ratio=0.25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Network):
    """Every kind of conditional layer."""

    name = "tiny"
    stages = (
        Stage(block=separable, repeats=1, filters=8, strides=2),
        _Bottleneck(repeats=1, filters=8, kernel_size=5, expansion=2),
    )
    stem_filters = 8
    head_filters = 16

    num_classes: int = 5
    num_experts: int = 3
    image_size: int | None = 16
    survival: float = 1.0
    first_condconv_block: int = 0
    condconv_head: bool = True
    condconv_classifier: bool = True


def tiny(name: str = "tiny", width: float = 1.0, **changed) -> keras.Model:
    """Returns the network, of the same weights each time; called as ``create_model`` too."""
    assert name == Tiny.name
    keras.utils.set_random_seed(3)
    return Tiny(width=width, **changed).build()
