"""The least that a conditional network must take longer than its static twin."""

from collections.abc import Mapping

_FLOAT32_BYTES = 4


def traffic(
    mode: str, batch_size: int, num_experts: int, expert_weights: int, mixed_weights: int
) -> dict[str, int]:
    """Returns the bytes that a step moves because of its experts, in float32, by what moves them.

    With P weights of an expert, n experts and a batch of B, of which M of the P weights are mixed
    into a kernel for each example (a dense layer mixes its outputs instead):

    ============================================  ======  =========================
    what                                          bytes   when
    ============================================  ======  =========================
    experts, read to be mixed                     4·n·P   always
    mixed kernels, written and read               8·B·M   B > 1, or training
    mixed kernels, read for the input's gradient  4·B·M   training
    their gradients, written, read twice          12·B·M  training: routing, experts
    experts, read for the routing's gradient      4·n·P   training
    experts' gradients, written                   4·n·P   training
    optimizer: weight, gradient and momentum      20·n·P  training: 3 read, 2 written
    ============================================  ======  =========================

    The mixed kernel of a single image stays in the cache. For several images it may as well, so
    that a network can be a little faster than a bound made of this.

    Args:
        mode: "infer" or "train".
        batch_size: images in a step, B.
        num_experts: n.
        expert_weights: of one expert over all layers, P.
        mixed_weights: M.
    """
    experts = _FLOAT32_BYTES * num_experts * expert_weights
    mixed = _FLOAT32_BYTES * batch_size * mixed_weights
    moved = {"experts read": experts}
    if mode == "train" or batch_size > 1:
        moved["mixed kernels written and read"] = 2 * mixed
    if mode == "train":
        moved |= {
            "mixed kernels read for the input's gradient": mixed,
            "gradients of mixed kernels written, read twice": 3 * mixed,
            "experts read for the routing's gradient": experts,
            "gradients of experts written": experts,
            "optimizer": 5 * experts,
        }
    return moved


def roofline(
    moved: Mapping[str, int], bandwidth: float, static_seconds: float, multiply_adds_ratio: float
) -> dict[str, float]:
    """Returns by how much a network has to be slower than its static twin.

    Args:
        moved: of ``traffic``.
        bandwidth: of the memory, in bytes per second.
        static_seconds: that a step of the static twin takes.
        multiply_adds_ratio: of the network's multiply-adds over its twin's.

    Returns:
        ``bytes``, the ``seconds`` that they need, ``bytes_bound`` = 1 + these over the twin's,
        ``multiply_adds_ratio``, and ``bound``, the larger one.
    """
    total = sum(moved.values())
    seconds = total / bandwidth
    bytes_bound = 1 + seconds / static_seconds
    return {
        "bytes": total,
        "bandwidth": bandwidth,
        "seconds": seconds,
        "multiply_adds_ratio": multiply_adds_ratio,
        "bytes_bound": bytes_bound,
        "bound": max(bytes_bound, multiply_adds_ratio),
    }
