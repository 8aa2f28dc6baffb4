"""The authors' networks in plain TensorFlow operations, with the names of their variables.

Written from the description of the TensorFlow 1 graphs, and sharing nothing with ``models``. Names
come about as they did there: layers of tf.layers and slim are counted in their variable scope,
layers of Keras through the whole graph, in the order in which they are made. A pass makes the
variables: random ones in float32, with batch-norm statistics near those of what comes in. It
computes in float64: in float32 the order of sums alone, which differs from processor to processor,
is worth up to 2e-4 of the largest logit.
"""

import collections
import math
import re

import numpy as np
import tensorflow as tf

EFFICIENTNET = """
r1_k3_s1_e1_i32_o16_se r2_k3_s2_e6_i16_o24_se r2_k5_s2_e6_i24_o40_se r3_k3_s2_e6_i40_o80_se
r3_k5_s1_e6_i80_o112_se_cc r4_k5_s2_e6_i112_o192_se_cc r1_k3_s1_e6_i192_o320_se_cc
"""
MNASNET_A1 = """
r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r3_k5_s2_e3_i24_o40_se r4_k3_s2_e6_i40_o80
r2_k3_s1_e6_i80_o112_se r3_k5_s2_e6_i112_o160_se r1_k3_s1_e6_i160_o320
"""
MOBILENET_V2 = """
r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r3_k3_s2_e6_i24_o32 r4_k3_s2_e6_i32_o64
r3_k3_s1_e6_i64_o96 r3_k3_s2_e6_i96_o160 r1_k3_s1_e6_i160_o320
"""
MOBILENET_V1 = [
    *((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512)),
    *([(1, 512)] * 5),
    *((2, 1024), (1, 1024)),
]
IMAGENET = (np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375]))
CONDCONV = (127.0, 128.0)
INCEPTION = (127.5, 127.5)

Block = collections.namedtuple("Block", "kernel stride expansion inputs outputs se cc")


def blocks(text: str, depth: float = 1.0) -> list[Block]:
    found = []
    for stage in text.split():
        number = {k: int(v) for k, v in re.findall(r"([rkseio])(\d+)", stage)}
        first = Block(*(number[key] for key in "kseio"), "_se" in stage, stage.endswith("_cc"))
        again = first._replace(stride=1, inputs=first.outputs)
        found += [first] + [again] * (math.ceil(depth * number["r"]) - 1)
    return found


class Graph:
    """Variables by name, made when they are first asked for."""

    def __init__(self, seed: int):
        self.variables: dict[str, np.ndarray] = {}
        self._draw = np.random.default_rng(seed)
        self._counts: collections.Counter = collections.Counter()

    def count(self, name: str, scope: str = "") -> str:
        """Returns a layer's name: the n-th of its kind in a scope, or in the whole graph."""
        number = self._counts[scope, name]
        self._counts[scope, name] += 1
        return f"{name}_{number}" if number else name

    def normal(self, name: str, shape: tuple, deviation: float, mean: float = 0.0) -> tf.Tensor:
        value = mean + deviation * self._draw.standard_normal(shape)
        self.variables[name] = value.astype(np.float32)
        return tf.constant(self.variables[name], tf.float64)

    def conv(self, x, name, kernel, filters, stride=1, padding="SAME", bias=None):
        fan_in = kernel * kernel * x.shape[-1]
        shape = (kernel, kernel, x.shape[-1], filters)
        x = tf.nn.conv2d(x, self.normal(name, shape, fan_in**-0.5), stride, padding)
        return x if bias is None else x + self.normal(bias, (filters,), 0.1)

    def depthwise(self, x, name, kernel, stride):
        weights = self.normal(name, (kernel, kernel, x.shape[-1], 1), 1 / kernel)
        return tf.nn.depthwise_conv2d(x, weights, (1, stride, stride, 1), "SAME")

    def norm(self, x, name, epsilon):
        mean, variance = (np.asarray(m) for m in tf.nn.moments(x, (0, 1, 2)))
        shape = mean.shape
        mean = mean + 0.1 * np.sqrt(variance) * self._draw.standard_normal(shape)
        variance = variance * self._draw.uniform(0.75, 1.25, shape) + 1e-3
        self.variables[f"{name}/moving_mean"] = mean.astype(np.float32)
        self.variables[f"{name}/moving_variance"] = variance.astype(np.float32)
        gamma = self.normal(f"{name}/gamma", shape, 0.1, 1.0)
        beta = self.normal(f"{name}/beta", shape, 0.1)
        stored = (self.variables[f"{name}/moving_{each}"] for each in ("mean", "variance"))
        statistics = (tf.constant(value, tf.float64) for value in stored)
        return tf.nn.batch_normalization(x, *statistics, beta, gamma, epsilon)

    def dense(self, x, name, units, deviation=0.05):
        weights = self.normal(f"{name}/kernel", (x.shape[-1], units), deviation)
        return x @ weights + self.normal(f"{name}/bias", (units,), 0.1)

    def experts(self, name, routing, kernel, inputs, outputs, fan_in):
        shape = (routing.shape[-1], kernel * kernel * inputs * outputs)
        mixed = routing @ self.normal(name, shape, fan_in**-0.5)
        return tf.reshape(mixed, (-1, kernel, kernel, inputs, outputs))

    def se(self, x, scope, reduced, act, names):
        y, channels = tf.reduce_mean(x, (1, 2), keepdims=True), x.shape[-1]
        one, two = (f"{scope}/{name}" for name in names)
        y = act(self.conv(y, f"{one}/kernel", 1, reduced, bias=f"{one}/bias"))
        return x * tf.sigmoid(self.conv(y, f"{two}/kernel", 1, channels, bias=f"{two}/bias"))


def pooled(x):
    return tf.reduce_mean(x, (1, 2))


def one_by_one(convolve, x, kernels):
    return tf.concat([convolve(e[None], k) for e, k in zip(x, kernels, strict=True)], 0)


def efficientnet(graph, x, name, experts, depth):
    """Variable scopes of tf.layers, but for the CondConv layers, which are Keras'."""
    act = tf.nn.silu

    def norm(x, scope):
        layer = graph.count("tpu_batch_normalization", scope)
        return graph.norm(x, f"{name}/{scope}/{layer}", 1e-3)

    x = act(norm(graph.conv(x, f"{name}/stem/conv2d/kernel", 3, 32, 2), "stem"))
    for index, block in enumerate(blocks(EFFICIENTNET, depth)):
        scope, mid = f"blocks_{index}", block.inputs * block.expansion
        y = x
        if block.cc:
            routing = tf.sigmoid(graph.dense(pooled(x), f"{name}/{scope}/dense", experts, 0.1))
            graph.count("cond_conv2d")  # made for a fused block, never called
            names = [graph.count("cond_conv2d") for _ in range(2)]
            deep = graph.count("depthwise_cond_conv2d")
            expand, project = (f"{name}/model/{scope}/{n}/condconv_kernel" for n in names)
            deep = f"{name}/model/{scope}/{deep}/depthwise_condconv_kernel"

        def pointwise(x, filters, which, routing=block.cc and routing, scope=scope):
            if which:
                kernels = graph.experts(which, routing, 1, x.shape[-1], filters, x.shape[-1])
                return one_by_one(lambda e, k: tf.nn.conv2d(e, k, 1, "SAME"), x, kernels)
            layer = graph.count("conv2d", scope)
            return graph.conv(x, f"{name}/{scope}/{layer}/kernel", 1, filters)

        if block.expansion != 1:
            y = act(norm(pointwise(y, mid, block.cc and expand), scope))
        if block.cc:
            kernels = graph.experts(deep, routing, block.kernel, mid, 1, block.kernel**2)
            strides = (1, block.stride, block.stride, 1)

            def deepwise(e, k, strides=strides):
                return tf.nn.depthwise_conv2d(e, k, strides, "SAME")

            y = one_by_one(deepwise, y, kernels)
        else:
            layer = graph.count("depthwise_conv2d", scope)
            kernel = f"{name}/{scope}/{layer}/depthwise_kernel"
            y = graph.depthwise(y, kernel, block.kernel, block.stride)
        y = act(norm(y, scope))
        y = graph.se(y, f"{name}/{scope}/se", block.inputs // 4, act, ("conv2d", "conv2d_1"))
        y = norm(pointwise(y, block.outputs, block.cc and project), scope)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
    x = act(norm(graph.conv(x, f"{name}/head/conv2d/kernel", 1, 1280), "head"))
    return graph.dense(pooled(x), f"{name}/head/dense", 1000)


def mnasnet_a1(graph, x, name):
    """Convolutions of Keras, made block by block, then stem and head; norms of tf.layers."""
    act, keras_scope = tf.nn.relu, f"{name}/mnas_net_model"
    made = []
    for block in blocks(MNASNET_A1):
        parts = ["expand"] * (block.expansion != 1) + ["reduce", "gate"] * block.se + ["project"]
        names = {part: graph.count("conv2d") for part in parts}
        made.append((block, names | {"depthwise": graph.count("depthwise_conv2d")}))
    stem, head = graph.count("conv2d"), graph.count("conv2d")

    def norm(x, scope):
        layer = graph.count("batch_normalization", scope)
        return graph.norm(x, f"{name}/{scope}/{layer}", 1e-3)

    x = act(norm(graph.conv(x, f"{keras_scope}/mnas_stem/{stem}/kernel", 3, 32, 2), "mnas_stem"))
    for index, (block, names) in enumerate(made):
        scope, mid, y = f"mnas_blocks_{index}", block.inputs * block.expansion, x
        at = f"{keras_scope}/{scope}"
        if block.expansion != 1:
            y = act(norm(graph.conv(y, f"{at}/{names['expand']}/kernel", 1, mid), scope))
        kernel = f"{at}/{names['depthwise']}/depthwise_kernel"
        y = act(norm(graph.depthwise(y, kernel, block.kernel, block.stride), scope))
        if block.se:
            squeezed = (names["reduce"], names["gate"])
            y = graph.se(y, f"{at}/se", block.inputs // 4, act, squeezed)
        y = norm(graph.conv(y, f"{at}/{names['project']}/kernel", 1, block.outputs), scope)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
    x = act(norm(graph.conv(x, f"{keras_scope}/mnas_head/{head}/kernel", 1, 1280), "mnas_head"))
    return graph.dense(pooled(x), f"{keras_scope}/mnas_head/dense", 1000)


def resnet50(graph, x):
    """Everything at the root; strided convolutions are padded evenly, the pooling is not."""

    def conv(x, kernel, filters, stride=1):
        padding = "SAME"
        if stride > 1:
            before, padding = (kernel - 1) // 2, "VALID"
            x = tf.pad(x, [(0, 0), *[(before, kernel - 1 - before)] * 2, (0, 0)])
        x = graph.conv(x, f"{graph.count('conv2d')}/kernel", kernel, filters, stride, padding)
        return graph.norm(x, graph.count("batch_normalization"), 1e-5)

    x = tf.nn.relu(conv(x, 7, 64, 2))
    x = tf.nn.max_pool2d(x, 3, 2, "SAME")
    for stage, (filters, repeats) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for repeat in range(repeats):
            stride = 2 if stage and not repeat else 1
            shortcut = x if repeat else conv(x, 1, 4 * filters, stride)
            y = tf.nn.relu(conv(x, 1, filters))
            y = tf.nn.relu(conv(y, 3, filters, stride))
            x = tf.nn.relu(conv(y, 1, 4 * filters) + shortcut)
    return graph.dense(pooled(x), "dense", 1000)


def slim(graph, name):
    """Returns a slim convolution, norm and ReLU6, by the name of its scope."""

    def conv(x, scope, kernel, filters=None, stride=1, act=tf.nn.relu6):
        if filters is None:
            x = graph.depthwise(x, f"{name}/{scope}/depthwise_weights", kernel, stride)
        else:
            x = graph.conv(x, f"{name}/{scope}/weights", kernel, filters, stride)
        return act(graph.norm(x, f"{name}/{scope}/BatchNorm", 1e-3))

    return conv


def slim_logits(graph, x, name):
    scope = f"{name}/Logits/Conv2d_1c_1x1"
    x = tf.reduce_mean(x, (1, 2), keepdims=True)
    return graph.conv(x, f"{scope}/weights", 1, 1001, bias=f"{scope}/biases")[:, 0, 0]


def mobilenet_v1(graph, x, width):
    conv, name = slim(graph, "MobilenetV1"), "MobilenetV1"
    x = conv(x, "Conv2d_0", 3, max(int(32 * width), 8), 2)
    for index, (stride, filters) in enumerate(MOBILENET_V1, 1):
        x = conv(x, f"Conv2d_{index}_depthwise", 3, None, stride)
        x = conv(x, f"Conv2d_{index}_pointwise", 1, max(int(filters * width), 8))
    return slim_logits(graph, x, name)


def mobilenet_v2(graph, x):
    conv, name = slim(graph, "MobilenetV2"), "MobilenetV2"
    x = conv(x, "Conv", 3, 32, 2)
    for block in blocks(MOBILENET_V2):
        scope, y = graph.count("expanded_conv"), x
        if block.expansion != 1:
            y = conv(y, f"{scope}/expand", 1, block.inputs * block.expansion)
        y = conv(y, f"{scope}/depthwise", 3, None, block.stride)
        y = conv(y, f"{scope}/project", 1, block.outputs, act=tf.identity)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
    return slim_logits(graph, conv(x, "Conv_1", 1, 1280), name)


def run(build, pixels, normalization, *arguments):
    """Returns the variables that a network was made with, and its logits for pixels."""
    graph, (mean, deviation) = Graph(seed=0), normalization
    x = tf.constant((pixels - mean) / deviation, tf.float64)
    logits = np.asarray(build(graph, x, *arguments))
    return graph.variables, logits
