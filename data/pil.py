"""Training crops as PIL makes them: what our input is measured against.

TensorFlow is not imported here: it changes how the process allocates memory, and with it PIL's
speed.
"""

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom


def rounds(
    encoded: Sequence[bytes], boxes: Sequence[Box], flips: Sequence[bool], size: int
) -> dict[str, Callable[[], Iterator[int]]]:
    """Returns one round: each image once, as for a batch of a PyTorch loader, without workers."""

    def images() -> Iterator[int]:
        yield 0  # the clock starts here
        for work in zip(encoded, boxes, flips, strict=True):
            crop(*work, size)
            yield 1

    return {"PIL: crop, bicubic, flip": images}


def crop(encoded: bytes, box: Box, flip: bool, size: int) -> np.ndarray:
    """Returns a crop of a JPEG, resized to a square and perhaps mirrored, (size, size, 3) uint8."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB").crop(box)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
