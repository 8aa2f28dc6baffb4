"""Where the weights of the authors' checkpoints belong in our networks.

The official files name variables as TensorFlow 1 did; the rules below give, for each variable of
one of our networks, its place there:

- tensorflow/tpu, models/official/efficientnet: EfficientNet-B0, its deeper variant and the CondConv
  networks; models/official/mnasnet: MnasNet-A1; models/official/resnet: ResNet-50;
- tensorflow/models, research/slim: MobileNetV1 and MobileNetV2.
"""

import collections
import re
from collections.abc import Callable, Collection, Mapping

import keras
import numpy as np

Names = dict[str, str]  # in a checkpoint, by the path of our variable
Layout = Callable[[str, tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

_WEIGHTS_OF_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_PARTS = ("expand", "depthwise", "se_reduce", "se_expand", "project")  # as they are created
_COUNTED = re.compile(r"(.*/)?((?:depthwise_)?(?:cond_)?conv2d)(?:_(\d+))?/([^/]+)")


def variables_of(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns the variables that a checkpoint has to have, by path."""
    return {v.path: v for v in model.variables if not v.path.endswith("seed_generator_state")}


def tf1_names(model: keras.Model, scope: str) -> Names:
    """Returns the name in a TensorFlow 1 checkpoint for the path of each variable.

    Args:
        model: one of our networks.
        scope: the root of the names, such as "efficientnet-condconv-b0-4e" or "MobilenetV1". The
            official ResNet has none.

    Raises:
        ValueError: if no checkpoint of such a network has been published.
    """
    conditional = any(layer.name.endswith("_routing") for layer in model.layers)
    known = _WITH_EXPERTS if conditional else tuple(_RULES)
    if model.name not in known:
        experts = " with experts" if conditional else ""
        raise ValueError(
            f"no TensorFlow 1 checkpoint of {model.name!r}{experts} has been published; "
            f"there are those of {', '.join(known)}"
        )
    layers = _RULES[model.name](model, scope)
    weight_name = _slim_weight if model.name in _SLIM else _keras_weight
    split = ((path, *path.rsplit("/", 1)) for path in variables_of(model))
    return {
        path: f"{layers[layer]}/{weight_name(layers[layer], weight)}"
        for path, layer, weight in split
    }


def tf1_scope(names: Collection[str]) -> str:
    """Returns the root that most names of a checkpoint share."""
    roots = collections.Counter(name.split("/")[0] for name in names)
    return roots.most_common(1)[0][0] if roots else ""


def recounted(names: Names, found: Collection[str]) -> Names:
    """Returns names as a checkpoint has them whose numbers of layers are shifted.

    Keras counts layers through a whole graph: what was built before, or is never used, shifts all
    numbers, and only their order within a block is sure. Names that cannot all be found so either
    are returned as they are.
    """
    wanted = _ranked(names.values())
    at = {key: name for name, key in _ranked(found).items()}
    if set(names.values()) <= set(found) or not set(wanted.values()) <= set(at):
        return names
    return {path: at[wanted[name]] if name in wanted else name for path, name in names.items()}


def _ranked(names: Collection[str]) -> Names:
    """Returns counted names with the rank, among those of a folder, for the number of a layer."""
    split = {
        name: match.groups(default="") for name in names if (match := _COUNTED.fullmatch(name))
    }
    numbers = collections.defaultdict(set)
    for folder, kind, number, _ in split.values():
        numbers[folder, kind].add(int(number or 0))
    ranks = {key: sorted(found) for key, found in numbers.items()}
    return {
        name: "/".join(
            (
                re.sub(r"/model_\d+/", "/model/", folder),
                kind,
                str(ranks[folder, kind].index(int(number or 0))),
                weight,
            )
        )
        for name, (folder, kind, number, weight) in split.items()
    }


def tf1_layout(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape in a TensorFlow 1 checkpoint, and our axes in the order they have there.

    Experts lie flat there.
    """
    flat = (shape[0], int(np.prod(shape[1:]))) if len(shape) == 5 else shape
    return flat, tuple(range(len(shape)))


def assign(
    model: keras.Model,
    values: Mapping[str, np.ndarray],
    names: Names,
    layout: Layout = tf1_layout,
) -> None:
    """Gives each variable of ``model`` its value, or changes nothing.

    Args:
        model: one of our networks.
        values: the variables of a checkpoint by name. A dense kernel may be a 1×1 convolution's.
        names: by path of our variables.
        layout: tells the shape that a variable has in the checkpoint, by its path and our shape,
            and our axes in the order that they have there.

    Raises:
        ValueError: if values are missing, left over or of another shape; they are named.
    """
    variables = variables_of(model)
    layouts = {path: layout(path, tuple(v.shape)) for path, v in variables.items()}
    missing = sorted(set(names.values()) - set(values))
    left_over = sorted(set(values) - set(names.values()))
    misshapen = [
        f"{name} has {values[name].shape}, not {layouts[path][0]}"
        for path, name in names.items()
        if name in values and not _has_shape(values[name], layouts[path][0])
    ]
    kinds = {"missing": missing, "left over": left_over, "misshapen": misshapen}
    if problems := [f"{kind}: {', '.join(found)}" for kind, found in kinds.items() if found]:
        raise ValueError(f"the checkpoint does not fit {model.name}:\n  " + "\n  ".join(problems))
    for path, name in names.items():
        _, axes = layouts[path]
        shape = variables[path].shape
        value = values[name].reshape([shape[axis] for axis in axes])
        variables[path].assign(value.transpose(np.argsort(axes)))


def _has_shape(value: np.ndarray, shape: tuple[int, ...]) -> bool:
    return value.shape == shape or (len(shape) == 2 and value.shape == (1, 1, *shape))


def _keras_weight(layer: str, weight: str) -> str:
    kind = layer.rsplit("/", 1)[-1]
    if weight != "kernel":
        return weight
    prefix = "depthwise_" if kind.startswith("depthwise") else ""
    return f"{prefix}condconv_kernel" if "cond_conv2d" in kind else f"{prefix}kernel"


def _slim_weight(layer: str, weight: str) -> str:
    if weight in _WEIGHTS_OF_NORM:
        return f"BatchNorm/{weight}"
    if weight == "bias":
        return "biases"
    return "depthwise_weights" if layer.endswith("depthwise") else "weights"


Layers = dict[str, str]  # in a checkpoint, by the name of ours


def _blocks(model: keras.Model) -> dict[int, list[str]]:
    """Returns the convolutions of each block, by its number, in the order of their creation."""
    layers = {layer.name for layer in model.layers}
    numbers = sorted({int(m[1]) for name in layers if (m := re.match(r"block(\d+)_", name))})
    return {n: [part for part in _PARTS if f"block{n}_{part}" in layers] for n in numbers}


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _efficientnet(model: keras.Model, scope: str) -> Layers:
    norm, names = "tpu_batch_normalization", {layer.name for layer in model.layers}
    layers = {"classifier": f"{scope}/head/dense"}
    for part in ("stem", "head"):
        layers[f"{part}_conv"] = f"{scope}/{part}/conv2d"
        layers[f"{part}_conv_bn"] = f"{scope}/{part}/{norm}"
    conditional = [number for number in _blocks(model) if f"block{number}_routing" in names]
    for number, parts in _blocks(model).items():
        block, ours = f"{scope}/blocks_{number - 1}", f"block{number}"
        convs = [part for part in parts if not part.startswith("se_")]
        for index, part in enumerate(convs):
            layers[f"{ours}_{part}_bn"] = f"{block}/{_numbered(norm, index)}"
        layers[f"{ours}_se_reduce"] = f"{block}/se/conv2d"
        layers[f"{ours}_se_expand"] = f"{block}/se/conv2d_1"
        if number not in conditional:
            layers[f"{ours}_depthwise"] = f"{block}/depthwise_conv2d"
            for index, part in enumerate(part for part in convs if part != "depthwise"):
                layers[f"{ours}_{part}"] = f"{block}/{_numbered('conv2d', index)}"
            continue
        # Layers of Keras, unlike those of tf.layers, count through the whole graph; the first of
        # three conditional convolutions of a block is made but never used.
        rank, keras_block = conditional.index(number), f"{scope}/model/blocks_{number - 1}"
        layers[f"{ours}_routing"] = f"{block}/dense"
        layers[f"{ours}_expand"] = f"{keras_block}/cond_conv2d_{3 * rank + 1}"
        layers[f"{ours}_depthwise"] = f"{keras_block}/{_numbered('depthwise_cond_conv2d', rank)}"
        layers[f"{ours}_project"] = f"{keras_block}/cond_conv2d_{3 * rank + 2}"
    return layers


def _mnasnet(model: keras.Model, scope: str) -> Layers:
    """One count of convolutions through the blocks, then the stem, then the head."""
    made, norm = 0, "batch_normalization"
    layers = {"classifier": f"{scope}/mnas_net_model/mnas_head/dense"}
    for number, parts in _blocks(model).items():
        ours, block = f"block{number}", f"mnas_blocks_{number - 1}"
        convs = [part for part in parts if not part.startswith("se_")]
        for index, part in enumerate(convs):
            layers[f"{ours}_{part}_bn"] = f"{scope}/{block}/{_numbered(norm, index)}"
        for part in parts:
            folder = f"{scope}/mnas_net_model/{block}" + ("/se" if part.startswith("se_") else "")
            if part == "depthwise":
                name = _numbered("depthwise_conv2d", number - 1)
            else:
                name, made = _numbered("conv2d", made), made + 1
            layers[f"{ours}_{part}"] = f"{folder}/{name}"
    for index, part in enumerate(("stem", "head")):
        layers[f"{part}_conv"] = f"{scope}/mnas_net_model/mnas_{part}/conv2d_{made + index}"
        layers[f"{part}_conv_bn"] = f"{scope}/mnas_{part}/{norm}"
    return layers


def _resnet(model: keras.Model, scope: str) -> Layers:
    """Everything at the root, in the order of creation: a shortcut comes first in its block."""
    convs = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    order = ("shortcut", "reduce", "conv", "expand")

    def position(name: str) -> tuple[int, int]:
        block, part = name.split("_")
        return (0 if block == "stem" else int(block.removeprefix("block")), order.index(part))

    layers = {"classifier": "dense"}
    for index, name in enumerate(sorted(convs, key=position)):
        layers[name] = _numbered("conv2d", index)
        layers[f"{name}_bn"] = _numbered("batch_normalization", index)
    return layers


def _mobilenet_v1(model: keras.Model, scope: str) -> Layers:
    layers = {"stem_conv": f"{scope}/Conv2d_0", "stem_conv_bn": f"{scope}/Conv2d_0"}
    for layer in model.layers:
        if match := re.fullmatch(r"block(\d+)_(depthwise|pointwise)(_bn)?", layer.name):
            layers[layer.name] = f"{scope}/Conv2d_{match[1]}_{match[2]}"
    return layers | {"classifier": f"{scope}/Logits/Conv2d_1c_1x1"}


def _mobilenet_v2(model: keras.Model, scope: str) -> Layers:
    layers = {"stem_conv": "Conv", "head_conv": "Conv_1", "classifier": "Logits/Conv2d_1c_1x1"}
    for number, parts in _blocks(model).items():
        block = _numbered("expanded_conv", number - 1)
        layers |= {f"block{number}_{part}": f"{block}/{part}" for part in parts}
    return {
        name: f"{scope}/{place}"
        for layer, place in layers.items()
        for name in (layer, f"{layer}_bn")
    }


_RULES: dict[str, Callable[[keras.Model, str], Layers]] = {
    "efficientnet_b0": _efficientnet,
    "efficientnet_b0_depth": _efficientnet,
    "mnasnet_a1": _mnasnet,
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "resnet50": _resnet,
}
_WITH_EXPERTS = ("efficientnet_b0", "efficientnet_b0_depth")
_SLIM = ("mobilenet_v1", "mobilenet_v2")
