"""Published checkpoints: their logits come out the same, and what is no such file is refused."""

import contextlib
import json
import os
import pathlib
import struct
import subprocess
import sys
from collections.abc import Iterator

import authors_graph
import authors_networks
import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
import timm_names

import condconv
from condconv.engine.errors import RunError, UsageError
from condconv.tools import published_weights as published
from models import released, released_timm
from models.imported import import_network

ROOT = pathlib.Path(__file__).parents[1]
TIMM = os.environ.get("CONDCONV_TIMM_PYTHON")
AVERAGE = "/ExponentialMovingAverage"


def save_tf1(prefix: pathlib.Path, values: dict) -> str:
    tensors = [tf.constant(value) for value in values.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=tensors,
    )
    return str(prefix)


def as_trained(variables: dict) -> dict:
    """Returns all that a training checkpoint holds: disturbed raw weights, averages, slots."""
    draw, values = np.random.default_rng(0), {"global_step": np.int64(218949)}
    for name, value in variables.items():
        values[name] = value * np.exp(0.03 * draw.standard_normal(value.shape, np.float32))
        values[name + AVERAGE] = value
        if "moving_" not in name:
            values |= {f"{name}/RMSProp": value * 0 + 1, f"{name}/RMSProp_1": value * 0}
    return values


def assert_equal(logits: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def quarter() -> dict[str, np.ndarray]:
    return authors_graph.load("mobilenet-v1-25").variables


def test_a_training_checkpoint_gives_the_logits_of_its_averages(tmp_path):
    authors = authors_graph.load("mobilenet-v1-25")
    prefix = save_tf1(tmp_path / "model.ckpt", as_trained(authors.variables))
    network, facts = import_network(published.read(prefix), "mobilenet_v1", width=0.25)
    assert_equal(np.asarray(network(authors.images)), authors.logits[:, 1:])
    assert (facts["averaged_variables"], facts["raw_variables"]) == (137, 0)
    assert facts["background_dropped"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "arguments"),
    [
        ("mobilenet-v1-25", {"name": "mobilenet_v1", "width": 0.25}),
        ("efficientnet-b0", {"name": "efficientnet_b0"}),
        ("efficientnet-condconv-b0-4e", {"name": "efficientnet_b0", "num_experts": 4}),
    ],
)
def test_averages_and_raw_weights_are_told_apart(graph, arguments, tmp_path):
    authors = authors_graph.load(graph)
    prefix, count = save_tf1(tmp_path / "x", as_trained(authors.variables)), len(authors.variables)
    expected = authors.logits[:, -1000:]
    for ema, averaged in ((None, count), (True, count), (False, 0)):
        network, facts = import_network(published.read(prefix, ema), **arguments)
        difference = np.abs(np.asarray(network(authors.images)) - expected).max()
        share = difference / np.abs(expected).max()
        assert share <= 1e-4 if averaged else share > 1e-2
        assert (facts["averaged_variables"], facts["raw_variables"]) == (averaged, count - averaged)


NETWORKS = {
    "efficientnet-condconv-b0-8e": (
        ("efficientnet_b0", {"num_experts": 8}),
        (authors_networks.efficientnet, authors_networks.CONDCONV),
        ("efficientnet-condconv-b0-8e", 8, 1.0),
        327,
    ),
    "efficientnet-condconv-b0-8e-depth": (
        ("efficientnet_b0_depth", {"num_experts": 8}),
        (authors_networks.efficientnet, authors_networks.CONDCONV),
        ("efficientnet-condconv-b0-8e-depth", 8, 1.1),
        461,
    ),
    "mnasnet-a1": (
        ("mnasnet_a1", {}),
        (authors_networks.mnasnet_a1, authors_networks.IMAGENET),
        ("mnasnet-a1",),
        279,
    ),
    "resnet-50": (
        ("resnet50", {}),
        (authors_networks.resnet50, authors_networks.IMAGENET),
        (),
        267,
    ),
    "mobilenet-v2": (
        ("mobilenet_v2", {}),
        (authors_networks.mobilenet_v2, authors_networks.INCEPTION),
        (),
        262,
    ),
    **{
        f"mobilenet-v1-{width}": (
            ("mobilenet_v1", {"width": width}),
            (authors_networks.mobilenet_v1, authors_networks.INCEPTION),
            (width,),
            137,
        )
        for width in (1.0, 0.75, 0.5, 0.25)
    },
}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_logits_are_those_of_the_authors_network(network, tmp_path):
    (name, arguments), graph, made_with, count = NETWORKS[network]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 96, 96, 3), np.uint8)
    variables, logits = authors_networks.run(graph[0], pixels, graph[1], *made_with)
    assert len(variables) == count  # of the authors' graph
    prefix = save_tf1(tmp_path / "model.ckpt-1", as_trained(variables))
    with in_float64():
        network, facts = import_network(published.read(prefix), name, image_size=96, **arguments)
    expected = logits[:, -1000:]
    assert np.abs(np.asarray(network(pixels)) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert logits.std(0).mean() > 0.01  # they depend on the image
    assert facts["averaged_variables"] == count
    assert facts["background_dropped"] == (logits.shape[1] == 1001)


def test_names_whose_count_is_shifted_are_found_by_their_order():
    names = {
        "a": "p/model/blocks_8/cond_conv2d_1/condconv_kernel",
        "b": "p/model/blocks_8/cond_conv2d_2/condconv_kernel",
        "c": "p/model/blocks_8/depthwise_cond_conv2d/depthwise_condconv_kernel",
        "d": "p/blocks_8/dense/kernel",
    }
    shifted = [
        "p/model_1/blocks_8/cond_conv2d_10/condconv_kernel",
        "p/model_1/blocks_8/cond_conv2d_9/condconv_kernel",
        "p/model_1/blocks_8/depthwise_cond_conv2d_4/depthwise_condconv_kernel",
        "p/blocks_8/dense/kernel",
    ]
    order = dict(zip("abcd", (shifted[index] for index in (1, 0, 2, 3)), strict=True))
    assert released.recounted(names, shifted) == order
    assert released.recounted(names, shifted[1:]) == names
    assert released.recounted(names, list(names.values())) == names


def test_averages_are_taken_where_there_are_some(tmp_path):
    values = {"a/w": np.float32([1]), "a/w" + AVERAGE: np.float32([2]), "b/w": np.float32([3])}
    prefix = save_tf1(tmp_path / "x", values | {"step": np.int64(3), "b/w/Momentum": [0.0]})
    assert published.read(prefix).values == {"a/w": [2], "b/w": [3]}
    assert published.read(prefix, ema=True).averaged == {"a/w"}
    assert published.read(prefix, ema=False).values == {"a/w": [1], "b/w": [3]}
    assert published.read(str(tmp_path)).values == {"a/w": [2], "b/w": [3]}  # the folder
    assert published.read(prefix + ".index").values == {"a/w": [2], "b/w": [3]}
    raw = save_tf1(tmp_path / "raw", {"b/w": np.float32([3])})
    with pytest.raises(UsageError, match="has no averages: leave --ema out"):
        published.read(raw, ema=True)
    with pytest.raises(UsageError, match="a folder of these checkpoints: raw, x; name one"):
        published.read(str(tmp_path))


def test_what_does_not_fit_is_named():
    values = quarter()
    del values["MobilenetV1/Conv2d_3_depthwise/depthwise_weights"]
    values["MobilenetV1/extra/weights"] = np.zeros(2, np.float32)
    values["MobilenetV1/Conv2d_0/weights"] = np.zeros((8, 3, 3, 3), np.float32)
    with pytest.raises(ValueError) as error:
        import_network(published.PublishedWeights(values), "mobilenet_v1", width=0.25)
    assert "missing: MobilenetV1/Conv2d_3_depthwise/depthwise_weights\n" in str(error.value)
    assert "left over: MobilenetV1/extra/weights\n" in str(error.value)
    assert "MobilenetV1/Conv2d_0/weights has (8, 3, 3, 3), not (3, 3, 3, 8)" in str(error.value)


@pytest.mark.slow
def test_networks_of_which_nothing_was_published_are_refused():
    with pytest.raises(ValueError, match="mobilenet_v1' with experts has been published"):
        import_network(published.PublishedWeights(quarter()), "mobilenet_v1", 2, width=0.25)


@pytest.mark.slow
def test_a_classifier_of_other_classes_is_taken_as_it_is():
    values = quarter()
    for end in ("weights", "biases"):
        name = f"MobilenetV1/Logits/Conv2d_1c_1x1/{end}"
        values[name] = values[name][..., :10]
    network, facts = import_network(published.PublishedWeights(values), "mobilenet_v1", width=0.25)
    assert network.output.shape[-1] == facts["classes"] == 10
    assert not facts["background_dropped"]


@pytest.mark.parametrize("damage", ["data", "index", "no index", "no data", "no table"])
def test_a_damaged_tf1_checkpoint_ends_in_one_line(damage, tmp_path):
    prefix = save_tf1(tmp_path / "x", {"a/w": np.ones(5000, np.float32), "b": np.ones(9)})
    data, index = tmp_path / "x.data-00000-of-00001", tmp_path / "x.index"
    if damage.startswith("no "):
        {"no index": index, "no data": data}.get(damage, index).unlink()
        if damage == "no table":
            index.write_bytes(b"PK\3\4" * 99)
    else:
        cut = {"data": data, "index": index}[damage]
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for source in (prefix, str(tmp_path)):
        with pytest.raises(RunError, match="is damaged, or none"):
            published.read(source)


def test_a_shape_that_no_file_can_hold_makes_no_room(tmp_path):
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"),
        tensor_names=["a/w"],
        shape_and_slices=["1000000000000 0,1"],
        tensors=[tf.constant([1.0])],
    )
    with pytest.raises(RunError, match="1,000,000,000,000 numbers do not fit into"):
        published.read(str(tmp_path / "x"))


def header(tensors: object, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


def tensor(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "short": b"abc",
    "zip": b"PK\3\4" + bytes(500),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(500),
    "length": header({}, 2**63),
    "longest": header({}, 2**64 - 1),
    "elements": header({"a": tensor([10**12], 0, 4 * 10**12)}),
    "overflow": header({"a": tensor([2**62, 4], 0, 16)}),
    "overlap": header({"a": tensor([4], 0, 16), "b": tensor([2], 8, 16)}),
    "negative": header({"a": tensor([-4], 0, 16)}),
    "hole": header({"a": tensor([2], 0, 8)}),
    "kind": header({"a": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}}),
    "list": header([1, 2]),
    "deep": header({"a": tensor([4], 0, 16)}).replace(b"[4]", b"[" * 5000 + b"]" * 5000),
    "cut": safetensors.numpy.save({"a": np.ones(999, np.float32)})[:-1],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_safetensors_file_ends_in_one_line(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(RunError, match="is damaged, or no safetensors file"):
        published.read(str(path))


def test_numbers_that_numpy_does_not_have_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header({"a": {**tensor([8], 0, 16), "dtype": "BF16"}}))
    with pytest.raises(UsageError, match="numbers of type 'BF16': save them as F32"):
        published.read(str(path))


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".pth.tar"])
def test_a_pickle_is_never_opened(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    os.mkfifo(path)  # whoever opens it waits for ever
    with pytest.raises(UsageError, match=r"is a pickle.*s\.save_file"):
        published.read(str(path))


def test_missing_files_are_wrong_calls(tmp_path):
    for name, said in (("no.safetensors", "there is no file"), ("no.ckpt", "no checkpoint")):
        with pytest.raises(UsageError, match=said):
            published.read(str(tmp_path / name))
    with pytest.raises(UsageError, match="these checkpoints: none"):
        published.read(str(tmp_path))


OURS = {each.name: each for each in released_timm.ARCHITECTURES}


def state_dict(name: str, **notes: object) -> published.PublishedWeights:
    values = {n: np.zeros(shape, np.float32) for n, shape in timm_names.SHAPES[name].items()}
    return published.PublishedWeights(values, is_timm=True, **notes)


def test_the_network_of_a_file_is_read_beside_it(tmp_path):
    path = tmp_path / "model.safetensors"
    values = {"fc.bias": np.zeros(3, np.float16), "bn1.num_batches_tracked": np.int64([3])}
    path.write_bytes(safetensors.numpy.save(values))
    assert published.read(str(path)).architecture is None
    config = {"architecture": "resnet50", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = published.read(str(path))
    assert read.architecture == "resnet50"
    assert read.normalization == ((127.5,) * 3, (63.75,) * 3)
    assert read.values["fc.bias"].dtype == np.float32
    assert list(read.values) == ["fc.bias"]
    with pytest.raises(UsageError, match="has no averages"):
        published.read(str(path), ema=True)


def test_another_network_of_timm_is_refused_by_its_name():
    other = state_dict("mobilenetv2_100", architecture="mobilenetv2_110d")
    with pytest.raises(
        ValueError, match="timm's mobilenetv2_110d is not timm's mobilenetv1_100.*\n.*missing"
    ):
        import_network(other, "mobilenet_v1")
    with pytest.raises(ValueError, match="mobilenetv1_tv has the weights of mobilenetv1_100, but"):
        released_timm.check_known("mobilenetv1_tv", OURS["mobilenetv1_100"])
    with pytest.raises(ValueError, match="timm's resnet50 is --model=resnet50 --num_experts=0"):
        import_network(state_dict("resnet50", architecture="resnet50"), "mobilenet_v1")
    with pytest.raises(ValueError, match="timm has no resnet50 with 8 experts"):
        import_network(state_dict("resnet50"), "resnet50", 8)


@pytest.fixture
def timm_python(capfd) -> str:
    if not TIMM:
        said = "NOT COMPARED WITH TIMM: CONDCONV_TIMM_PYTHON names no Python that has timm"
        with capfd.disabled():
            print(f"\n{said}", file=sys.stderr, flush=True)
        pytest.skip(said)
    return TIMM


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_logits_are_those_of_timm(name, timm_python, tmp_path):
    made = call(timm_python, "tests/timm_reference.py", name, str(tmp_path / "timm"))
    assert made.returncode == 0, made.stderr
    ours, output = OURS[name], tmp_path / "ours.keras"
    if name != released_timm.architecture(ours.model, ours.num_experts).name:
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    done = call(
        sys.executable,
        "scripts/import_checkpoint.py",
        f"--model={ours.model}",
        f"--num_experts={ours.num_experts}",
        f"--source={tmp_path / 'timm.safetensors'}",
        f"--output={output}",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    facts, timm = json.loads(done.stdout), np.load(tmp_path / "timm.npz")
    assert facts["same_as"] == f"timm's {name}"
    np.testing.assert_allclose(facts["mean"], 255 * timm["mean"], rtol=1e-6)
    np.testing.assert_allclose(facts["deviation"], 255 * timm["std"], rtol=1e-6)
    network = keras.saving.load_model(output)
    assert condconv.count_cost(network).parameters == facts["parameters"]
    assert_equal(np.asarray(network(timm["images"])), timm["logits"])
    assert timm["logits"].std(0).mean() > 0.01
    if name in timm_names.SHAPES:
        stored = published.read(str(tmp_path / "timm.safetensors")).values
        assert {n: list(value.shape) for n, value in stored.items()} == timm_names.SHAPES[name]


@pytest.mark.slow
def test_the_command(tmp_path):
    """Whole or not there, and the exit codes of wrong calls and damaged files."""
    prefix = save_tf1(tmp_path / "model.ckpt", quarter())
    output = tmp_path / "out" / "v1.keras"
    command = (sys.executable, "scripts/import_checkpoint.py", "--model=mobilenet_v1")
    done = call(*command, f"--source={prefix}", "--width=0.25", f"--output={output}")
    assert done.returncode == 0, done.stderr
    for said in ("raw variables", "137", "470,072", "127.5", "same", str(output), "True"):
        assert said in done.stdout
    output.unlink()
    (tmp_path / "x.safetensors").write_bytes(b"half")
    for source, code, said in (
        (prefix, 2, "MobilenetV1/Conv2d_0/BatchNorm/beta has (8,), not (32,)"),
        (str(tmp_path / "x.pth"), 2, "is a pickle"),
        (str(tmp_path / "x.safetensors"), 1, "is damaged"),
    ):
        done = call(*command, f"--source={source}", f"--output={output}")
        assert done.returncode == code
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
        assert list(output.parent.iterdir()) == []
