"""MobileNetV2 (Sandler et al., arXiv:1801.04381), as tensorflow/models' slim has it."""

import dataclasses
import functools

import keras

from models.blocks import Stage, inverted_bottleneck
from models.factory import factory
from models.network import Initializer, Network, Normalization, round_filters

_Bottleneck = functools.partial(Stage, block=inverted_bottleneck, expansion=6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetV2(Network):
    """MobileNetV2: 301 M multiply-adds, 71.6 % top-1 (paper); 8 experts: 329 M, 74.6 %.

    Attributes:
        width: The last convolution only grows with it.
        first_condconv_block: The paper's number of multiply-adds fits conditional blocks from the
            second on (328.97 M, the last six of seven groups); its text can also be read as from
            the sixth on (328.49 M).
    """

    name = "mobilenet_v2"
    stages = (
        _Bottleneck(repeats=1, filters=16, expansion=1),
        _Bottleneck(repeats=2, filters=24, strides=2),
        _Bottleneck(repeats=3, filters=32, strides=2),
        _Bottleneck(repeats=4, filters=64, strides=2),
        _Bottleneck(repeats=3, filters=96),
        _Bottleneck(repeats=3, filters=160, strides=2),
        _Bottleneck(repeats=1, filters=320),
    )
    activation = "relu6"
    stem_filters = 32
    head_filters = 1280

    dropout: float = 0.2
    survival: float = 1.0
    first_condconv_block: int = 2
    condconv_head: bool = True
    condconv_classifier: bool = True
    batch_norm_momentum: float = 0.9
    normalization: Normalization = "inception"

    def widen_head(self, filters: int) -> int:
        """Never makes it narrower."""
        return round_filters(filters, max(self.width, 1.0))

    def initializers(self) -> tuple[Initializer, Initializer]:
        """One for all."""
        initializer = keras.initializers.TruncatedNormal(stddev=0.09)
        return initializer, initializer


mobilenet_v2 = factory(MobileNetV2)
