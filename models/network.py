"""The record of an architecture, and from it to a Keras model that maps pixels to logits."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras

from condconv.layers import Logits
from condconv.normalization import PixelNormalization
from condconv.stochastic import Dropout
from models.blocks import PADDINGS, Convs, Stage, Style
from models.routing import RoutingStyle, RoutingWeights

Tensor = Any
Initializer = Any
Part = Callable[[str, Tensor, bool], Convs]  # by its name, input, and whether it is conditional

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network before it is built; each architecture is a record that derives from this one.

    Its class attributes are what makes the architecture:

        name: of the network, and of the function that builds it.
        stages: the table of its blocks.
        activation: after every convolution but a linear one.
        stem_filters, stem_kernel_size: of the first convolution, which has stride 2.
        stem_pool: whether a max-pooling 3×3 of stride 2 follows.
        head_filters: of the 1×1 convolution before the pooling; 0 for none.
        cost_rule: under which the paper printed its multiply-adds.

    Its fields are what a caller may change, with the paper's values for defaults. The last three of
    the following are fields only of those that have what they are about. A record adds what is
    special in it to what is said here.

    Attributes:
        num_classes: logits.
        num_experts: 0 for the static network, else the experts of each conditional layer.
        image_size: height and width of the input; None leaves them open.
        width: multiplier of the filters.
        dropout: share of the pooled features set to zero in training.
        first_condconv_block: the first conditional block, counted from 1; those behind it are
            conditional too. 0 makes the stem conditional as well; one more than there are blocks
            leaves all of them static.
        condconv_classifier: whether the last layer is conditional.
        routing: attributes of ``models.routing.RoutingStyle`` by name, such as
            ``{"activation": "softmax"}``. By default each conditional block, stem, head and
            classifier has a routing of its own on its input.
        expert_dropout: probability with which an example's routing weight of an expert is set to
            zero in training; those left are scaled up. A block's convolutions share the draw.
        batch_norm_momentum: the share of the moving statistics that a step keeps.
        batch_norm_epsilon: added to the variance.
        normalization: mean and deviation of the pixels: "imagenet", "condconv", "inception", or
            two triples.
        padding: "same", TensorFlow's (the odd zero goes behind); "symmetric", PyTorch's, in every
            convolution and pooling; "fixed", symmetric in strided convolutions alone, as the
            official ResNet has it.
        condconv_head: whether the convolution before the pooling is conditional.
        survival: probability with which the last residual branch is kept in training, falling
            linearly from 1 at the first block (official rule: by i/N for block i of N).
        depth: multiplier of the repeats.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    activation: ClassVar[str | Callable[[Tensor], Tensor]] = "relu"
    stem_filters: ClassVar[int]
    stem_kernel_size: ClassVar[int] = 3
    stem_pool: ClassVar[bool] = False
    head_filters: ClassVar[int] = 0
    cost_rule: ClassVar[str] = "R"

    num_classes: int = 1000
    num_experts: int = 0
    image_size: int | None = 224
    width: float = 1.0
    dropout: float = 0.0
    first_condconv_block: int = 1
    condconv_classifier: bool = False
    routing: Mapping[str, Any] | None = None
    expert_dropout: float = 0.0
    batch_norm_momentum: float = 0.99
    batch_norm_epsilon: float = 1e-3
    normalization: Normalization = "imagenet"
    padding: str = "same"
    # Fields of the records of those networks that have what they are about.
    condconv_head = False
    survival = 1.0
    depth = 1.0

    def __post_init__(self):
        blocks = len(self._blocks())
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
            (
                "expert_dropout",
                0 <= self.expert_dropout < 1,
                "a probability of at least 0 and below 1",
            ),
            (
                "batch_norm_momentum",
                0 <= self.batch_norm_momentum < 1,
                "a number of at least 0 and below 1",
            ),
            ("batch_norm_epsilon", self.batch_norm_epsilon > 0, "a positive number"),
            ("padding", self.padding in PADDINGS, f"one of {', '.join(PADDINGS)}"),
        )
        for argument, fits, allowed in checks:
            if not fits:
                value = getattr(self, argument)
                raise ValueError(f"{self.name}: {argument} takes {allowed}, not {value!r}")

    def initializers(self) -> tuple[Initializer, Initializer]:
        """Returns those of the convolutions, each of which gets a copy, and of the classifier."""
        return "he_normal", "glorot_uniform"

    def widen(self, filters: int) -> int:
        """Returns the filters of a network that is ``width`` times as wide."""
        return round_filters(filters, self.width)

    def widen_head(self, filters: int) -> int:
        """Returns those of the convolution before the pooling."""
        return self.widen(filters)

    def repeats(self, stage: Stage) -> int:
        """Returns the blocks of a stage in a network that is ``depth`` times as deep."""
        return math.ceil(scale(stage.repeats, self.depth, "depth"))

    def _blocks(self) -> list[Stage]:
        """Returns one row a block; only the first of a stage keeps its strides."""
        return [
            dataclasses.replace(
                stage,
                repeats=1,
                filters=self.widen(stage.filters),
                strides=stage.strides if repeat == 0 else 1,
            )
            for stage in self.stages
            for repeat in range(self.repeats(stage))
        ]

    def build(self) -> keras.Model:
        """Returns the model: pixels (B, H, W, 3) of 0–255 → logits (B, num_classes) float32."""
        kernel_initializer, classifier_initializer = self.initializers()
        routing_style = RoutingStyle.of(self.routing or {})
        routing_weights = RoutingWeights(routing_style, self.num_experts, self.expert_dropout)
        style = Style(
            activation=type(self).activation,  # of the class: from self a function gets bound
            kernel_initializer=kernel_initializer,
            batch_norm_momentum=self.batch_norm_momentum,
            batch_norm_epsilon=self.batch_norm_epsilon,
            padding=self.padding,
        )

        def part(name: str, x: Tensor, conditional: bool) -> Convs:
            routed = conditional and self.num_experts > 0
            return Convs(style, name, routing_weights.of(name, x) if routed else None)

        inputs = keras.Input((self.image_size, self.image_size, 3), name="images")
        x = self._build_stem(_normalize(inputs, self.normalization), part)
        x = self._build_blocks(x, part)
        if self.head_filters:
            head = part("head", x, self.condconv_head)
            x = head.conv(x, "conv", self.widen_head(self.head_filters))
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        x = self._build_classifier(x, part, classifier_initializer)
        return keras.Model(inputs, x, name=self.name)

    def _build_stem(self, x: Tensor, part: Part) -> Tensor:
        stem = part("stem", x, self.first_condconv_block == 0)
        x = stem.conv(x, "conv", self.widen(self.stem_filters), self.stem_kernel_size, strides=2)
        if not self.stem_pool:
            return x
        padding = "same"
        if self.padding == "symmetric":  # the activation leaves nothing below zero
            x, padding = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x), "valid"
        return keras.layers.MaxPooling2D(3, 2, padding, name="stem_pool")(x)

    def _build_blocks(self, x: Tensor, part: Part) -> Tensor:
        blocks = self._blocks()
        for index, stage in enumerate(blocks):
            convs = part(f"block{index + 1}", x, index + 1 >= self.first_condconv_block)
            survival = 1 - (1 - self.survival) * index / len(blocks)
            x = stage.block(x, stage, convs, survival)
        return x

    def _build_classifier(self, x: Tensor, part: Part, initializer: Initializer) -> Tensor:
        # Its routing sees the features before dropout.
        classifier = part("classifier", x, self.condconv_classifier)
        if self.dropout:
            x = Dropout(self.dropout, name="dropout")(x)
        x = classifier.dense(x, "", self.num_classes, initializer)
        return Logits(self.cost_rule, name="logits")(x)


def tpu_initializers() -> tuple[Initializer, Initializer]:
    """Returns those of tensorflow/tpu's MnasNet and EfficientNet, as they are on ImageNet.

    The classifier's is even within ±1/√1000. The official ±1/√classes would make the logits of 10
    classes ten times as large, and the network would start far worse than by chance.
    """
    convolutions = keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")
    limit = 1000**-0.5
    return convolutions, keras.initializers.RandomUniform(-limit, limit)


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
