"""EfficientNet-B0 (Tan and Le, arXiv:1905.11946) and its CondConv networks.

The table, the rounding and the defaults are those of tensorflow/tpu, models/official/efficientnet
and its folder condconv.
"""

import dataclasses
import functools

from condconv.activation import swish
from models.blocks import Stage, inverted_bottleneck
from models.factory import factory
from models.network import Initializer, Network, Normalization, tpu_initializers

_MBConv = functools.partial(Stage, block=inverted_bottleneck, se_ratio=0.25)
_STATIC_STAGES = 4  # the official CondConv networks make the last three stages conditional


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetB0(Network):
    """EfficientNet-B0: 391 M multiply-adds, 77.2 % top-1 (paper); 8 experts: 413 M, 78.3 %.

    Attributes:
        dropout: By default 0.2, or 0.25 with experts, as officially.
        first_condconv_block: By default that of the last three stages, the ninth of B0.
        normalization: By default "imagenet", or "condconv" with experts, as officially.
    """

    name = "efficientnet_b0"
    stages = (
        _MBConv(repeats=1, filters=16),
        _MBConv(repeats=2, filters=24, strides=2, expansion=6),
        _MBConv(repeats=2, filters=40, strides=2, expansion=6, kernel_size=5),
        _MBConv(repeats=3, filters=80, strides=2, expansion=6),
        _MBConv(repeats=3, filters=112, expansion=6, kernel_size=5),
        _MBConv(repeats=4, filters=192, strides=2, expansion=6, kernel_size=5),
        _MBConv(repeats=1, filters=320, expansion=6),
    )
    activation = swish
    stem_filters = 32
    head_filters = 1280

    depth: float = 1.0
    dropout: float | None = None
    survival: float = 0.8
    first_condconv_block: int | None = None
    condconv_head: bool = False
    normalization: Normalization | None = None

    def __post_init__(self):
        official = {
            "dropout": 0.25 if self.num_experts else 0.2,
            "first_condconv_block": 1 + sum(map(self.repeats, self.stages[:_STATIC_STAGES])),
            "normalization": "condconv" if self.num_experts else "imagenet",
        }
        for argument, default in official.items():
            if getattr(self, argument) is None:
                object.__setattr__(self, argument, default)
        super().__post_init__()

    def initializers(self) -> tuple[Initializer, Initializer]:
        """The official ones."""
        return tpu_initializers()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetB0Depth(EfficientNetB0):
    """EfficientNet-B0, 1.1 times as deep; 8 experts: 614 M multiply-adds, 79.5 % top-1 (official).

    The static network has the blocks of EfficientNet-B1; the conditional ones begin at the
    thirteenth.
    """

    name = "efficientnet_b0_depth"

    depth: float = 1.1


efficientnet_b0 = factory(EfficientNetB0)
efficientnet_b0_depth = factory(EfficientNetB0Depth)
