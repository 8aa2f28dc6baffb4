"""Where the weights of timm's networks belong in ours, and what timm computes otherwise.

The names are those of pytorch-image-models 1.0. Its networks whose names begin with "tf_" compute
as TensorFlow does; all others pad symmetrically, and their batch norm's epsilon is 1e-5.
"""

import dataclasses
import itertools
import re
from typing import Any

import keras

from models.released import Names, variables_of

_WEIGHTS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_ENDS = {
    "stem_conv": "conv_stem",
    "stem_conv_bn": "bn1",
    "head_conv": "conv_head",
    "head_conv_bn": "bn2",
    "classifier": "classifier",
}
_RESNET_ENDS = {"stem_conv": "conv1", "stem_conv_bn": "bn1", "classifier": "fc"}
_RESNET_PARTS = {
    "reduce": "conv1",
    "reduce_bn": "bn1",
    "conv": "conv2",
    "conv_bn": "bn2",
    "expand": "conv3",
    "expand_bn": "bn3",
    "shortcut": "downsample.0",
    "shortcut_bn": "downsample.1",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of timm's networks.

    Attributes:
        name: timm's.
        model: ours.
        num_experts: of each conditional layer.
        normalization: of its pixels, unless its weights come with another.
    """

    name: str
    model: str
    num_experts: int = 0
    normalization: str = "imagenet"

    def arguments(self) -> dict[str, Any]:
        """Returns what our network has to be built with to compute the same."""
        as_tensorflow = self.name.startswith("tf_")
        return {
            "num_experts": self.num_experts,
            "padding": "same" if as_tensorflow else "symmetric",
            "batch_norm_epsilon": 1e-3 if as_tensorflow else 1e-5,
            "normalization": self.normalization,
        }


ARCHITECTURES = tuple(
    itertools.starmap(
        Architecture,
        (  # the first of a network is taken where a file does not name its own
            ("tf_efficientnet_b0", "efficientnet_b0"),
            ("efficientnet_b0", "efficientnet_b0"),
            ("tf_efficientnet_b1", "efficientnet_b0_depth"),
            ("efficientnet_b1", "efficientnet_b0_depth"),
            ("tf_efficientnet_cc_b0_4e", "efficientnet_b0", 4, "inception"),
            ("efficientnet_cc_b0_4e", "efficientnet_b0", 4),
            ("tf_efficientnet_cc_b0_8e", "efficientnet_b0", 8, "inception"),
            ("efficientnet_cc_b0_8e", "efficientnet_b0", 8),
            ("tf_efficientnet_cc_b1_8e", "efficientnet_b0_depth", 8, "inception"),
            ("efficientnet_cc_b1_8e", "efficientnet_b0_depth", 8),
            ("mobilenetv1_100", "mobilenet_v1", 0, "inception"),
            ("mobilenetv2_100", "mobilenet_v2"),
            ("semnasnet_100", "mnasnet_a1"),
            ("resnet50", "resnet50"),
        ),
    )
)


def architecture(model: str, num_experts: int, name: str | None = None) -> Architecture:
    """Returns timm's network of that name, or its first that is this network of ours.

    Args:
        model: our network.
        num_experts: its experts.
        name: timm's, if it is known. One that is not in the table gives the first one too: whose
            weights do not fit will say what differs, see ``check_known``.

    Raises:
        ValueError: if that network is another one of ours, or timm has none such.
    """
    ours = [a for a in ARCHITECTURES if (a.model, a.num_experts) == (model, num_experts)]
    named = next((a for a in ARCHITECTURES if a.name == name), None)
    if named and named not in ours:
        raise ValueError(
            f"timm's {name} is --model={named.model} --num_experts={named.num_experts}, "
            f"not {model} with {num_experts} experts"
        )
    if not ours:
        known = ", ".join(f"{a.model} {a.num_experts} ({a.name})" for a in ARCHITECTURES)
        raise ValueError(
            f"timm has no {model} with {num_experts} experts; it has, of these networks and "
            f"numbers of experts: {known}"
        )
    return named or ours[0]


def check_known(name: str | None, like: Architecture) -> None:
    """Checks that a network whose weights fit is one that computes as expected.

    Raises:
        ValueError: if it is not in the table.
    """
    if name and name != like.name:
        raise ValueError(
            f"timm's {name} has the weights of {like.name}, but may pad, normalise or activate "
            f"otherwise; known are {', '.join(a.name for a in ARCHITECTURES)}"
        )


def timm_names(model: keras.Model) -> Names:
    """Returns the name in timm's state dict for the path of each variable."""
    rule = _resnet if model.name == "resnet50" else _inverted
    blocks = _positions(model)
    names = {}
    for path in variables_of(model):
        layer, weight = path.rsplit("/", 1)
        names[path] = f"{rule(layer, blocks, model)}.{_WEIGHTS.get(weight, weight)}"
    return names


def _positions(model: keras.Model) -> dict[str, tuple[int, int]]:
    """Returns stage and place in it of each block: a stage is of one number of filters."""
    positions, stage, place, filters = {}, -1, 0, None
    for layer in model.layers:
        if match := re.fullmatch(r"(block\d+)_(pointwise|project|out_act)", layer.name):
            if layer.output.shape[-1] != filters:
                stage, place, filters = stage + 1, -1, layer.output.shape[-1]
            place += 1
            positions[match[1]] = (stage, place)
    return positions


def _resnet(layer: str, blocks: dict[str, tuple[int, int]], model: keras.Model) -> str:
    if layer in _RESNET_ENDS:
        return _RESNET_ENDS[layer]
    block, part = layer.split("_", 1)
    stage, place = blocks[block]
    return f"layer{stage + 1}.{place}.{_RESNET_PARTS[part]}"


def _inverted(layer: str, blocks: dict[str, tuple[int, int]], model: keras.Model) -> str:
    """A block's pointwise convolutions are conv_pw, then conv_pwl; its norms are counted from 1."""
    if layer in _ENDS:
        return _ENDS[layer]
    block, part = layer.split("_", 1)
    present = {each.name for each in model.layers}
    order = [
        p for p in ("expand", "depthwise", "pointwise", "project") if f"{block}_{p}" in present
    ]
    convs = dict(zip((p for p in order if p != "depthwise"), ("conv_pw", "conv_pwl"), strict=False))
    norms = {f"{p}_bn": f"bn{index}" for index, p in enumerate(order, 1)}
    others = {
        "depthwise": "conv_dw",
        "se_reduce": "se.conv_reduce",
        "se_expand": "se.conv_expand",
        "routing": "routing_fn",
    }
    return ".".join(("blocks", *map(str, blocks[block]), (convs | norms | others)[part]))


def timm_layout(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape in timm's state dict, and our axes in the order that they have there.

    PyTorch's kernels are (out, in, height, width), timm's experts lie flat in that order.
    """
    depthwise = path.endswith("_depthwise/kernel")
    axes = {1: (0,), 2: (1, 0), 4: (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)}
    if len(shape) != 5:
        order = axes[len(shape)]
        return tuple(shape[axis] for axis in order), order
    expert = axes[4]
    flat = (shape[0], shape[1] * shape[2] * shape[3] * shape[4])
    return flat, (0, *(1 + axis for axis in expert))
