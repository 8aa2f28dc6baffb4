"""What every contender does, however it does it."""

import dataclasses

import numpy as np

_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Steps of inference, or of training.

    Attributes:
        mode: "infer", or "train": forward, mean softmax cross-entropy, backward, SGD.
        batch_size: images in a step.
        image_size: their height and width.
        num_classes: of the labels.
        seconds: how long a round lasts, but for its last step.
        precision: one of ``comparison.PRECISIONS``, Keras' policies.
        xla: whether XLA compiles the whole step; on JAX it always does.
        form: one of ``comparison.FORMS``, of a network of ours in inference: as it is trained;
            with batch norm folded into the kernels; with constants instead of variables; both.
        dynamic_batch: whether the batch is unknown when the step is compiled.
        learning_rate, momentum: of SGD. A small rate keeps all weights in the range in which
            arithmetic is fast.
    """

    mode: str
    batch_size: int
    image_size: int = 224
    num_classes: int = 1000
    seconds: float = 1.0
    precision: str = "float32"
    xla: bool = False
    form: str = "variables"
    dynamic_batch: bool = False
    learning_rate: float = 1e-3
    momentum: float = 0.9

    def images(self) -> np.ndarray:
        """Returns pixels (B, H, W, 3) uint8, the same for every contender."""
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return np.random.default_rng(_SEED).integers(0, 256, shape).astype("uint8")

    def labels(self) -> np.ndarray:
        """Returns classes (B,) int32, the same for every contender."""
        draw = np.random.default_rng(_SEED + 1)
        return draw.integers(0, self.num_classes, self.batch_size).astype("int32")
