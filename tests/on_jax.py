"""Test files on JAX, in a process of their own that has no TensorFlow."""

import os
import pathlib
import re
import subprocess
import sys

_FOLDER = pathlib.Path(__file__).resolve().parent
# Python refuses to import a module whose place in sys.modules holds None.
_WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
import pytest
status = pytest.main(sys.argv[1:])
import keras
print("ran on", keras.backend.backend())
sys.exit(status)
"""
# The time goes into LLVM's optimisations of some hundred small programs, not into running them.
HASTY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def passed_on_jax(files: list[str], *options: str, timeout: float) -> int:
    """Runs test files on JAX in a process of their own, and returns how many tests passed."""
    files = [str(_FOLDER / file) for file in files]
    run = subprocess.run(
        # Without conftest.py, which is for the tests that know they are on TensorFlow.
        [sys.executable, "-c", _WITHOUT_TENSORFLOW, *files, *options]
        + ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=-q"],
        cwd=_FOLDER.parent,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "PYTEST_ADDOPTS": "",
            "XLA_FLAGS": HASTY,
            "PYTHONPATH": os.pathsep.join([str(_FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stdout[-20_000:]
    assert "ran on jax" in run.stdout
    summary = re.search(r"^(\d+) passed.* in [\d.]+s", run.stdout, re.MULTILINE)
    assert summary is not None, run.stdout[-2_000:]
    return int(summary[1])
