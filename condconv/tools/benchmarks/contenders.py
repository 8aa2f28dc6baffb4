"""What a benchmark of networks measures in Keras: a step of inference or of training.

Both are one compiled function of a fixed signature, on images that were made once. A training step
is forward, mean softmax cross-entropy, backward and SGD with momentum, and its loss is fetched.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from condconv import CondConv2D, CondDense, DepthwiseCondConv2D, count_cost
from condconv.engine.errors import UsageError
from condconv.stochastic import Dropout, StochasticDepth
from condconv.tools.benchmarks.comparison import Task
from condconv.tools.benchmarks.worker import Made, steps

Tensor = Any
Step = Callable[[], object]

_SEED = 0
_BANDWIDTH_BYTES = 2**28  # of each of two arrays: far more than any cache holds


def network(
    create: str,
    arguments: Mapping[str, Any],
    task: Mapping[str, Any],
    replaced: str | None = None,
    costs: bool = True,
) -> Made:
    """Returns the rounds of a network, without our dropout and stochastic depth.

    Args:
        create: "module:function" that makes it.
        arguments: of this function.
        task: the fields of a ``Task``.
        replaced: "module:function" that gives classes, names of their methods and other methods,
            to be used in this process.
        costs: whether its facts hold what it costs.
    """
    todo = Task(**task)
    keras.config.set_dtype_policy(todo.precision)
    keras.utils.set_random_seed(_SEED)
    factory = _function(create)  # which loads the layers that methods are replaced of
    for kind, name, method in _function(replaced)() if replaced else ():
        setattr(kind, name, method)
    model = _made(factory, arguments)
    _turn_off_noise(model)
    step = training_step(model, todo) if todo.mode == "train" else inference_step(model, todo)
    rounds = {"steps": steps(step, todo.batch_size, todo.seconds)}
    return Made(rounds, lambda: (_costs(model) if costs else {}) | _surroundings())


def _function(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _made(factory: Callable[..., keras.Model], arguments: Mapping[str, Any]) -> keras.Model:
    try:
        return factory(**arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).split("\n")[0]) from error


def _turn_off_noise(model: keras.Model) -> None:
    for layer in model.layers:
        if isinstance(layer, Dropout):
            layer.rate = 0.0
        elif isinstance(layer, StochasticDepth):
            layer.survival = 1


def inference_step(model: keras.Model, task: Task) -> Step:
    """Returns a function that computes the logits (B, classes) and fetches them."""
    if "folded" in task.form:
        from condconv import fold_batch_norm

        model = fold_batch_norm(model)
    if keras.backend.backend() == "jax":
        return _jax_inference(model, task)
    return _tensorflow_inference(model, task)


def training_step(model: keras.Model, task: Task) -> Step:
    """Returns a function that makes one step of training and fetches the loss."""
    if keras.backend.backend() == "jax":
        optimizer = keras.optimizers.SGD(task.learning_rate, momentum=task.momentum)
        optimizer.build(model.trainable_variables)
        return _jax_training(model, optimizer, task)
    from condconv.engine.optimization import momentum  # that of train.py

    optimizer = momentum(task.learning_rate, task.momentum)
    optimizer.build(model.trainable_variables)
    return _tensorflow_training(model, optimizer, task)


def loss_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Returns the mean softmax cross-entropy of logits (B, classes), at least in float32."""
    logits = keras.ops.cast(logits, "float32")  # keras.applications gives the policy's
    return keras.ops.mean(
        keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    )


def images_of(task: Task) -> np.ndarray:
    """Returns pixels (B, H, W, 3) of 0–255, float32, the same for every contender."""
    shape = (task.batch_size, task.image_size, task.image_size, 3)
    return np.random.default_rng(_SEED).integers(0, 256, shape).astype("float32")


def labels_of(task: Task) -> np.ndarray:
    """Returns classes (B,) int32, the same for every contender."""
    draw = np.random.default_rng(_SEED + 1)
    return draw.integers(0, task.num_classes, task.batch_size).astype("int32")


def _specs(task: Task) -> list[Any]:
    """Returns what a compiled step knows of images and labels."""
    import tensorflow as tf

    batch = None if task.dynamic_batch else task.batch_size
    images = tf.TensorSpec((batch, task.image_size, task.image_size, 3), tf.float32)
    return [images, tf.TensorSpec((batch,), tf.int32)]


def _tensorflow_inference(model: keras.Model, task: Task) -> Step:
    import tensorflow as tf

    @tf.function(jit_compile=task.xla or None, input_signature=_specs(task)[:1])
    def infer(images: tf.Tensor) -> tf.Tensor:
        return model(images, training=False)

    run = _frozen(infer) if "frozen" in task.form else infer
    images = tf.constant(images_of(task))
    return lambda: keras.tree.flatten(run(images))[0].numpy()


def _frozen(function: Any) -> Callable[[Tensor], Any]:
    """Returns a TensorFlow function whose variables have become constants."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    return convert_variables_to_constants_v2(function.get_concrete_function())


def _tensorflow_training(model: keras.Model, optimizer: Any, task: Task) -> Step:
    import tensorflow as tf

    @tf.function(jit_compile=task.xla or None, input_signature=_specs(task))
    def train(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    images, labels = tf.constant(images_of(task)), tf.constant(labels_of(task))
    return lambda: train(images, labels).numpy()


def _jax_inference(model: keras.Model, task: Task) -> Step:
    import jax

    trainable, others = _values(model.trainable_variables), _values(model.non_trainable_variables)

    @jax.jit
    def infer(trainable: Any, others: Any, images: Tensor) -> Tensor:
        return model.stateless_call(trainable, others, images, training=False)[0]

    images = jax.numpy.asarray(images_of(task))
    return lambda: np.asarray(infer(trainable, others, images))


def _jax_training(model: keras.Model, optimizer: Any, task: Task) -> Step:
    import jax

    def loss(trainable: Any, others: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        logits, others = model.stateless_call(trainable, others, images, training=True)
        return loss_of(labels, logits), others

    def train(state: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        trainable, others, slots = state
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, others), gradients = gradient(trainable, others, images, labels)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return value, (trainable, others, slots)

    compiled = jax.jit(train, donate_argnums=0)
    parts = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = tuple(_values(part) for part in parts)
    images, labels = jax.numpy.asarray(images_of(task)), jax.numpy.asarray(labels_of(task))

    def step() -> np.ndarray:
        nonlocal state
        value, state = compiled(state, images, labels)
        return np.asarray(value)

    return step


def _values(variables: Any) -> list[Any]:
    return [variable.value for variable in variables]


def application(name: str, num_classes: int, image_size: int) -> keras.Model:
    """Returns a static network of ``keras.applications``, from pixels to logits."""
    shape = (image_size, image_size, 3)
    return getattr(keras.applications, name)(
        weights=None, input_shape=shape, classes=num_classes, classifier_activation=None
    )


def bandwidth(seconds: float) -> Made:
    """Returns rounds that read memory far larger than any cache, and count its bytes.

    On a CPU by BLAS, the dot product of two arrays; on an accelerator by summing an array there.
    """
    count = _BANDWIDTH_BYTES // 4
    if _accelerator() is None:
        a, b = np.ones(count, "float32"), np.ones(count, "float32")
        return Made({"bytes": steps(lambda: np.dot(a, b), 2 * _BANDWIDTH_BYTES, seconds)})
    array = keras.ops.ones(count, "float32")
    step = steps(lambda: float(keras.ops.sum(array)), _BANDWIDTH_BYTES, seconds)
    return Made({"bytes": step})


def _costs(model: keras.Model) -> dict[str, int]:
    """Returns what a network of ours costs.

    Of a conditional network also the weights of one expert over all layers, and of those the ones
    whose mixtures are written for each example: a dense layer mixes what comes out of it.
    """
    kinds = (CondConv2D, DepthwiseCondConv2D, CondDense)
    layers = [layer for layer in model.layers if isinstance(layer, kinds)]
    mixed = [layer for layer in layers if not isinstance(layer, CondDense)]
    return {
        "parameters": model.count_params(),
        "multiply_adds": count_cost(model).multiply_adds,
        "num_experts": max((layer.num_experts for layer in layers), default=0),
        "expert_weights": sum(map(_expert_weights, layers)),
        "mixed_weights": sum(map(_expert_weights, mixed)),
    }


def _expert_weights(layer: Any) -> int:
    weights = [weight for weight in (layer.kernel, layer.bias) if weight is not None]
    return sum(math.prod(weight.shape[1:]) for weight in weights)


def _accelerator() -> Any:
    """Returns the accelerator that the backend computes on, or None."""
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device
    import tensorflow as tf

    return next(iter(tf.config.list_physical_devices("GPU")), None)


def _surroundings() -> dict[str, Any]:
    """Returns versions and, of an accelerator, its name and the most memory held there."""
    device, backend = _accelerator(), keras.backend.backend()
    library = importlib.import_module(backend)
    facts = {"keras": keras.__version__, backend: library.__version__}
    if device is None:
        return facts
    if backend == "jax":
        name, peak = device.device_kind, (device.memory_stats() or {}).get("peak_bytes_in_use")
    else:
        name = library.config.experimental.get_device_details(device).get("device_name", "GPU")
        peak = library.config.experimental.get_memory_info("GPU:0")["peak"]
    return facts | {"device": name, "device_peak_bytes": peak}
