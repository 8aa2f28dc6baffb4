"""What keeps a run from going wrong, and what it may begin from."""

import json
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from etils.epath import gpath
from tiny_runs import (
    build,
    experiment,
    network,
    state,
    step,
    stripes,
    train_to_the_first_checkpoint,
)

from condconv.engine import checkpoints, config, loop, optimization, restore
from condconv.engine.backends.tensorflow.updates import LossScale
from condconv.engine.errors import RunError, UsageError
from condconv.engine.telemetry import Watch, read_metrics
from condconv.tools import dry_run
from data.pipeline import Pipeline

SLOW = pytest.mark.slow


class Poisoned(Pipeline):
    """Data of which one batch, counted from the first, is no number."""

    bad = 13

    def train_batches(self, split, *, start=0, **arguments):
        batches = super().train_batches(split, start=start, **arguments)

        def poison(number, batch):
            image = tf.cast(batch["image"], tf.float32)
            return {**batch, "image": tf.where(number == self.bad, np.nan, image)}

        return batches.enumerate(start).map(poison)


def poisoned() -> Poisoned:
    data = stripes()
    return Poisoned(data.source, data.preprocessing)


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    with pytest.raises(RunError, match=r"not finite \(step 13, .*; last checkpoint: 10"):
        loop.train(experiment(data=poisoned), workdir)
    assert checkpoints.is_finite(state(workdir))
    assert read_metrics(workdir)[-1]["step"] <= 13


def test_a_roll_back_goes_on_behind_the_bad_batch_and_resumes_so(tmp_path, capsys):
    workdir = epath.Path(tmp_path) / "run"
    wanted = experiment(data=poisoned, max_rollbacks=1)
    assert loop.train(wanted, workdir).exit_code == 0
    assert "going back, and on behind this batch" in capsys.readouterr().err
    last = checkpoints.Checkpoints(workdir).load_last()
    assert (last.step, last.notes.skipped, last.notes.rollbacks) == (20, 4, 1)
    assert checkpoints.is_finite(last.state)
    steps = [m["step"] for m in read_metrics(workdir) if "train_loss" in m]
    assert steps == [5, 10, 15, 20]


@SLOW
def test_no_more_roll_backs_than_allowed(tmp_path):
    class Twice(Poisoned):
        def train_batches(self, split, *, start=0, **arguments):
            batches = Pipeline.train_batches(self, split, start=start, **arguments)
            bad = lambda number, batch: {  # noqa: E731
                **batch,
                "image": tf.where(number >= 13, np.nan, tf.cast(batch["image"], tf.float32)),
            }
            return batches.enumerate(start).map(bad)

    data = stripes()
    wanted = experiment(data=lambda: Twice(data.source, data.preprocessing), max_rollbacks=2)
    with pytest.raises(RunError, match="not finite"):
        loop.train(wanted, epath.Path(tmp_path) / "run")


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    """The loss of the last step is still one: only its update was too large."""

    def last_one_explodes(clock):
        return lambda step: np.where(np.equal(step, 9), np.float32(np.inf), np.float32(0.01))

    workdir = epath.Path(tmp_path) / "run"
    wanted = experiment(schedule=last_one_explodes, duration="10 steps", selection_split=None)
    with pytest.raises(RunError, match="a weight is not finite"):
        loop.train(wanted, workdir)
    assert checkpoints.Checkpoints(workdir).steps() == []


def one_step(**changes) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    built = build(**changes)
    taken = step(built, 5)
    return built.state(), taken.sums


def plain(num_classes: int) -> keras.Model:
    """A network without batch norm or dropout, for which parts of a batch make the whole."""
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="classifier")(x), name="plain")


@SLOW
def test_accumulated_parts_of_a_batch_make_the_whole():
    whole, sums = one_step(model=plain)
    parts, part_sums = one_step(model=plain, accumulation_steps=4)
    assert part_sums["examples"] == sums["examples"] == 8
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-6)
    for name in ("loss", "top1", "objective", "gradient_norm"):
        assert part_sums[name] == pytest.approx(sums[name], rel=1e-5)


@SLOW
def test_clipping_bounds_the_norm_of_the_update():
    descent = {"model": plain, "optimizer": lambda learning_rate: optimization.momentum(1.0)}
    before = build(**descent).state()
    after, sums = one_step(**descent, clip_norm=0.01)
    moved = [after[n] - before[n] for n in after if n.startswith("model/")]
    assert sums["gradient_norm"] > 0.01  # told as it was
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(0.01, rel=1e-4)


@SLOW
def test_xla_changes_nothing():
    fast, fast_sums = one_step(xla=True, model=plain)
    plainly, sums = one_step(model=plain)
    assert fast_sums["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    for name, value in plainly.items():
        np.testing.assert_allclose(fast[name], value, rtol=1e-4, atol=1e-6)


@SLOW
def test_float16_leaves_out_a_step_that_overflows_and_tries_a_smaller_scale():
    built = build(precision="mixed_float16", model=plain)
    built.scale.variables["scale"].assign(1e30)
    before = built.state()
    taken = step(built, 5)
    after = built.state()
    assert taken.bad is None
    assert after["loss_scale/scale"] == np.float32(1e30) / 2
    model = [name for name in before if name.startswith("model/")]
    assert all(np.array_equal(before[name], after[name]) for name in model)


def test_float16_grows_its_scale_after_good_steps():
    scale = LossScale(initial=8.0, patience=2)
    found = []
    for finite in (True, True, True, False, False, True, True):
        scale.update(tf.constant(finite))
        found.append(float(scale.read()))
    assert found == [8, 16, 16, 8, 4, 4, 8]


@SLOW
@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_a_run_begins_with_the_weights_of_another(tmp_path, kind, capsys):
    workdir = epath.Path(tmp_path) / "first"
    loop.train(experiment(duration="10 steps"), workdir)
    trained = state(workdir)
    source = str(workdir / "checkpoints" / "000000010")
    if kind == "file":
        model = network(3)
        values = checkpoints.read(source).weights()[0]
        checkpoints.fit(values, checkpoints.named_variables(model), "it")
        source = str(tmp_path / "first.keras")
        model.save(source)
    tuned = {"init_from": source, "model": lambda num_classes: network(5)}
    built = build(**tuned)
    restore.initialize(built)
    for kind in ("model", "average"):
        got = built.state()[f"{kind}/conv/kernel"]
        np.testing.assert_array_equal(got, trained["average/conv/kernel"])
    said = capsys.readouterr().err
    assert "made anew: classifier/bias, classifier/kernel" in said
    assert "not taken: classifier/bias, classifier/kernel" in said


@pytest.mark.parametrize("name", ["/nowhere/model.keras", "/nowhere/000000010"])
def test_a_file_to_begin_from_that_is_not_there_is_named(name):
    with pytest.raises(UsageError, match="/nowhere/"):
        restore.initialize(build(init_from=name))


@pytest.mark.parametrize(("waiting", "says"), [(True, "input"), (False, "the devices")])
def test_a_stall_is_told_once_with_its_cause(capsys, waiting, says):
    with Watch(0.05, lambda: waiting) as watch:
        watch.moved(7)
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"step 7: waiting for {says}")


def test_checkpoints_kept_for_good(tmp_path):
    kept = checkpoints.Checkpoints(epath.Path(tmp_path), keep=1, keep_every=20)
    for number in (10, 20, 30, 40, 50):
        score = 0.9 if number == 10 else 0.1
        kept.save(number, {"a": np.zeros(1)}, checkpoints.Notes(score))
    assert kept.steps() == [10, 20, 40, 50]
    assert kept.best() == (10, 0.9)


@pytest.mark.parametrize("field", ["step", "skipped", "score", "sha256"])
def test_a_changed_note_is_damage(tmp_path, field):
    kept = checkpoints.Checkpoints(epath.Path(tmp_path))
    kept.save(3, {"a": np.zeros(4)}, checkpoints.Notes(0.5))
    path = tmp_path / "checkpoints" / "000000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {field: 7}, indent=2) + "\n")
    with pytest.raises(UsageError, match="damaged"):
        kept.load(3)


def test_what_stands_in_for_a_checkpoint_being_written_is_removed_later(tmp_path):
    kept = checkpoints.Checkpoints(epath.Path(tmp_path))
    half = tmp_path / "checkpoints" / "000000002"
    half.mkdir(parents=True)
    (half / "state.safetensors").write_bytes(b"half")
    kept.save(3, {"a": np.zeros(4)}, checkpoints.Notes())
    assert not half.exists()
    assert kept.steps() == [3]


@SLOW
def test_a_dry_run_does_everything_in_little():
    loaded = config.load(["configs/digits_condconv.gin"], ["Experiment.batch_size = 128"])
    facts = dry_run.dry_run(loaded, batch_per_replica=4)
    assert facts["batch size"] == 128
    assert facts["epochs"] == pytest.approx(40, abs=0.1)
    assert facts["steps"] == round(40 * 1293 / 128)
    assert facts["parameters"] == 1_631_912
    # Weights, averages, two buffers of the optimizer, four bytes each, and some statistics.
    assert facts["checkpoint MB"] == pytest.approx(4 * 4 * 1.631912, rel=0.02)


@pytest.fixture
def object_store(monkeypatch) -> epath.Path:
    """A folder gs://… that TensorFlow keeps in memory: no renaming of folders, no local files."""
    path_of = gpath._GPath._path_str.fget
    in_memory = property(lambda path: path_of(path).replace("gs://", "ram://"))
    monkeypatch.setattr(gpath._GPath, "_path_str", in_memory)
    return epath.Path("gs://bucket/run")


@SLOW
def test_a_run_on_an_object_store_is_that_on_a_disk(object_store, tmp_path):
    train_to_the_first_checkpoint(experiment(), object_store)
    damaged = object_store / "checkpoints" / "000000015"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{}")
    assert loop.train(experiment(), object_store).exit_code == 0
    on_disk = epath.Path(tmp_path) / "run"
    loop.train(experiment(), on_disk)
    one, other = state(object_store), state(on_disk)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert [m["step"] for m in read_metrics(object_store)] == [
        m["step"] for m in read_metrics(on_disk)
    ]
    assert not tmp_path.joinpath("gs:").exists()
