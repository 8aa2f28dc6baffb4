"""EfficientNet-B0 (Tan and Le, arXiv:1905.11946) and its CondConv networks.

The table, the rounding and the defaults are those of tensorflow/tpu, models/official/efficientnet
and its folder condconv.
"""

import dataclasses
import functools
import math

import keras

from condconv.activation import swish
from models.blocks import Stage, Style, inverted_bottleneck
from models.network import Network, Normalization, classifier_uniform, round_filters, scale
from models.routing import Knobs

_MBConv = functools.partial(Stage, block=inverted_bottleneck, se_ratio=0.25)

STAGES = (
    _MBConv(repeats=1, filters=16),
    _MBConv(repeats=2, filters=24, strides=2, expansion=6),
    _MBConv(repeats=2, filters=40, strides=2, expansion=6, kernel_size=5),
    _MBConv(repeats=3, filters=80, strides=2, expansion=6),
    _MBConv(repeats=3, filters=112, expansion=6, kernel_size=5),
    _MBConv(repeats=4, filters=192, strides=2, expansion=6, kernel_size=5),
    _MBConv(repeats=1, filters=320, expansion=6),
)
_STATIC_STAGES = 4  # the official CondConv networks make the last three stages conditional


def efficientnet_b0(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    depth: float = 1.0,
    dropout: float | None = None,
    survival: float = 0.8,
    first_condconv_block: int | None = None,
    condconv_head: bool = False,
    condconv_classifier: bool = False,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.99,
    batch_norm_epsilon: float = 1e-3,
    normalization: Normalization | None = None,
    padding: str = "same",
) -> keras.Model:
    """EfficientNet-B0: 391 M multiply-adds, 77.2 % top-1 (paper); 8 experts: 413 M, 78.3 %.

    Args:
        num_classes, num_experts, image_size, survival, first_condconv_block, condconv_head,
            condconv_classifier, routing: see ``models.network.Network``. By default the blocks of
            the last three stages are conditional, from the ninth of B0 on.
        width: multiplier of the filters.
        depth: multiplier of the repeats.
        dropout: by default 0.2, or 0.25 with experts, as officially.
        batch_norm_momentum, batch_norm_epsilon, padding: see ``models.blocks.Style``.
        normalization: by default that of the official networks, which differs with experts.
    """
    stages = tuple(
        dataclasses.replace(
            stage,
            filters=round_filters(stage.filters, width),
            repeats=math.ceil(scale(stage.repeats, depth, "depth")),
        )
        for stage in STAGES
    )
    if first_condconv_block is None:
        first_condconv_block = 1 + sum(stage.repeats for stage in stages[:_STATIC_STAGES])
    if dropout is None:
        dropout = 0.25 if num_experts else 0.2
    return Network(
        name="efficientnet_b0",
        stages=stages,
        style=Style(
            activation=swish,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal"
            ),
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            padding=padding,
        ),
        stem_filters=round_filters(32, width),
        head_filters=round_filters(1280, width),
        classifier_initializer=classifier_uniform(),
        num_classes=num_classes,
        num_experts=num_experts,
        first_condconv_block=first_condconv_block,
        condconv_head=condconv_head,
        condconv_classifier=condconv_classifier,
        routing=routing,
        image_size=image_size,
        dropout=dropout,
        survival=survival,
        normalization=normalization or ("condconv" if num_experts else "imagenet"),
    ).build()


def efficientnet_b0_depth(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    depth: float = 1.1,
    dropout: float | None = None,
    survival: float = 0.8,
    first_condconv_block: int | None = None,
    condconv_head: bool = False,
    condconv_classifier: bool = False,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.99,
    batch_norm_epsilon: float = 1e-3,
    normalization: Normalization | None = None,
    padding: str = "same",
) -> keras.Model:
    """EfficientNet-B0, 1.1 times as deep; 8 experts: 614 M multiply-adds, 79.5 % top-1 (official).

    The static network has the blocks of EfficientNet-B1; the conditional ones begin at the
    thirteenth. The arguments are those of ``efficientnet_b0``.
    """
    model = efficientnet_b0(**locals())
    model.name = "efficientnet_b0_depth"
    return model
