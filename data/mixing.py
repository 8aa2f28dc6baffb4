"""Mixup and CutMix: two images and their labels into one.

Images are mixed within groups of consecutive examples of a batch, whose size is fixed, so the
result depends neither on the number of replicas nor on that of hosts. Every draw is a function of
the example's own seed; what a group shares is drawn from that of its first example.
"""

from collections.abc import Callable

import gin
import tensorflow as tf

from data.arguments import check

PAIRINGS = ("official", "standard")

_fold = tf.random.experimental.stateless_fold_in


@gin.register(denylist=["image", "label", "seed"])
def mixup(
    image: tf.Tensor,
    label: tf.Tensor,
    seed: tf.Tensor,
    alpha: float = 0.2,
    pairing: str = "official",
    group: int = 8,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes images and labels in shares λ and 1 − λ (Zhang et al., arXiv:1710.09412).

    Args:
        image: (B, H, W, 3).
        label: (B, num_classes) float32.
        seed: (B, 2) integer.
        alpha: λ is drawn from Beta(alpha, alpha).
        pairing: "official", that of tensorflow/tpu's EfficientNet: the i-th of a group with the
            i-th last, each with a λ of its own, the larger share its own. "standard", that of the
            authors: with a random permutation of the group, which has one λ.
        group: consecutive examples that are mixed among themselves; divides the batch.

    Returns:
        Images as float32, labels as float32.

    Raises:
        ValueError: for another pairing, alpha ≤ 0, or a group that does not divide the batch.
    """
    _check(image, alpha, pairing, group)
    draws = _draws(seed, alpha)
    own, partner = _shares(draws, pairing, group), _partners(draws, pairing, group)
    image = tf.cast(image, tf.float32)
    return _blend(image, partner, own), _blend(label, partner, own)


@gin.register(denylist=["image", "label", "seed"])
def cutmix(
    image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor, alpha: float = 1.0, group: int = 8
) -> tuple[tf.Tensor, tf.Tensor]:
    """Pastes a box of another image; labels count by area (Yun et al., arXiv:1905.04899).

    A group has one box, and a random permutation says whose pixels it holds. The box has a share
    1 − λ of the area, λ from Beta(alpha, alpha), and is cut off at the border; the labels' shares
    are those of what is left.

    Args, errors: as ``mixup``.

    Returns:
        Images as they came, labels as float32.
    """
    _check(image, alpha, "standard", group)
    draws = _draws(seed, alpha)
    partner = _partners(draws, "standard", group)
    shared = {name: _of_first(values, group) for name, values in draws.items()}
    inside = _boxes(shared, image.shape[1], image.shape[2])
    own = 1 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=(1, 2))
    pasted = tf.where(inside[..., None], tf.gather(image, partner), image)
    return pasted, _blend(label, partner, own)


@gin.register(denylist=["image", "label", "seed"])
def mixup_or_cutmix(
    image: tf.Tensor,
    label: tf.Tensor,
    seed: tf.Tensor,
    mixup_alpha: float = 0.2,
    cutmix_alpha: float = 1.0,
    switch: float = 0.5,
    group: int = 8,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each group by Mixup (standard pairing) or, with probability ``switch``, by CutMix."""
    check("mixup_or_cutmix.", ("switch", switch, 0 <= switch <= 1, "a probability"))
    first = _of_first(seed, group)
    cut = _each(first, lambda key: tf.random.stateless_uniform([], _fold(key, 7))) < switch
    image = tf.cast(image, tf.float32)
    mixed = mixup(image, label, seed, mixup_alpha, "standard", group)
    pasted = cutmix(image, label, seed, cutmix_alpha, group)
    return (
        tf.where(cut[:, None, None, None], pasted[0], mixed[0]),
        tf.where(cut[:, None], pasted[1], mixed[1]),
    )


def _check(image: tf.Tensor, alpha: float, pairing: str, group: int) -> None:
    batch = image.shape[0]
    check(
        "mixing: ",
        ("alpha", alpha, alpha > 0, "a number above 0"),
        ("pairing", pairing, pairing in PAIRINGS, " or ".join(PAIRINGS)),
        ("group", group, group > 1 and batch % group == 0, f"a divisor of the batch of {batch}"),
    )


def _each(seed: tf.Tensor, draw: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    return tf.map_fn(draw, seed, fn_output_signature=tf.float32)


def _draws(seed: tf.Tensor, alpha: float) -> dict[str, tf.Tensor]:
    """Returns (B,) each: λ of Beta(alpha, alpha), a place to be sorted by, and a centre."""

    def draw(key: tf.Tensor) -> tf.Tensor:
        gammas = tf.random.stateless_gamma([2], _fold(key, 8), alpha)
        uniform = tf.random.stateless_uniform([3], _fold(key, 9))
        # Both gammas can be 0 in float32 if alpha is tiny: then λ is 0 or 1, which halves mean.
        share = tf.where(tf.reduce_sum(gammas) > 0, gammas[0] / tf.reduce_sum(gammas), 1.0)
        return tf.concat([share[None], uniform], axis=0)

    drawn = _each(seed, draw)
    return {"share": drawn[:, 0], "place": drawn[:, 1], "y": drawn[:, 2], "x": drawn[:, 3]}


def _of_first(values: tf.Tensor, group: int) -> tf.Tensor:
    """Gives each example what the first of its group has."""
    return tf.repeat(values[::group], group, axis=0)


def _shares(draws: dict[str, tf.Tensor], pairing: str, group: int) -> tf.Tensor:
    if pairing == "official":
        return tf.maximum(draws["share"], 1 - draws["share"])
    return _of_first(draws["share"], group)


def _partners(draws: dict[str, tf.Tensor], pairing: str, group: int) -> tf.Tensor:
    """Returns for each example the place in the batch of the one it is mixed with."""
    batch = draws["share"].shape[0]
    places = tf.reshape(tf.range(batch), (-1, group))
    if pairing == "official":
        return tf.reshape(tf.reverse(places, [1]), [-1])
    order = tf.argsort(tf.reshape(draws["place"], (-1, group)), axis=1)
    return tf.reshape(tf.gather(places, order, batch_dims=1), [-1])


def _blend(values: tf.Tensor, partner: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
    own = tf.reshape(own, (-1, *[1] * (values.shape.rank - 1)))
    return values * own + tf.gather(values, partner) * (1 - own)


def _boxes(draws: dict[str, tf.Tensor], height: int, width: int) -> tf.Tensor:
    """Returns (B, height, width) bool: what lies in boxes of area 1 − share about the centres."""
    side = tf.sqrt(1 - draws["share"])
    rows = _within(draws["y"], side, height)
    return rows[:, :, None] & _within(draws["x"], side, width)[:, None, :]


def _within(centre: tf.Tensor, side: tf.Tensor, size: int) -> tf.Tensor:
    middle = tf.floor(centre * size)
    half = tf.floor(side * size) // 2
    places = tf.range(size, dtype=tf.float32)
    first, behind = middle - half, middle + half
    return (places >= first[:, None]) & (places < behind[:, None])
