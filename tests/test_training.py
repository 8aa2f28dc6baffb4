"""Training and evaluation as a whole, on a network so small that a step takes no time."""

import json
import signal

import keras
import numpy as np
import pytest
from etils import epath
from tiny_runs import (
    encoded,
    experiment,
    judged,
    network,
    same,
    state,
    stripes,
    train_to_the_first_checkpoint,
)

from condconv.engine import checkpoints, evaluation, loop, schedules
from condconv.engine.backends.tensorflow.run import Run
from condconv.engine.checkpoints import Notes
from condconv.engine.errors import RunError, UsageError
from condconv.engine.tasks.classification import classification
from condconv.engine.telemetry import read_metrics
from data.pipeline import Pipeline
from data.preprocess import whole
from data.source import Source


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> epath.Path:
    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "trained"
    assert loop.train(experiment(), workdir).exit_code == 0
    return workdir


def test_a_run_leaves_what_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.gin", "operative_config.gin", "environment.json", "metrics.jsonl"} <= names
    assert {"tensorboard", "checkpoints"} <= names
    environment = json.loads((trained / "environment.json").read_text())
    assert {"python", "keras", "tensorflow", "devices", "commit", "seed"} <= environment.keys()
    assert any((trained / "tensorboard").iterdir())
    assert not [path for path in trained.iterdir() if path.name.endswith(".part")]


def test_metrics_have_a_line_for_each_log_and_evaluation(trained):
    metrics = read_metrics(trained)
    assert [m["step"] for m in metrics if "train_loss" in m] == [5, 10, 15, 20]
    evaluations = [m for m in metrics if "selection_top1" in m]
    assert [m["step"] for m in evaluations] == [10, 20]
    assert {"selection_top5", "selection_loss", "selection_images"} <= evaluations[0].keys()
    assert all(m["selection_images"] == 7 for m in evaluations)
    logged = metrics[0]
    assert {"epoch", "train_top1", "train_objective", "learning_rate"} <= logged.keys()
    assert logged["epoch"] == 1.0
    # The objective adds smoothing and weight decay to the loss.
    assert all(m["train_objective"] > m["train_loss"] for m in metrics if "train_loss" in m)


def test_it_learns(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    loop.train(experiment(duration="120 steps", evaluate_every="120 steps"), workdir)
    result = evaluation.evaluate_run(experiment(), workdir)
    assert result["top1"] > 0.9


def test_evaluation_gives_the_promised_keys_and_the_same_numbers_twice(trained):
    first, second = (evaluation.evaluate_run(experiment(), trained) for _ in range(2))
    assert first == second
    assert set(first) == {
        "top1", "top5", "loss", "images", "parameters", "multiply_adds", "macs",
        "dataset", "split", "step", "weights",
    }  # fmt: skip
    assert (first["dataset"], first["split"], first["step"]) == ("stripes", "test", 20)
    assert first["images"] == 23
    assert first["weights"] == "ema"
    assert first["top5"] == 1.0  # of three classes


@pytest.mark.parametrize("eval_batch_size", [1, 5, 23, 64])
def test_evaluation_does_not_depend_on_the_batch(trained, eval_batch_size):
    plain = evaluation.evaluate_run(experiment(), trained)
    result = evaluation.evaluate_run(experiment(eval_batch_size=eval_batch_size), trained)
    assert (result["top1"], result["images"]) == (plain["top1"], 23)
    assert result["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_evaluation_agrees_with_numpy(trained):
    arrays = state(trained)
    model = network(3)
    for variable in model.variables:
        name = f"average/{variable.path}"
        if name in arrays:
            variable.assign(arrays[name])
    images, labels = zip(
        *[(b["image"][0], b["label"][0]) for b in stripes().eval_batches("test", batch_size=1)],
        strict=True,
    )
    logits = np.asarray(model(np.stack(images)), np.float64)
    top1 = np.mean(logits.argmax(-1) == np.stack(labels))
    log_total = np.log(np.exp(logits).sum(-1))
    loss = np.mean(log_total - logits[np.arange(23), np.stack(labels)])
    result = evaluation.evaluate_run(experiment(), trained)
    assert result["top1"] == top1
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_raw_and_averaged_weights_differ_and_are_told_apart(trained):
    averaged = evaluation.evaluate_run(experiment(), trained, ema=True)
    raw = evaluation.evaluate_run(experiment(), trained, ema=False)
    assert (averaged["weights"], raw["weights"]) == ("ema", "raw")
    assert averaged["loss"] != raw["loss"]


def test_best_is_the_best_on_the_selection_split(trained):
    scores = {
        m["step"]: m["selection_top1"] for m in read_metrics(trained) if "selection_top1" in m
    }
    best, score = checkpoints.Checkpoints(trained).best()
    assert score == max(scores.values()) == scores[best]
    assert evaluation.evaluate_run(experiment(), trained, "best")["step"] == best


def test_a_second_call_goes_on_and_ends_with_the_same_weights(tmp_path, trained):
    whole = epath.Path(tmp_path) / "two_calls"
    train_to_the_first_checkpoint(experiment(steps_per_call=1), whole)
    assert checkpoints.Checkpoints(whole).steps() == [10]
    assert loop.train(experiment(), whole).exit_code == 0
    assert same(state(whole), state(trained))
    steps = [m["step"] for m in read_metrics(whole) if "train_loss" in m]
    assert steps == [5, 10, 15, 20]


def test_a_finished_run_is_left_alone(trained, capsys):
    before = state(trained)
    assert loop.train(experiment(), trained).exit_code == 0
    assert "already trained to step 20" in capsys.readouterr().err
    assert same(state(trained), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(tmp_path, trained, number, capsys):
    workdir = epath.Path(tmp_path) / "run"
    steps = Run.steps

    def interrupted(self, batches, first, *rest):
        if first == 3:
            signal.raise_signal(number)
        return steps(self, batches, first, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", interrupted)
        assert loop.train(experiment(), workdir).exit_code == 128 + number
    assert "the same command goes on" in capsys.readouterr().err
    assert checkpoints.Checkpoints(workdir).steps() == [5]
    assert loop.train(experiment(), workdir).exit_code == 0
    assert same(state(workdir), state(trained))


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(tmp_path, trained):
    root = epath.Path(tmp_path)
    loop.train(experiment(), root / "again")
    loop.train(experiment(seed=1), root / "other")
    assert same(state(root / "again"), state(trained))
    assert not same(state(root / "other"), state(trained))


def test_steps_per_call_change_nothing(tmp_path, trained):
    workdir = epath.Path(tmp_path) / "run"
    loop.train(experiment(steps_per_call=1), workdir)
    assert same(state(workdir), state(trained))


def test_a_workdir_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "config.gin").write_text("Experiment.seed = 3\n")
    with pytest.raises(UsageError, match="Experiment.seed: 3 there, not bound here"):
        loop.train(experiment(), epath.Path(tmp_path))


def test_checkpoints_of_nobody_knows_what_are_refused(tmp_path):
    checkpoints.Checkpoints(epath.Path(tmp_path)).save(5, {"a": np.zeros(1)}, Notes())
    with pytest.raises(UsageError, match=r"has checkpoints and no config.gin"):
        loop.train(experiment(), epath.Path(tmp_path))


def test_an_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        loop.train(experiment(), epath.Path(tmp_path) / "file" / "run")


def test_a_checkpoint_of_another_model_names_the_first_differences(trained):
    wider = experiment(model=lambda num_classes: network(num_classes, filters=8))
    with pytest.raises(UsageError) as error:
        evaluation.evaluate_run(wider, trained)
    message = str(error.value)
    assert "the checkpoint of step 20 does not fit this model" in message
    assert "conv/kernel is (2, 3, 3, 3, 4) in the checkpoint and (2, 3, 3, 3, 8) here" in message
    assert "more" in message


def test_an_empty_split_is_refused(trained):
    def empty() -> Pipeline:
        nothing = encoded(np.zeros((0, 6, 6, 3), np.uint8), np.zeros(0))
        return Pipeline(Source("stripes", 3, {"test": nothing}), whole(6))

    with pytest.raises(UsageError, match="the split 'test' of stripes is empty"):
        evaluation.evaluate_run(experiment(data=empty), trained)


@pytest.mark.parametrize("name", ["7", "nonsense", "/nowhere/000000010"])
def test_a_checkpoint_that_is_not_there_is_named(trained, name):
    with pytest.raises(UsageError, match="no checkpoint"):
        evaluation.evaluate_run(experiment(), trained, name)


def test_a_checkpoint_by_step_and_by_path(trained):
    by_step = evaluation.evaluate_run(experiment(), trained, "10")
    by_path = evaluation.evaluate_run(
        experiment(), trained, str(trained / "checkpoints" / "000000010")
    )
    assert by_step == by_path
    assert by_step["step"] == 10


def test_ema_without_averages_is_refused(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    plain = experiment(ema_decay=0.0, duration="4 steps", selection_split=None)
    loop.train(plain, workdir)
    with pytest.raises(UsageError, match="has no averaged weights"):
        evaluation.evaluate_run(plain, workdir, ema=True)
    assert evaluation.evaluate_run(plain, workdir)["weights"] == "raw"
    with pytest.raises(UsageError, match="has no best checkpoint"):
        evaluation.evaluate_run(plain, workdir, "best")


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, trained, damage):
    kept = checkpoints.Checkpoints(epath.Path(tmp_path))
    for number in (10, 20):
        kept.save(number, {"a": np.full(100, number, np.float32)}, Notes())
    path = tmp_path / "checkpoints" / "000000020" / "state.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-7]
    else:
        content[-3] ^= 1
    path.write_bytes(content)
    last = kept.load_last()
    assert (last.step, last.state["a"][0]) == (10, 10.0)
    with pytest.raises(UsageError, match="is damaged"):
        kept.load(20)


def test_without_a_manifest_there_is_no_checkpoint(tmp_path):
    kept = checkpoints.Checkpoints(epath.Path(tmp_path), keep=2)
    for number in (1, 2, 3, 4):
        kept.save(number, {"a": np.zeros(1)}, Notes(score=0.5 if number == 1 else None))
    assert kept.steps() == [1, 3, 4]
    (tmp_path / "checkpoints" / "000000004" / "manifest.json").unlink()
    assert kept.load_last().step == 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def exploding(clock):
        return schedules.cosine(clock, 1e30, "0 steps")

    with pytest.raises(RunError, match="not finite .step"):
        loop.train(experiment(schedule=exploding), epath.Path(tmp_path) / "run")


def test_bfloat16_trains_with_float32_weights(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    loop.train(experiment(precision="mixed_bfloat16", duration="6 steps"), workdir)
    assert all(v.dtype != np.uint16 for v in state(workdir).values())
    assert state(workdir)["model/conv/kernel"].dtype == np.float32
    assert keras.config.dtype_policy().name == "float32"


def test_evaluation_that_misses_an_example_fails():
    class Short(Pipeline):
        def eval_batches(self, split, **arguments):
            return super().eval_batches(split, **arguments).take(1)

    short = Short(stripes().source, stripes().preprocessing)
    with pytest.raises(
        RunError, match="saw 8 examples, 8 of them different, instead of each of 23"
    ):
        judged(network(3), short, 8)


def test_a_network_that_is_no_number_scores_as_wrong():
    inputs = keras.Input((6, 6, 3))
    undefined = keras.layers.Rescaling(float("nan"))(keras.layers.Flatten()(inputs)[:, :3])
    model = keras.Model(inputs, undefined)
    data = stripes()
    assert classification(data).summary(judged(model, data, 8))["top1"] == 0.0
