"""State of layers, carried over to their copies."""

from typing import Any

import keras
from keras import ops


def copy_state(old: keras.Layer, new: keras.Layer) -> None:
    """Gives ``new``, a copy of ``old``, its weights, as saving and loading would.

    Some layers derive more from their weights. On JAX two variables must not share an array: a
    compiled function may take the one of a model for its own use, and the other's is gone.
    """
    for part, copied in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
        store: dict[str, Any] = {}
        part.save_own_variables(store)
        copied.load_own_variables({name: ops.convert_to_numpy(v) for name, v in store.items()})
