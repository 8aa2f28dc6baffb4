"""Files of strangers: what is damaged or means harm ends in one line, and does nothing else."""

import functools
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings
import zipfile
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from condconv.engine.errors import RunError
from condconv.tools import network_file
from condconv.tools.exports import runtimes, trained_network

ROOT = pathlib.Path(__file__).parents[1]
MARK = "harm-was-done"


@functools.cache
def whole() -> dict[str, bytes]:
    """Returns what is in a good file: 4×4 pixels to 2 logits."""
    layers = [keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    with tempfile.TemporaryDirectory() as folder:
        keras.Sequential(layers).save(f"{folder}/x.keras")
        with zipfile.ZipFile(f"{folder}/x.keras") as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def packed(**changes: bytes | None) -> bytes:
    """Returns the good file with other members, by names in which _ stands for a dot."""
    members = whole() | {name.replace("_", "."): value for name, value in changes.items()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            if value is not None:
                archive.writestr(name, value)
    return content.getvalue()


def config(old: str, new: str) -> bytes:
    text = whole()["config.json"].decode()
    assert old in text
    return packed(config_json=text.replace(old, new).encode())


def with_layer(layer: dict[str, Any]) -> bytes:
    values = json.loads(whole()["config.json"])
    values["config"]["layers"].insert(1, layer)
    return packed(config_json=json.dumps(values).encode())


def weights(**arguments: Any) -> bytes:
    """Returns the good file with another dataset in place of the kernel."""
    content = io.BytesIO(whole()["model.weights.h5"])
    with h5py.File(content, "r+") as file:
        del file["layers/dense/vars/0"]
        if link := arguments.pop("link", None):
            file["layers/dense/vars/0"] = link
        else:
            file.create_dataset("layers/dense/vars/0", dtype="float32", **arguments)
    return packed(model_weights_h5=content.getvalue())


def python_code() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = keras.layers.Lambda(eval(f"lambda x: (open({MARK!r}, 'w').close(), x)[1]"))
    return with_layer(keras.saving.serialize_keras_object(layer))


def foreign(module: str, name: str, **arguments: Any) -> bytes:
    return with_layer({"module": module, "class_name": name, "config": arguments})


KERAS = {
    "empty": lambda: b"",
    "text": lambda: b"not an archive",
    "half": lambda: packed()[:1500],
    "hdf5": lambda: whole()["model.weights.h5"],
    "no weights": lambda: packed(model_weights_h5=None),
    "no config": lambda: packed(config_json=None),
    "path": lambda: packed(**{f"../{MARK}": b"x"}),
    "absolute path": lambda: packed(**{f"/tmp/{MARK}": b"x"}),
    "config bomb": lambda: packed(config_json=b" " * (2**26 + 1)),
    "weights bomb": lambda: packed(model_weights_h5=bytes(2**24)),
    "deep config": lambda: packed(config_json=b"[" * 10**5),
    "list": lambda: packed(config_json=b"[1, 2]"),
    "half weights": lambda: packed(model_weights_h5=whole()["model.weights.h5"][:3000]),
    "shape": lambda: weights(shape=(10**12,), chunks=(2**20,)),
    "smaller shape": lambda: weights(shape=(48, 2 * 10**7), chunks=(48, 10**4)),
    "other shape": lambda: weights(shape=(48, 3)),
    "link": lambda: weights(link=h5py.ExternalLink("/etc/hostname", "/")),
    "outside": lambda: weights(shape=(48, 2), external=[("/etc/services", 0, 384)]),
    "units": lambda: config('"units": 2', '"units": 1000000000000'),
    "fewer units": lambda: config('"units": 2', '"units": 100000000'),
    "code": python_code,
    "command": lambda: foreign("subprocess", "Popen", args=["touch", MARK]),
    "builtin": lambda: foreign("builtins", "eval", source=f"open({MARK!r}, 'w')"),
}


def files(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", KERAS)
def test_a_hostile_keras_file_ends_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.keras").write_bytes(KERAS[kind]())
    with pytest.raises(RunError, match=r"x\.keras cannot be loaded: \S"):
        network_file.open_file("x.keras")
    with pytest.raises(RunError, match=r"x\.keras cannot be loaded: \S"):
        trained_network.of_file("x.keras", lambda size, classes: {})
    assert files(tmp_path) == ["x.keras"]
    assert not pathlib.Path("/tmp", MARK).exists()


def test_a_good_file_is_loaded(tmp_path):
    (tmp_path / "x.keras").write_bytes(packed())
    network = network_file.open_file(str(tmp_path / "x.keras"))
    with h5py.File(io.BytesIO(whole()["model.weights.h5"])) as file:
        kernel = file["layers/dense/vars/0"][()]
    found = network(np.ones((1, 4, 4, 3), np.float32))
    np.testing.assert_allclose(found, kernel.sum(0)[None], rtol=1e-5)


def external_onnx() -> bytes:
    """Weights that lie in a file outside of the folder."""
    onnx = pytest.importorskip("onnx")
    outside = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=1)
    outside.external_data.add(key="location", value="../../../../../../etc/services")
    return graph(onnx, outside)


def huge_onnx() -> bytes:
    onnx = pytest.importorskip("onnx")
    return graph(onnx, onnx.TensorProto(name="w", dims=[10**12], data_type=1, raw_data=b"1234"))


def graph(onnx: Any, tensor: Any) -> bytes:
    helper = onnx.helper
    ends = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("images", "logits")]
    nodes = [helper.make_node("Add", ["images", "w"], ["logits"])]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor])
    return helper.make_model(made, ir_version=8).SerializeToString()


OTHERS = {
    "empty.tflite": lambda: b"",
    "text.tflite": lambda: b"no flatbuffer",
    "header.tflite": lambda: b"\x1c\0\0\0TFL3" + bytes(99),
    "offset.tflite": lambda: b"\xff\xff\xff\x7fTFL3" + bytes(99),
    "empty.onnx": lambda: b"",
    "text.onnx": lambda: b"no protobuf",
    "huge.onnx": huge_onnx,
    "external.onnx": external_onnx,
    "empty/saved_model.pb": lambda: b"",
    "text/saved_model.pb": lambda: b"no protobuf",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_hostile_files_end_in_one_line(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(OTHERS[name]())
    source = path if path.suffix != ".pb" else path.parent
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"cannot be loaded: \S") as raised:
        network_file.open_file(str(source))
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == before


def test_what_crashes_its_runtime_crashes_another_process(tmp_path, monkeypatch):
    (tmp_path / "x.tflite").write_bytes(b"")
    (tmp_path / "crash.py").write_text("import os; os.abort()")
    monkeypatch.setattr(runtimes, "__file__", str(tmp_path / "crash.py"))
    with pytest.raises(RunError, match=r"x\.tflite is damaged: LiteRT crashes on it \(signal 6\)"):
        network_file.open_file(str(tmp_path / "x.tflite"))


_OPEN_ALL = """
import os, pathlib, resource, sys
from condconv.tools import network_file
from condconv.engine.errors import RunError
import tensorflow as tf
tf.zeros(1)
size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, size + 2**31))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        network_file.open_file(path)
    except RunError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sizes of processes are read as Linux has them")
def test_hostile_files_take_little_memory(tmp_path):
    large = ("config bomb", "weights bomb", "shape", "smaller shape", "units", "fewer units")
    paths = [tmp_path / f"{kind}.keras" for kind in large]
    for path in paths:
        path.write_bytes(KERAS[path.stem]())
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    *said, megabytes = done.stdout.splitlines()
    assert len(said) == len(large), done.stderr
    assert all("cannot be loaded" in line for line in said)
    assert int(megabytes) < 300


@pytest.mark.slow
def test_a_hostile_file_ends_a_command_with_code_1(tmp_path):
    (tmp_path / "x.keras").write_bytes(KERAS["path"]())
    command = ["scripts/export.py", f"--source={tmp_path / 'x.keras'}", "--format=keras"]
    done = subprocess.run(
        [sys.executable, *command, f"--output={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert files(tmp_path) == ["x.keras"]
