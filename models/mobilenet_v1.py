"""MobileNetV1 (Howard et al., arXiv:1704.04861), as tensorflow/models' slim has it."""

import dataclasses
import functools

import keras

from models.blocks import Stage, separable
from models.factory import factory
from models.network import Initializer, Network, Normalization, scale

_Separable = functools.partial(Stage, block=separable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetV1(Network):
    """MobileNetV1: 567 M multiply-adds, 71.9 % top-1 (paper); 8 experts: 600 M, 73.7 %.

    Attributes:
        width: They are rounded down, and to at least 8 (slim's rule).
        first_condconv_block: The paper's ablation of the placement (Table 4) counts the stem as
            layer 1: its layers 1, 5, 7 and 13 are the blocks 0, 4, 6 and 12 here (costs tell), and
            14 leaves the classifier alone.
        batch_norm_momentum: The paper trained with 0.9; slim's 0.9997 leaves a short run at chance.
    """

    name = "mobilenet_v1"
    stages = (
        _Separable(repeats=1, filters=64),
        _Separable(repeats=2, filters=128, strides=2),
        _Separable(repeats=2, filters=256, strides=2),
        _Separable(repeats=6, filters=512, strides=2),
        _Separable(repeats=2, filters=1024, strides=2),
    )
    activation = "relu6"
    stem_filters = 32
    cost_rule = "M"

    dropout: float = 0.001
    first_condconv_block: int = 6
    condconv_classifier: bool = True
    batch_norm_momentum: float = 0.9
    normalization: Normalization = "inception"

    def widen(self, filters: int) -> int:
        """Rounds down, and to at least 8."""
        return max(int(scale(filters, self.width)), 8)

    def initializers(self) -> tuple[Initializer, Initializer]:
        """One for all."""
        initializer = keras.initializers.TruncatedNormal(stddev=0.09)
        return initializer, initializer


mobilenet_v1 = factory(MobileNetV1)
