"""MobileNetV2 (Sandler et al., arXiv:1801.04381), as tensorflow/models' slim has it."""

import dataclasses
import functools

import keras

from models.blocks import Stage, Style, inverted_bottleneck
from models.network import Network, Normalization, round_filters
from models.routing import Knobs

_Bottleneck = functools.partial(Stage, block=inverted_bottleneck, expansion=6)

STAGES = (
    _Bottleneck(repeats=1, filters=16, expansion=1),
    _Bottleneck(repeats=2, filters=24, strides=2),
    _Bottleneck(repeats=3, filters=32, strides=2),
    _Bottleneck(repeats=4, filters=64, strides=2),
    _Bottleneck(repeats=3, filters=96),
    _Bottleneck(repeats=3, filters=160, strides=2),
    _Bottleneck(repeats=1, filters=320),
)


def mobilenet_v2(
    *,
    num_classes: int = 1000,
    num_experts: int = 0,
    image_size: int | None = 224,
    width: float = 1.0,
    dropout: float = 0.2,
    survival: float = 1.0,
    first_condconv_block: int = 2,
    condconv_head: bool = True,
    condconv_classifier: bool = True,
    routing: Knobs | None = None,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-3,
    normalization: Normalization = "inception",
    padding: str = "same",
) -> keras.Model:
    """MobileNetV2: 301 M multiply-adds, 71.6 % top-1 (paper); 8 experts: 329 M, 74.6 %.

    Args:
        num_classes, num_experts, image_size, dropout, survival, condconv_head,
            condconv_classifier, routing, normalization: see ``models.network.Network``.
        width: multiplier of the filters; the last convolution only grows with it.
        first_condconv_block: counted from 1. The paper's number of multiply-adds fits conditional
            blocks from the second on (328.97 M, the last six of seven groups); its text can also
            be read as from the sixth on (328.49 M).
        batch_norm_momentum, batch_norm_epsilon, padding: see ``models.blocks.Style``.
    """
    initializer = keras.initializers.TruncatedNormal(stddev=0.09)
    return Network(
        name="mobilenet_v2",
        stages=tuple(
            dataclasses.replace(stage, filters=round_filters(stage.filters, width))
            for stage in STAGES
        ),
        style=Style(
            activation="relu6",
            kernel_initializer=initializer,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_epsilon=batch_norm_epsilon,
            padding=padding,
        ),
        stem_filters=round_filters(32, width),
        head_filters=round_filters(1280, max(width, 1.0)),
        classifier_initializer=initializer,
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
