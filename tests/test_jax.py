"""Tests of the layers, on JAX where there is no TensorFlow."""

import pathlib

import keras
import pytest
from on_jax import passed_on_jax

LAYERS = sorted(path.name for path in pathlib.Path(__file__).parent.glob("test_layers_*.py"))

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="the whole run is on JAX already"
)


@pytest.mark.parametrize(
    ("files", "marked", "least"),
    [
        pytest.param(LAYERS, "not slow", 150, id="layers"),
        pytest.param(LAYERS, "slow", 250, marks=pytest.mark.slow, id="layers, whole matrix"),
        pytest.param(
            ["test_normalization.py", "test_stochastic.py"],
            "slow or not slow",
            90,
            marks=pytest.mark.slow,
            id="normalization and dropout",
        ),
        pytest.param(
            ["test_folding.py", "test_folding_graphs.py"],
            "not slow",
            50,
            marks=pytest.mark.slow,
            id="folding",
        ),
    ],
)
def test_they_pass_on_jax_without_tensorflow(files: list[str], marked: str, least: int):
    pytest.importorskip("jax")
    assert passed_on_jax(files, "-m", marked, timeout=1200) > least
