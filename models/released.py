"""Where the weights of the authors' checkpoints belong in our networks.

The official files name variables as TensorFlow 1 did; the rules below give, for each variable of
one of our networks, the name it has there:

- tensorflow/tpu, models/official/efficientnet: EfficientNet-B0 and the CondConv networks;
- tensorflow/models, research/slim: MobileNetV1.
"""

import re
from collections.abc import Callable, Mapping

import keras
import numpy as np

Names = dict[str, str]

_WEIGHTS_OF_NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def tf1_names(model: keras.Model, scope: str) -> Names:
    """Returns the name in a TensorFlow 1 checkpoint for the path of each variable.

    Args:
        model: one of our networks.
        scope: the root of the names, such as "efficientnet-condconv-b0-4e" or "MobilenetV1".

    Raises:
        ValueError: if no checkpoint of such a network has been published.
    """
    if model.name not in _RULES:
        raise ValueError(
            f"no rule for the checkpoints of {model.name!r}; known are {', '.join(_RULES)}"
        )
    return _RULES[model.name](model, scope)


def assign(model: keras.Model, values: Mapping[str, np.ndarray], names: Names) -> None:
    """Gives each variable of ``model`` its value, or changes nothing.

    Args:
        model: one of our networks.
        values: the variables of a checkpoint by name. Experts may be stored flattened, and a
            dense kernel as a 1×1 convolution.
        names: by path of our variables.

    Raises:
        ValueError: if values are missing, left over or of another size; all of them are named.
    """
    variables = {variable.path: variable for variable in _saved(model)}
    problems = [f"missing: {name}" for name in sorted(set(names.values()) - set(values))]
    problems += [f"left over: {name}" for name in sorted(set(values) - set(names.values()))]
    problems += [f"no name for: {path}" for path in sorted(set(variables) - set(names))]
    for path, name in names.items():
        if name in values and values[name].size != int(np.prod(variables[path].shape)):
            problems.append(
                f"misshapen: {name} has {values[name].shape}, {path} {tuple(variables[path].shape)}"
            )
    if problems:
        raise ValueError(f"the checkpoint does not fit {model.name}:\n  " + "\n  ".join(problems))
    for path, name in names.items():
        variables[path].assign(values[name].reshape(variables[path].shape))


def _saved(model: keras.Model) -> list[keras.Variable]:
    return [v for v in model.variables if not v.path.endswith("seed_generator_state")]


def _efficientnet(model: keras.Model, scope: str) -> Names:
    layers = {layer.name for layer in model.layers}
    parts = {
        "stem_conv": f"{scope}/stem/conv2d",
        "stem_conv_bn": f"{scope}/stem/tpu_batch_normalization",
        "head_conv": f"{scope}/head/conv2d",
        "head_conv_bn": f"{scope}/head/tpu_batch_normalization",
        "classifier": f"{scope}/head/dense",
    }
    numbers = sorted({int(m[1]) for name in layers if (m := re.match(r"block(\d+)_", name))})
    conditional = [n for n in numbers if f"block{n}_routing" in layers]
    for number in numbers:
        block, ours = f"{scope}/blocks_{number - 1}", f"block{number}"
        convs = [part for part in ("expand", "depthwise", "project") if f"{ours}_{part}" in layers]
        for index, part in enumerate(convs):
            parts[f"{ours}_{part}_bn"] = f"{block}/{_numbered('tpu_batch_normalization', index)}"
        parts[f"{ours}_se_reduce"] = f"{block}/se/conv2d"
        parts[f"{ours}_se_expand"] = f"{block}/se/conv2d_1"
        if number not in conditional:
            parts[f"{ours}_depthwise"] = f"{block}/depthwise_conv2d"
            pointwise = [part for part in convs if part != "depthwise"]
            for index, part in enumerate(pointwise):
                parts[f"{ours}_{part}"] = f"{block}/{_numbered('conv2d', index)}"
            continue
        # Layers of Keras, unlike those of tf.layers, count through the whole graph; the first of
        # three conditional convolutions of a block is made but never used.
        rank, block = conditional.index(number), f"{scope}/model/blocks_{number - 1}"
        parts[f"{ours}_routing"] = f"{scope}/blocks_{number - 1}/dense"
        parts[f"{ours}_expand"] = f"{block}/cond_conv2d_{3 * rank + 1}"
        parts[f"{ours}_depthwise"] = f"{block}/{_numbered('depthwise_cond_conv2d', rank)}"
        parts[f"{ours}_project"] = f"{block}/cond_conv2d_{3 * rank + 2}"
    return {
        variable.path: f"{parts[layer]}/{_efficientnet_weight(parts[layer], weight)}"
        for variable in _saved(model)
        for layer, weight in [variable.path.rsplit("/", 1)]
    }


def _efficientnet_weight(layer: str, weight: str) -> str:
    kind = layer.rsplit("/", 1)[1]
    if weight != "kernel":
        return weight
    prefix = "depthwise_" if kind.startswith("depthwise") else ""
    return f"{prefix}condconv_kernel" if "cond_conv2d" in kind else f"{prefix}kernel"


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _mobilenet_v1(model: keras.Model, scope: str) -> Names:
    names = {}
    for variable in _saved(model):
        layer, weight = variable.path.rsplit("/", 1)
        layer = layer.removesuffix("_bn")
        if layer == "classifier":
            names[variable.path] = (
                f"{scope}/Logits/Conv2d_1c_1x1/{'weights' if weight == 'kernel' else 'biases'}"
            )
            continue
        block, part = layer.split("_")
        slim = "Conv2d_0" if block == "stem" else f"Conv2d_{block.removeprefix('block')}_{part}"
        if weight in _WEIGHTS_OF_NORM:
            weight = f"BatchNorm/{weight}"
        else:
            weight = "depthwise_weights" if part == "depthwise" else "weights"
        names[variable.path] = f"{scope}/{slim}/{weight}"
    return names


_RULES: dict[str, Callable[[keras.Model, str], Names]] = {
    "efficientnet_b0": _efficientnet,
    "efficientnet_b0_depth": _efficientnet,
    "mobilenet_v1": _mobilenet_v1,
}
