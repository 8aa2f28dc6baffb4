"""ResNet-50 "v1.5" (He et al., arXiv:1512.03385), as tensorflow/tpu, models/official/resnet has it.

"v1.5": the stride sits on the 3×3 convolution of a bottleneck.
"""

import dataclasses
import functools

import keras

from models.blocks import Stage, Style, bottleneck
from models.network import Network, Normalization, round_filters
from models.routing import Knobs

_Bottleneck = functools.partial(Stage, block=bottleneck, expansion=4)

STAGES = (
    _Bottleneck(repeats=3, filters=64),
    _Bottleneck(repeats=4, filters=128, strides=2),
    _Bottleneck(repeats=6, filters=256, strides=2),
    _Bottleneck(repeats=3, filters=512, strides=2),
)


def resnet50(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    dropout: float = 0.0,
    survival: float = 1.0,
    first_condconv_block: int = 14,
    condconv_classifier: bool = False,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
    normalization: Normalization = "imagenet",
    padding: str = "fixed",
    expert_dropout: float = 0.0,
) -> keras.Model:
    """ResNet-50: 4,093 M multiply-adds, 77.7 % top-1 (paper); 8 experts: 4,213 M, 78.6 %.

    Args:
        num_classes, num_experts, image_size, dropout, survival, first_condconv_block,
            condconv_classifier, routing, normalization: see ``models.network.Network``. By
            default the last three blocks are conditional, the projection shortcut among their
            layers.
        width: multiplier of the filters.
        batch_norm_momentum, batch_norm_epsilon, padding, expert_dropout: see
            ``models.blocks.Style``. The paper drops experts in this network alone, at a rate that
            it does not give.
    """
    return Network(
        name="resnet50",
        stages=tuple(
            dataclasses.replace(stage, filters=round_filters(stage.filters, width))
            for stage in STAGES
        ),
        style=Style(
            activation="relu",
            kernel_initializer=keras.initializers.VarianceScaling(
                1.0, "fan_in", "truncated_normal"
            ),
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            padding=padding,
            expert_dropout=expert_dropout,
        ),
        stem_filters=round_filters(64, width),
        stem_kernel_size=7,
        stem_pool=True,
        classifier_initializer=keras.initializers.RandomNormal(stddev=0.01),
        num_classes=num_classes,
        num_experts=num_experts,
        first_condconv_block=first_condconv_block,
        condconv_classifier=condconv_classifier,
        routing=routing,
        image_size=image_size,
        dropout=dropout,
        survival=survival,
        normalization=normalization,
    ).build()
