"""MnasNet-A1 (Tan et al., arXiv:1807.11626), as tensorflow/tpu, models/official/mnasnet has it."""

import dataclasses
import functools

import keras

from models.blocks import Stage, Style, inverted_bottleneck
from models.network import Network, Normalization, classifier_uniform, round_filters
from models.routing import Knobs

_MBConv = functools.partial(Stage, block=inverted_bottleneck)

STAGES = (
    _MBConv(repeats=1, filters=16),
    _MBConv(repeats=2, filters=24, strides=2, expansion=6),
    _MBConv(repeats=3, filters=40, strides=2, expansion=3, kernel_size=5, se_ratio=0.25),
    _MBConv(repeats=4, filters=80, strides=2, expansion=6),
    _MBConv(repeats=2, filters=112, expansion=6, se_ratio=0.25),
    _MBConv(repeats=3, filters=160, strides=2, expansion=6, kernel_size=5, se_ratio=0.25),
    _MBConv(repeats=1, filters=320, expansion=6),
)


def mnasnet_a1(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    dropout: float = 0.2,
    survival: float = 1.0,
    first_condconv_block: int = 11,
    condconv_head: bool = False,
    condconv_classifier: bool = False,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.99,
    batch_norm_epsilon: float = 1e-3,
    normalization: Normalization = "imagenet",
    padding: str = "same",
) -> keras.Model:
    """MnasNet-A1: 312 M multiply-adds, 74.9 % top-1 (paper); 8 experts: 325 M, 76.2 %.

    Args:
        num_classes, num_experts, image_size, dropout, survival, first_condconv_block,
            condconv_head, condconv_classifier, routing, normalization: see
            ``models.network.Network``. By default the blocks of the last three groups are
            conditional.
        width: multiplier of the filters, but for the last convolution.
        batch_norm_momentum, batch_norm_epsilon, padding: see ``models.blocks.Style``.
    """
    return Network(
        name="mnasnet_a1",
        stages=tuple(
            dataclasses.replace(stage, filters=round_filters(stage.filters, width))
            for stage in STAGES
        ),
        style=Style(
            activation="relu",
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal"
            ),
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            padding=padding,
        ),
        stem_filters=round_filters(32, width),
        head_filters=1280,
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
        normalization=normalization,
    ).build()
