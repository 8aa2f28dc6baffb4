"""What `pip install condconv` brings: a saved network loads with the wheel and a Keras, no more."""

import email
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest
from on_jax import HASTY
from packaging.requirements import Requirement

import condconv
from models import create_model

ROOT = pathlib.Path(__file__).parents[1]
PREDICT = """
import importlib.util, pathlib, sys
import numpy as np
import condconv, keras
assert pathlib.Path(condconv.__file__).is_relative_to(sys.prefix), condconv.__file__
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[2], model.predict(np.load(sys.argv[3]), verbose=0))
print(*(n for n in sys.argv[4:] if importlib.util.find_spec(n)), keras.backend.backend())
"""
ABSENT = (
    "condconv.engine",
    "condconv.tools",
    "data",
    "models",
    "scripts",
    "gin",
    "tensorflow_datasets",
    "sklearn",
    "etils",
    "onnx",
    "pytest",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, so that nothing is left behind in the checkout."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in ("condconv", "data", "models", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-build-isolation", "--no-index", "--wheel-dir", built, copy)
    (found,) = built.iterdir()
    return found


def pip(*arguments: object, python: object = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps", "--quiet"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def needed_by(*names: str) -> set[str]:
    """Returns these distributions and all that they require, without extras."""
    found, todo = set(), [*names]
    while todo:
        if (name := todo.pop().lower().replace("_", "-")) in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def link(name: str, site: pathlib.Path) -> None:
    """Makes an installed distribution importable from another site-packages."""
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files} - {".."}:
        if not (site / top).exists():
            (site / top).symlink_to(distribution.locate_file(top))


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {pathlib.PurePath(name) for name in archive.namelist()}
        (metadata,) = (name for name in names if name.name == "METADATA")
        said = email.message_from_bytes(archive.read(str(metadata)))
    modules = {path.relative_to(ROOT) for path in (ROOT / "condconv").glob("*.py")}
    assert {name for name in names if name.parent != metadata.parent} == {
        *modules,
        metadata.parent / "licenses" / "LICENSE",
    }
    needed = [line for line in said.get_all("Requires-Dist") if "extra ==" not in line]
    assert [Requirement(line).name for line in needed] == ["keras"]
    assert {*said.get_all("Provides-Extra")} >= {"train", "tpu", "cuda", "jax", "export", "dev"}
    assert said["Version"] == condconv.__version__


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_saved_network_loads_with_the_wheel_and_keras_alone(backend, wheel, tmp_path):
    pytest.importorskip(backend)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    before = {*site.iterdir()}
    pip("install", "--no-index", wheel, python=python)
    brought = {path.name for path in {*site.iterdir()} - before}
    assert brought == {"condconv", f"condconv-{condconv.__version__}.dist-info"}
    assert not [
        path
        for path in (site / "condconv").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]
    for name in needed_by("keras", backend):
        link(name, site)
    model = create_model("mnasnet_a1", num_experts=3, width=0.3, image_size=32, num_classes=7)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    absent = (*ABSENT, *({"tensorflow", "jax"} - {backend}))
    done = subprocess.run(
        [python, "-I", "-c", PREDICT, "model.keras", "logits.npy", "images.npy", *absent],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "KERAS_BACKEND": backend, "XLA_FLAGS": HASTY},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == backend, done.stderr  # and none of those that are absent
    expected = np.asarray(model(images, training=False))
    found = np.load(tmp_path / "logits.npy")
    assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected))
