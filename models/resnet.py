"""ResNet-50 "v1.5" (He et al., arXiv:1512.03385), as tensorflow/tpu, models/official/resnet has it.

"v1.5": the stride sits on the 3×3 convolution of a bottleneck.
"""

import dataclasses
import functools

from keras.initializers import RandomNormal, VarianceScaling

from models.blocks import Stage, bottleneck
from models.factory import factory
from models.network import Initializer, Network

_Bottleneck = functools.partial(Stage, block=bottleneck, expansion=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet50(Network):
    """ResNet-50: 4,093 M multiply-adds, 77.7 % top-1 (paper); 8 experts: 4,213 M, 78.6 %.

    Attributes:
        first_condconv_block: By default that of the last three, the projection shortcut among
            their layers.
        expert_dropout: The paper drops experts in this network alone, at a rate that it does not
            give.
    """

    name = "resnet50"
    stages = (
        _Bottleneck(repeats=3, filters=64),
        _Bottleneck(repeats=4, filters=128, strides=2),
        _Bottleneck(repeats=6, filters=256, strides=2),
        _Bottleneck(repeats=3, filters=512, strides=2),
    )
    stem_filters = 64
    stem_kernel_size = 7
    stem_pool = True

    survival: float = 1.0
    first_condconv_block: int = 14
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    padding: str = "fixed"

    def initializers(self) -> tuple[Initializer, Initializer]:
        """The official ones."""
        return VarianceScaling(1.0, "fan_in", "truncated_normal"), RandomNormal(stddev=0.01)


resnet50 = factory(ResNet50)
