"""Where a run computes: what is asked for wrongly is told in one line."""

import sys
import types

import pytest
import tensorflow as tf

from condconv.engine.backends import tensorflow
from condconv.engine.errors import UsageError


@pytest.mark.parametrize("text", ["gpu", "cpu:0", "cpu:two", "cpu", ""])
def test_devices_that_are_none(text):
    with pytest.raises(UsageError, match="takes 'auto' or 'cpu:N'"):
        tensorflow.connect(text)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:2"]}}',
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "chief", "index": 0}}',
    ],
)
def test_a_tf_config_that_names_no_worker(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match="TF_CONFIG takes"):
        tensorflow.connect("auto")


def test_parts_of_a_cpu_are_no_workers(monkeypatch):
    cluster = '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}'
    monkeypatch.setenv("TF_CONFIG", cluster)
    with pytest.raises(UsageError, match="is for one process"):
        tensorflow.connect("cpu:2")


@pytest.mark.parametrize("text", ["", '{"cluster": {"worker": ["a:1"]}}'])
def test_a_tf_config_of_one_worker_changes_nothing(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    devices = tensorflow.connect("auto")
    assert devices.replicas == devices.workers == 1
    assert devices.is_chief
    assert devices.agreed(7, "anything") == 7


def test_a_tpu_that_is_not_there():
    with pytest.raises(UsageError, match="--tpu=local cannot be used"):
        tensorflow.connect("auto", tpu="local")
    with pytest.raises(UsageError, match="takes 'local', an address"):
        tensorflow.connect("auto", tpu="")


def test_a_tpu_by_name_needs_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloud_tpu_client", None)
    with pytest.raises(UsageError, match="install the extra 'tpu'"):
        tensorflow.connect("auto", tpu="mine")


@pytest.mark.parametrize("healthy", [True, False])
def test_a_tpu_by_name_is_waited_for(monkeypatch, healthy):
    waited = []

    class Client:
        def __init__(self, name: str):
            self.name = name

        def wait_for_healthy(self) -> None:
            waited.append(self.name)
            if not healthy:
                raise RuntimeError("Timed out waiting for TPU.\nmore")

    connected = []
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver
    monkeypatch.setitem(sys.modules, "cloud_tpu_client", types.SimpleNamespace(Client=Client))
    monkeypatch.setattr(resolver, "connect", lambda name: connected.append(name) or "resolver")
    monkeypatch.setattr(tf.distribute, "TPUStrategy", lambda given: ("strategy", given))
    if healthy:
        assert tensorflow.connect("auto", tpu="mine").strategy == ("strategy", "resolver")
        assert (waited, connected) == (["mine"], ["mine"])
    else:
        with pytest.raises(UsageError, match="not healthy or not there: Timed out waiting for TPU"):
            tensorflow.connect("auto", tpu="mine")
        assert connected == []
