"""From a table of stages to a Keras model that maps pixels to logits."""

import dataclasses
import math
from typing import Any

import keras

from condconv.layers import Logits
from condconv.normalization import PixelNormalization
from condconv.stochastic import Dropout
from models.blocks import Convs, Stage, Style
from models.routing import Knobs, Router, Routers

Tensor = Any

# Mean and deviation of pixels, which each network was published with.
NORMALIZATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "condconv": ((127.0,) * 3, (128.0,) * 3),  # the official EfficientNet-CondConv: not 127.5
    "inception": ((127.5,) * 3, (127.5,) * 3),
}

Normalization = str | tuple[tuple[float, ...], tuple[float, ...]]


def scale(number: int, multiplier: float, name: str = "width") -> float:
    """Returns ``number`` times a network's width or depth.

    Raises:
        ValueError: if the multiplier is not above 0; ``name`` says which it was.
    """
    if not 0 < multiplier < math.inf:
        raise ValueError(f"{name} takes a number above 0, not {multiplier}")
    return number * multiplier


def round_filters(filters: int, width: float = 1.0) -> int:
    """Returns ``filters`` times ``width``, as a multiple of eight (official rule).

    It is never rounded down by more than a tenth. Raises as ``scale`` does.
    """
    scaled = scale(filters, width)
    rounded = max(8, 8 * (int(scaled + 4) // 8))
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def unroll(stages: tuple[Stage, ...]) -> list[Stage]:
    """Returns one row a block; only the first of a stage keeps its strides."""
    return [
        dataclasses.replace(stage, repeats=1, strides=stage.strides if repeat == 0 else 1)
        for stage in stages
        for repeat in range(stage.repeats)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network before it is built: its table, and what the caller may change.

    Attributes:
        name: of the model.
        stages: the table of its blocks.
        style: what its convolutions have in common.
        stem_filters, stem_kernel_size: of the first convolution, which has stride 2.
        stem_pool: whether a max-pooling 3×3 of stride 2 follows.
        head_filters: of the 1×1 convolution before the pooling; 0 for none.
        classifier_initializer: of the last dense layer.
        num_classes: logits.
        num_experts: 0 for the static network, else the experts of each conditional layer.
        first_condconv_block: the first conditional block, counted from 1; those behind it are
            conditional too. 0 makes the stem conditional as well; one more than there are blocks
            leaves all of them static.
        condconv_head, condconv_classifier: whether these are conditional.
        routing: knobs of the routers by name, those of ``models.routing.Routers``, such as
            ``{"activation": "softmax"}``. By default each conditional block, stem, head and
            classifier has a router of its own on its input.
        image_size: height and width of the input; None leaves them open.
        dropout: share of the pooled features set to zero in training.
        survival: probability with which the last residual branch is kept in training, falling
            linearly from 1 at the first block (official rule: by i/N for block i of N).
        normalization: mean and deviation of the pixels, by name or as two triples.
        cost_rule: under which the paper printed this network's multiply-adds.
    """

    name: str
    stages: tuple[Stage, ...]
    style: Style = Style()
    stem_filters: int
    stem_kernel_size: int = 3
    stem_pool: bool = False
    head_filters: int = 0
    classifier_initializer: Any = "glorot_uniform"
    num_classes: int = 1000
    num_experts: int = 0
    first_condconv_block: int = 1
    condconv_head: bool = False
    condconv_classifier: bool = False
    routing: Knobs | None = None
    image_size: int | None = 224
    dropout: float = 0.0
    survival: float = 1.0
    normalization: Normalization = "imagenet"
    cost_rule: str = "R"

    def __post_init__(self):
        blocks = len(unroll(self.stages))
        checks = (
            ("num_classes", self.num_classes >= 1, "an integer of at least 1"),
            ("num_experts", self.num_experts >= 0, "0 (static) or a positive integer"),
            (
                "first_condconv_block",
                0 <= self.first_condconv_block <= blocks + 1,
                f"a block from 1 to {blocks}, 0 (the stem too) or {blocks + 1} (no block)",
            ),
            ("image_size", self.image_size is None or self.image_size >= 1, "a positive integer"),
            ("dropout", 0 <= self.dropout < 1, "a share of at least 0 and below 1"),
            ("survival", 0 < self.survival <= 1, "a probability above 0 and at most 1"),
        )
        for argument, fits, allowed in checks:
            if not fits:
                value = getattr(self, argument)
                raise ValueError(f"{self.name}: {argument} takes {allowed}, not {value}")

    def build(self) -> keras.Model:
        """Returns the model: pixels (B, H, W, 3) of 0–255 → logits (B, num_classes) float32."""
        routers = Routers.of(self.routing or {})
        router = Router(routers, self.num_experts, self.style.expert_dropout)
        inputs = keras.Input((self.image_size, self.image_size, 3), name="images")
        x = self._stem(_normalize(inputs, self.normalization), router)
        x = self._blocks(x, router)
        if self.head_filters:
            convs = self._convs("head", x, router, self.condconv_head)
            x = convs.conv(x, "conv", self.head_filters)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        return keras.Model(inputs, self._classifier(x, router), name=self.name)

    def _convs(self, name: str, x: Tensor, router: Router, conditional: bool) -> Convs:
        conditional = conditional and self.num_experts > 0
        return Convs(self.style, name, router.route(name, x) if conditional else None)

    def _stem(self, x: Tensor, router: Router) -> Tensor:
        convs = self._convs("stem", x, router, self.first_condconv_block == 0)
        x = convs.conv(x, "conv", self.stem_filters, self.stem_kernel_size, strides=2)
        if not self.stem_pool:
            return x
        padding = "same"
        if self.style.padding == "symmetric":  # the activation leaves nothing below zero
            x, padding = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x), "valid"
        return keras.layers.MaxPooling2D(3, 2, padding, name="stem_pool")(x)

    def _blocks(self, x: Tensor, router: Router) -> Tensor:
        blocks = unroll(self.stages)
        for index, stage in enumerate(blocks):
            conditional = index + 1 >= self.first_condconv_block
            convs = self._convs(f"block{index + 1}", x, router, conditional)
            survival = 1 - (1 - self.survival) * index / len(blocks)
            x = stage.block(x, stage, convs, survival)
        return x

    def _classifier(self, x: Tensor, router: Router) -> Tensor:
        # The router sees the features before dropout.
        convs = self._convs("classifier", x, router, self.condconv_classifier)
        if self.dropout:
            x = Dropout(self.dropout, name="dropout")(x)
        x = convs.dense(x, "", self.num_classes, self.classifier_initializer)
        return Logits(self.cost_rule, name="logits")(x)


def classifier_uniform() -> keras.initializers.Initializer:
    """Returns the initializer of tensorflow/tpu's classifiers, as it is on ImageNet.

    Even within ±1/√1000. The official ±1/√classes would make the logits of 10 classes ten times as
    large, and the network would start far worse than by chance.
    """
    limit = 1000**-0.5
    return keras.initializers.RandomUniform(-limit, limit)


def _normalize(pixels: Tensor, normalization: Normalization) -> Tensor:
    if isinstance(normalization, str):
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization takes one of {', '.join(NORMALIZATIONS)} or a pair of mean and "
                f"deviation, not {normalization!r}"
            )
        normalization = NORMALIZATIONS[normalization]
    mean, deviation = normalization
    return PixelNormalization(mean, deviation, name="normalization")(pixels)
