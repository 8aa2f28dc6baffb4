"""Runs of before: what the code before the engine's rooms began, the code of now ends."""

import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from tiny_runs import state

from condconv.engine import config, loop
from condconv.engine.telemetry import read_metrics

# Of step 20; `end.npz` is step 40 as that code (commit 22e429c) reached it.
OLD = pathlib.Path(__file__).parent / "golden" / "old_run"


@pytest.mark.slow
def test_a_run_of_before_goes_on_to_the_same_end(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    shutil.copytree(OLD, workdir)
    before = state(workdir)
    longer = config.load([str(OLD / "config.gin")], ["Experiment.duration = '40 steps'"])
    assert loop.train(longer, workdir).exit_code == 0
    got, end = state(workdir), np.load(OLD / "end.npz")
    assert got.keys() == set(end.files)
    # To the bit on the machine that made it; elsewhere, sums may be in another order.
    for name in end.files:
        update = np.linalg.norm(end[name] - before[name])
        allowed = 1e-2 * update + 1e-6 * np.sqrt(end[name].size)
        assert np.linalg.norm(got[name] - end[name]) <= allowed, name
    metrics = read_metrics(workdir)
    assert [m["step"] for m in metrics if "train_loss" in m] == [10, 20, 30, 40]
    assert [m["step"] for m in metrics if "minival_top1" in m] == [10, 20]
    assert [m["step"] for m in metrics if "selection_top1" in m] == [30, 40]
