"""MobileNetV1 (Howard et al., arXiv:1704.04861), as tensorflow/models' slim has it."""

import dataclasses
import functools

import keras

from models.blocks import Stage, Style, separable
from models.network import Network, Normalization, scale
from models.routing import Knobs

_Separable = functools.partial(Stage, block=separable)

STAGES = (
    _Separable(repeats=1, filters=64),
    _Separable(repeats=2, filters=128, strides=2),
    _Separable(repeats=2, filters=256, strides=2),
    _Separable(repeats=6, filters=512, strides=2),
    _Separable(repeats=2, filters=1024, strides=2),
)


def mobilenet_v1(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    dropout: float = 0.001,
    first_condconv_block: int = 6,
    condconv_classifier: bool = True,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-3,
    normalization: Normalization = "inception",
    padding: str = "same",
) -> keras.Model:
    """MobileNetV1: 567 M multiply-adds, 71.9 % top-1 (paper); 8 experts: 600 M, 73.7 %.

    Args:
        num_classes, num_experts, image_size, dropout, routing, normalization: see
            ``models.network.Network``.
        first_condconv_block, condconv_classifier: by default the sixth separable block, those
            behind it and the classifier are conditional. The paper's ablation of the placement
            (Table 4) counts the stem as layer 1: its layers 1, 5, 7 and 13 are the blocks 0, 4, 6
            and 12 here (costs tell), and 14 leaves the classifier alone.
        width: multiplier of the filters, rounded down and to at least 8 (slim's rule).
        batch_norm_momentum, batch_norm_epsilon, padding: see ``models.blocks.Style``. The paper
            trained with a momentum of 0.9; slim's 0.9997 leaves a short run at chance.
    """

    def scaled(filters: int) -> int:
        return max(int(scale(filters, width)), 8)

    initializer = keras.initializers.TruncatedNormal(stddev=0.09)
    return Network(
        name="mobilenet_v1",
        stages=tuple(dataclasses.replace(stage, filters=scaled(stage.filters)) for stage in STAGES),
        style=Style(
            activation="relu6",
            kernel_initializer=initializer,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            padding=padding,
        ),
        stem_filters=scaled(32),
        classifier_initializer=initializer,
        num_classes=num_classes,
        num_experts=num_experts,
        first_condconv_block=first_condconv_block,
        condconv_classifier=condconv_classifier,
        routing=routing,
        image_size=image_size,
        dropout=dropout,
        normalization=normalization,
        cost_rule="M",
    ).build()
