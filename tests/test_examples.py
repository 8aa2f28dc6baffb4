"""The examples run, and do what they say."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from condconv.tools.exports.runtimes import open_network

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_a_network_of_ones_own_trains_saves_loads_and_exports(tmp_path):
    pytest.importorskip("tf2onnx")
    done = subprocess.run(
        [sys.executable, DOCS / "own_network.py", "--output=own", "--onnx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"(\w+): accuracy ([\d.]+), loaded it differs by (\S+)", done.stdout)
    assert [name for name, *_ in lines] == ["functional", "subclassed"]
    for name, accuracy, difference in lines:
        assert float(accuracy) > 0.9, name
        assert float(difference) < 1e-5, name
        assert (tmp_path / "own" / f"{name}_saved_model" / "saved_model.pb").exists()
    images = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    ours = open_network(str(tmp_path / "own" / "functional.keras"))(images)
    found = open_network(str(tmp_path / "own" / "functional.onnx"))(images)
    np.testing.assert_allclose(found, ours, atol=1e-4 * np.max(np.abs(ours)))
