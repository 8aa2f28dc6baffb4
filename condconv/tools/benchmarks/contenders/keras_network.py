"""Networks of Keras as contenders: a compiled step of inference or of training.

Both are one compiled function of a fixed signature, on images that were made once. A training step
is forward, mean softmax cross-entropy, backward and SGD with momentum, and its loss is fetched.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from .worker import Made, Refusal, steps
from .workload import Workload

Tensor = Any
Step = Callable[[], object]

_SEED = 0
_BANDWIDTH_BYTES = 2**28  # of each of two arrays: far more than any cache holds


def network(create: str, arguments: Mapping[str, Any], workload: Mapping[str, Any]) -> Made:
    """Returns the rounds of a network.

    Args:
        create: "module:function" that makes it.
        arguments: of this function.
        workload: the fields of a ``Workload``.
    """
    work = Workload(**workload)
    return rounds(build(create, arguments, work.precision), work)


def application(name: str, workload: Mapping[str, Any]) -> Made:
    """Returns the rounds of a static network of ``keras.applications``, from pixels to logits."""
    size, classes = workload["image_size"], workload["num_classes"]
    arguments = {"weights": None, "input_shape": (size, size, 3), "classes": classes}
    arguments["classifier_activation"] = None
    return network(f"keras.applications:{name}", arguments, workload)


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


def build(create: str, arguments: Mapping[str, Any], precision: str) -> keras.Model:
    """Returns the network that "module:function" makes, always of the same weights."""
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(_SEED)
    module, function = create.split(":")
    factory = getattr(importlib.import_module(module), function)
    try:
        return factory(**arguments)
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from error


def rounds(model: keras.Model, work: Workload, costs: Mapping[str, Any] | None = None) -> Made:
    """Returns the rounds of a network, and what there is to say of it besides its ``costs``."""
    step = (training_step if work.mode == "train" else inference_step)(model, work)
    repeated = {"steps": steps(step, work.batch_size, work.seconds)}
    return Made(repeated, lambda: {**(costs or {}), **surroundings()})


def inference_step(model: keras.Model, work: Workload) -> Step:
    """Returns a function that computes the logits (B, classes) and fetches them."""
    if "folded" in work.form:
        from condconv import fold_batch_norm

        model = fold_batch_norm(model)
    if keras.backend.backend() == "jax":
        return _jax_inference(model, work)
    return _tensorflow_inference(model, work)


def training_step(model: keras.Model, work: Workload) -> Step:
    """Returns a function that makes one step of training and fetches the loss."""
    from condconv.engine import backends
    from condconv.engine.optimization import momentum

    optimizer = momentum(work.learning_rate, work.momentum)
    optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        return _jax_training(model, optimizer, work)
    backends.choose().prepare(optimizer)  # as the engine has it
    return _tensorflow_training(model, optimizer, work)


def loss_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Returns the mean softmax cross-entropy of logits (B, classes), at least in float32."""
    logits = keras.ops.cast(logits, "float32")  # keras.applications gives the policy's
    return keras.ops.mean(
        keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    )


def _specs(work: Workload) -> list[Any]:
    """Returns what a compiled step knows of images and labels."""
    import tensorflow as tf

    batch = None if work.dynamic_batch else work.batch_size
    images = tf.TensorSpec((batch, work.image_size, work.image_size, 3), tf.float32)
    return [images, tf.TensorSpec((batch,), tf.int32)]


def _tensorflow_inference(model: keras.Model, work: Workload) -> Step:
    import tensorflow as tf

    @tf.function(jit_compile=work.xla or None, input_signature=_specs(work)[:1])
    def infer(images: tf.Tensor) -> tf.Tensor:
        return model(images, training=False)

    run = _frozen(infer) if "frozen" in work.form else infer
    images = tf.constant(work.images(), tf.float32)
    return lambda: keras.tree.flatten(run(images))[0].numpy()


def _frozen(function: Any) -> Callable[[Tensor], Any]:
    """Returns a TensorFlow function whose variables have become constants."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    return convert_variables_to_constants_v2(function.get_concrete_function())


def _tensorflow_training(model: keras.Model, optimizer: Any, work: Workload) -> Step:
    import tensorflow as tf

    @tf.function(jit_compile=work.xla or None, input_signature=_specs(work))
    def train(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    images, labels = tf.constant(work.images(), tf.float32), tf.constant(work.labels())
    return lambda: train(images, labels).numpy()


def _jax_inference(model: keras.Model, work: Workload) -> Step:
    import jax

    trainable, others = _values(model.trainable_variables), _values(model.non_trainable_variables)

    @jax.jit
    def infer(trainable: Any, others: Any, images: Tensor) -> Tensor:
        return model.stateless_call(trainable, others, images, training=False)[0]

    images = jax.numpy.asarray(work.images(), "float32")
    return lambda: np.asarray(infer(trainable, others, images))


def _jax_training(model: keras.Model, optimizer: Any, work: Workload) -> Step:
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
    images = jax.numpy.asarray(work.images(), "float32")
    labels = jax.numpy.asarray(work.labels())

    def step() -> np.ndarray:
        nonlocal state
        value, state = compiled(state, images, labels)
        return np.asarray(value)

    return step


def _values(variables: Any) -> list[Any]:
    return [variable.value for variable in variables]


def _accelerator() -> Any:
    """Returns the accelerator that the backend computes on, or None."""
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device
    import tensorflow as tf

    return next(iter(tf.config.list_physical_devices("GPU")), None)


def surroundings() -> dict[str, Any]:
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
