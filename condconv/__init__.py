"""Conditionally parameterised convolutions for Keras (Yang et al., NeurIPS 2019, arXiv:1904.04971).

Importing this package imports neither Keras nor a backend: a command that lives in it answers
``--help`` at once. The names below are loaded on first use, and the layers are registered with
Keras as soon as anybody imports Keras, so that it can always load a file that holds them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from condconv.cost import Cost, count_cost
    from condconv.folding import fold_batch_norm
    from condconv.layers import CondConv2D, CondDense, DepthwiseCondConv2D, Routing

__version__ = "0.1.0"

__all__ = [
    "CondConv2D",
    "CondDense",
    "Cost",
    "DepthwiseCondConv2D",
    "Routing",
    "count_cost",
    "fold_batch_norm",
]

_HOMES = {
    "CondConv2D": "condconv.layers",
    "CondDense": "condconv.layers",
    "Cost": "condconv.cost",
    "DepthwiseCondConv2D": "condconv.layers",
    "Routing": "condconv.layers",
    "count_cost": "condconv.cost",
    "fold_batch_norm": "condconv.folding",
}
_WITH_LAYERS = (
    "condconv.activation",
    "condconv.depthwise",
    "condconv.layers",
    "condconv.normalization",
    "condconv.stochastic",
)


def _register_layers() -> None:
    for name in _WITH_LAYERS:
        importlib.import_module(name)


class _AfterKeras(importlib.abc.MetaPathFinder):
    """Registers the layers right after the first import of Keras."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds Keras as everybody else would, and has its loader register our layers."""
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # who asks need not load it; another will
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: types.ModuleType) -> None:
                sys.meta_path.remove(self)
                load(module)
                _register_layers()

            spec.loader.exec_module = load_and_register
        return spec


if "keras" in sys.modules:
    _register_layers()
else:
    sys.meta_path.insert(0, _AfterKeras())


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'condconv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
