"""What the authors printed, to stand beside what we count and measure.

Sources: Table 1 of Yang et al., NeurIPS 2019 (arXiv:1904.04971); for the network with four experts
and the deeper one, the README of tensorflow/tpu, models/official/efficientnet/condconv.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A network as published.

    Attributes:
        model: its name here.
        num_experts: 0 for the static network.
        multiply_adds: in millions, as printed; None where none was.
        top1: on ImageNet's validation images, in percent; None where none was printed.
    """

    model: str
    num_experts: int
    multiply_adds: int | None
    top1: float | None


PAPER = (
    PaperRow("mobilenet_v1", 0, 567, 71.9),
    PaperRow("mobilenet_v1", 8, 600, 73.7),
    PaperRow("mobilenet_v2", 0, 301, 71.6),
    PaperRow("mobilenet_v2", 8, 329, 74.6),
    PaperRow("mnasnet_a1", 0, 312, 74.9),
    PaperRow("mnasnet_a1", 8, 325, 76.2),
    PaperRow("resnet50", 0, 4093, 77.7),
    PaperRow("resnet50", 8, 4213, 78.6),
    PaperRow("efficientnet_b0", 0, 391, 77.2),
    PaperRow("efficientnet_b0", 4, 402, 77.8),
    PaperRow("efficientnet_b0", 8, 413, 78.3),
    PaperRow("efficientnet_b0_depth", 0, None, None),
    PaperRow("efficientnet_b0_depth", 8, 614, 79.5),
)
