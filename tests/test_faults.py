"""Runs that are killed, starved, broken and resumed: real processes, real faults."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from etils import epath
from local_workers import tf_configs

from condconv.engine.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STEPS, KILLS = 60, 10

CONFIG = """
import data.configurables
import models.configurables

Experiment.model = @efficientnet_b0
Experiment.data = @pipeline
Experiment.optimizer = @rmsprop
Experiment.schedule = @cosine
Experiment.duration = '{steps} steps'
Experiment.batch_size = 16
Experiment.label_smoothing = 0.1
Experiment.weight_decay = 1e-5
Experiment.ema_decay = 0.99
Experiment.selection_split = 'minival'
Experiment.eval_split = 'test'
Experiment.log_every = '1 steps'
Experiment.evaluate_every = '20 steps'
Experiment.checkpoint_every = '3 steps'
Experiment.steps_per_call = 2
pipeline.source = @digits
pipeline.preprocessing = @crops
pipeline.mixing = @mixup
crops.image_size = 32
crops.augmentations = (@auto_augment,)
efficientnet_b0.image_size = 32
efficientnet_b0.width = 0.1
efficientnet_b0.depth = 0.3
efficientnet_b0.num_experts = 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "faults.gin"
    path.write_text(CONFIG.format(steps=STEPS))
    return path


def start(config: pathlib.Path, workdir: pathlib.Path, *bindings: str, **environment: str):
    workdir.mkdir(exist_ok=True)
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "train.py", f"--gin_file={config}", f"--workdir={workdir}"),
                *(f"--gin_param={binding}" for binding in bindings),
            ],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )


def said(workdir: pathlib.Path) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text()


def finish(process: subprocess.Popen, workdir: pathlib.Path, code: int = 0) -> None:
    process.wait(timeout=300)
    assert process.returncode == code, said(workdir)
    assert "Traceback" not in said(workdir), said(workdir)


def until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> bool:
    """Waits for a condition; returns whether the process still runs then."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    return process.poll() is None


def steps_logged(workdir: pathlib.Path) -> int:
    with contextlib.suppress(OSError):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return json.loads(line)["step"]
    return 0


def final(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    last = Checkpoints(epath.Path(workdir)).load_last()
    assert last.step == STEPS
    return last.state


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not np.array_equal(one[name], other[name])]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Callable[[str], dict[str, np.ndarray]]:
    done: dict[str, dict[str, np.ndarray]] = {}

    def state(devices: str) -> dict[str, np.ndarray]:
        if devices not in done:
            workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
            finish(start(config, workdir, f"Experiment.devices = '{devices}'"), workdir)
            done[devices] = final(workdir)
        return done[devices]

    return state


@pytest.mark.parametrize(("devices", "times"), [("auto", KILLS), ("cpu:2", 3)])
def test_a_run_killed_many_times_ends_with_the_weights_of_an_undisturbed_one(
    config, tmp_path, undisturbed, devices, times
):
    workdir, chance = tmp_path / "killed", random.Random(0)
    kills = 0
    while kills < times:
        process = start(config, workdir, f"Experiment.devices = '{devices}'")
        goal = min(kills * STEPS // times + chance.randint(1, 6), STEPS - 1)
        alive = until(lambda goal=goal: steps_logged(workdir) >= goal, process)
        assert alive, said(workdir)
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    finish(start(config, workdir, f"Experiment.devices = '{devices}'"), workdir)
    assert_same(final(workdir), undisturbed(devices))
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert set(range(1, STEPS + 1)) <= set(steps)


def test_sigterm_saves_within_seconds_and_nothing_is_lost(config, tmp_path, undisturbed):
    workdir = tmp_path / "stopped"
    process = start(config, workdir)
    assert until(lambda: steps_logged(workdir) >= 10, process)
    begun = time.monotonic()
    process.terminate()
    finish(process, workdir, 128 + signal.SIGTERM)
    assert time.monotonic() - begun < 30
    assert "the same command goes on" in said(workdir)
    assert Checkpoints(epath.Path(workdir)).steps()[-1] >= 10
    finish(start(config, workdir), workdir)
    assert_same(final(workdir), undisturbed("auto"))


def start_workers(config: pathlib.Path, workdir: pathlib.Path) -> list[subprocess.Popen]:
    return [start(config, workdir, TF_CONFIG=text) for text in tf_configs(2)]


def test_two_workers_survive_the_loss_of_one(config, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for process in start_workers(config, whole):
        finish(process, whole)
    first, second = start_workers(config, broken)
    assert until(lambda: steps_logged(broken) >= 10, first), said(broken)
    second.kill()
    begun = time.monotonic()
    finish(first, broken, 1)
    assert time.monotonic() - begun < 120
    assert "the workers lost each other" in said(broken)
    for process in start_workers(config, broken):
        finish(process, broken)
    assert_same(final(broken), final(whole))


@pytest.fixture(scope="module")
def shortened(config, tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints to damage."""
    workdir = tmp_path_factory.mktemp("runs") / "shortened"
    finish(start(config, workdir, "Experiment.keep_checkpoints = 3"), workdir)
    return workdir


@contextlib.contextmanager
def damaged(path: pathlib.Path, change: Callable[[bytearray], bytearray]) -> Iterator[None]:
    content = path.read_bytes()
    path.write_bytes(change(bytearray(content)))
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_never_loaded(shortened, file, kind, caplog):
    kept = Checkpoints(epath.Path(shortened))
    *_, before, last = kept.steps()
    path, chance = shortened / "checkpoints" / f"{last:09d}" / file, random.Random(1)
    for _ in range(20):
        place = chance.randrange(path.stat().st_size)
        bit = 1 << chance.randrange(8)

        def change(content: bytearray, place: int = place, bit: int = bit) -> bytearray:
            if kind == "truncated":
                return content[:place]
            content[place] ^= bit
            return content

        with damaged(path, change):
            found = kept.load_last()
        assert found is not None and found.step == before
    assert kept.load_last().step == last


def test_a_run_goes_on_from_before_the_damage(config, tmp_path, undisturbed):
    workdir = tmp_path / "damaged"
    process = start(config, workdir)
    assert until(lambda: steps_logged(workdir) >= 30, process)
    process.terminate()
    finish(process, workdir, 128 + signal.SIGTERM)
    last = Checkpoints(epath.Path(workdir)).steps()[-1]
    state = workdir / "checkpoints" / f"{last:09d}" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    finish(start(config, workdir), workdir)
    assert "is damaged" in said(workdir)
    assert_same(final(workdir), undisturbed("auto"))
    assert not (state.parent / "manifest.json").exists() or state.stat().st_size > 100


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(config, tmp_path):
    limit = "import resource, sys, runpy; sys.argv = sys.argv[1:]; "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), -1)); "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    workdir = tmp_path / "full"
    process = start(config, workdir)
    assert until(lambda: steps_logged(workdir) >= 10, process)
    process.terminate()
    finish(process, workdir, 128 + signal.SIGTERM)
    before = Checkpoints(epath.Path(workdir)).steps()
    size = (workdir / "checkpoints" / f"{before[-1]:09d}" / "state.safetensors").stat().st_size
    done = subprocess.run(
        [
            *(sys.executable, "-c", limit, "train.py"),
            *(f"--gin_file={config}", f"--workdir={workdir}", str(size // 2)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr
    assert f"the last one is of step {before[-1]}" in done.stderr
    assert Checkpoints(epath.Path(workdir)).load_last().step == before[-1]
    finish(start(config, workdir), workdir)
