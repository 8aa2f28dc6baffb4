"""What runs the computation: which device, and whether XLA compiles it."""

import keras


def in_xla() -> bool:
    """Whether what is being traced now will be compiled by XLA as a whole."""
    if keras.backend.backend() == "jax":
        return True
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.ops import control_flow_util
    except ImportError:  # not a public module: without it the uncompiled forms are right, if slow
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def has_accelerator() -> bool:
    """Whether the backend sees a GPU or a TPU; taken for granted of backends other than ours."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    # Of physical devices: asking for logical ones would set up TensorFlow as it stands.
    return any(tf.config.list_physical_devices(kind) for kind in ("GPU", "TPU"))
