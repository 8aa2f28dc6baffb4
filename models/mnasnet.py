"""MnasNet-A1 (Tan et al., arXiv:1807.11626), as tensorflow/tpu, models/official/mnasnet has it."""

import dataclasses
import functools

from models.blocks import Stage, inverted_bottleneck
from models.factory import factory
from models.network import Initializer, Network, tpu_initializers

_MBConv = functools.partial(Stage, block=inverted_bottleneck)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnasNetA1(Network):
    """MnasNet-A1: 312 M multiply-adds, 74.9 % top-1 (paper); 8 experts: 325 M, 76.2 %.

    Attributes:
        width: The last convolution does not follow it.
        first_condconv_block: By default that of the last three groups.
    """

    name = "mnasnet_a1"
    stages = (
        _MBConv(repeats=1, filters=16),
        _MBConv(repeats=2, filters=24, strides=2, expansion=6),
        _MBConv(repeats=3, filters=40, strides=2, expansion=3, kernel_size=5, se_ratio=0.25),
        _MBConv(repeats=4, filters=80, strides=2, expansion=6),
        _MBConv(repeats=2, filters=112, expansion=6, se_ratio=0.25),
        _MBConv(repeats=3, filters=160, strides=2, expansion=6, kernel_size=5, se_ratio=0.25),
        _MBConv(repeats=1, filters=320, expansion=6),
    )
    stem_filters = 32
    head_filters = 1280

    dropout: float = 0.2
    survival: float = 1.0
    first_condconv_block: int = 11
    condconv_head: bool = False

    def widen_head(self, filters: int) -> int:
        """Leaves it as it is."""
        return filters

    def initializers(self) -> tuple[Initializer, Initializer]:
        """The official ones."""
        return tpu_initializers()


mnasnet_a1 = factory(MnasNetA1)
