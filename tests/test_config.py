"""Configs: strict, saved so that they parse again, and errors of one line that name the cure."""

import dataclasses
import pathlib

import gin
import keras
import pytest
import tensorflow as tf
from etils import epath

from condconv import Routing
from condconv.engine import backends, config, written
from condconv.engine.backends import tensorflow
from condconv.engine.errors import UsageError
from condconv.tools.studies.table import DATASETS, TABLES, read_table
from data.digits import digits

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.gin"))
DIGITS = str(ROOT / "configs" / "digits.gin")
CONDCONV = str(ROOT / "configs" / "digits_condconv.gin")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_is_a_config_and_a_network(name, dataset):
    for row in read_table(name).rows:
        file, bindings = row.gin(dataset)
        network = config.load([str(ROOT / file)], list(bindings)).model(num_classes=10)
        assert any(isinstance(layer, Routing) for layer in network.layers) == bool(row.baseline)


def components(experiment):
    """What identifies an experiment across two parses: factories are made anew each time."""
    values = {k: getattr(v, "__name__", v) for k, v in vars(experiment).items() if k != "written"}
    return values, experiment.written.config, experiment.written.operative


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_builds_and_says_how_to_run_it(path):
    text = path.read_text()
    assert f"python train.py --gin_file=configs/{path.name}" in text
    run = tensorflow.build(config.load([str(path)]))
    assert run.clock.total_steps > 0


def test_a_saved_config_parses_to_the_same_experiment(tmp_path):
    bindings = ["Experiment.seed = 7", "mobilenet_v1.width = 0.5", "SIZE = 48"]
    bindings += ["whole.image_size = %SIZE", "mobilenet_v1.image_size = %SIZE"]
    experiment = config.load([CONDCONV], bindings)
    written.save(experiment, epath.Path(tmp_path))
    after = components(config.load_run(epath.Path(tmp_path)))
    assert components(experiment) == after
    assert after[0]["seed"] == 7
    assert written.differences(experiment, (tmp_path / "config.gin").read_text()) == []


def test_the_operative_config_holds_the_defaults_too(tmp_path):
    written.save(config.load([DIGITS], ["mobilenet_v1.width = 0.1"]), epath.Path(tmp_path))
    text = (tmp_path / "operative_config.gin").read_text()
    assert "mobilenet_v1.dropout = 0.001" in text
    assert "Experiment.keep_checkpoints = 3" in text


def test_later_files_and_bindings_win(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("Experiment.batch_size = 16\nExperiment.seed = 1\n")
    experiment = config.load([DIGITS, str(overlay)], ["Experiment.seed = 2"])
    assert (experiment.batch_size, experiment.seed) == (16, 2)


def test_differences_are_named():
    saved = config.load([DIGITS]).written.config
    ours = config.load([CONDCONV], ["Experiment.batch_size = 32"])
    assert written.differences(ours, saved) == [
        "Experiment.batch_size: 64 there, 32 here",
        "mobilenet_v1.num_experts: not bound there, 8 here",
    ]


BAD = {
    "mobilenet_v1.widht = 2": "mobilenet_v1 has no parameter 'widht'; did you mean 'width'?",
    "Experiment.sede = 2": "Experiment has no parameter 'sede'; did you mean 'seed'?",
    "mobilnet_v1.width = 2": "unknown name 'mobilnet_v1'; did you mean 'mobilenet_v1'?",
    "Experiment.model = @mobilenet_v9": "unknown name 'mobilenet_v9'; did you mean 'mobilenet_v",
    "Experiment.optimizer = @rmspropp": "did you mean 'rmsprop'?",
    "Experiment.data = @digitz": "known are training: Experiment, momentum, rmsprop, constant",
    "Experiment.seed = %SEED": "Experiment.seed refers to %SEED, which nothing binds",
    "EPOCHS = 3": "nothing uses %EPOCHS: remove the binding",
    "trian/whole.image_size = 3": "nothing uses trian/whole.image_size",
    "mobilenet_v2.width = 0.5": "nothing uses mobilenet_v2.width: remove the binding",
    "mobilenet_v1.width = '0.5'": "mobilenet_v1.width takes float, not '0.5', of type str",
    "Experiment.batch_size = 1.5": "Experiment.batch_size takes int, not 1.5, of type float",
    "Experiment.batch_size = '128'": "Experiment.batch_size takes int, not '128', of type str",
    "Experiment.model = @mobilenet_v1()": "takes a factory, written @name without (), not @mob",
    "Experiment.model = 'mobilenet_v1'": "takes a factory, written @name without (), not mob",
    "mobilenet_v1.num_classes = 3": "mobilenet_v1.num_classes is set by the run itself",
    "whole.augmentations = (@shift_and_rotat,)": "did you mean 'shift_and_rotate'?",
    "whole.augmentations = ('shift',)": "whole.augmentations takes",
    "Experiment.batch_size = 0": "Experiment.batch_size takes an integer of at least 1, not 0",
    "Experiment.precision = 'int8'": "Experiment.precision takes float32 or mixed_bfloat16",
    "Experiment.duration = '3 weeks'": "Experiment.duration takes a number and one of steps,",
    "Experiment.label_smoothing = 1.0": "Experiment.label_smoothing takes a share",
    "Experiment.weight_decay = 1e999": "Experiment.weight_decay takes finite numbers, not inf",
    "Experiment.seed = %A\nA = %A": "%A → %A: a macro cannot refer to itself",
    "Experiment.seed = %A\nA = (%B,)\nB = (1, %A)": "%A → %B → %A: a macro cannot refer to",
    "Experiment.seed = %lr/base\nlr/bass = 1": "%lr/base, which nothing binds; did you mean 'lr/ba",
    "Experiment.seed = %lr/base\nlr = 1": "Experiment.seed refers to %lr/base, which nothing b",
    "lr/base = 1": "nothing uses %lr/base",
    "Experiment.seed = %lr/base\nlr = 2\nlr/base = 1": "nothing uses %lr: remove the binding",
    "Experiment.weight_decay = float('nan')": "'float' is no value: take a number, 'text', (a, b)",
    "Experiment.seed = é": "'é' is no value",
    "é = 1": "not a binding of the form name.parameter = value",
    "Experiment.seed = 1\nwhat\n": "line 2: not a binding of the form name.parameter = value",
    "Experiment.eval_split = 'a\nb'": "not a binding of the form name.parameter = value",
    "Experiment.seed = (1,": "not a binding of the form name.parameter = value (EOF",
    "width": "not a binding of the form name.parameter = value",
    "include 'nowhere.gin'": "nowhere.gin",
    "import no_such_module": "no_such_module",
}


def message_of(function) -> str:
    with pytest.raises(UsageError) as error:
        function()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("binding", BAD)
def test_a_bad_binding_is_one_line(binding):
    assert BAD[binding] in message_of(lambda: config.load([DIGITS], [binding]))


@pytest.mark.parametrize("macro", ["lr/base", "a/b/c", "plain"])
def test_macros_may_have_namespaces(macro, tmp_path):
    bindings = [f"{macro} = 7", f"Experiment.seed = %{macro}"]
    experiment = config.load([DIGITS], bindings)
    assert experiment.seed == 7
    written.save(experiment, epath.Path(tmp_path))
    assert config.load_run(epath.Path(tmp_path)).seed == 7
    bindings[0] = f"{macro} = '7'"
    assert "Experiment.seed takes int" in message_of(lambda: config.load([DIGITS], bindings))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Experiment.weight_decay = float('nan')\n", "line 1: 'float' is no value"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
        ("x = é\n".encode("latin1"), "'utf-8' codec can't decode byte 0xe9"),
        (b"include '/'", "Unable to open file: /"),
    ],
)
def test_an_error_in_a_file_is_one_line(content, said, tmp_path):
    (tmp_path / "bad.gin").write_bytes(content)
    message = message_of(lambda: config.load([str(tmp_path / "bad.gin")]))
    assert message.startswith(f"{tmp_path}/bad.gin")
    assert said in message


def test_an_error_in_a_file_names_file_and_line(tmp_path):
    path = tmp_path / "bad.gin"
    path.write_text(f"include '{DIGITS}'\n\nmobilenet_v1.widht = 2\n")
    message = message_of(lambda: config.load([str(path)]))
    assert message.startswith(f"{path}, line 3: mobilenet_v1 has no parameter 'widht'")


def test_a_missing_file_is_named_with_the_nearest():
    message = message_of(lambda: config.load([DIGITS.replace("digits", "digit")]))
    assert "there is no config file" in message
    assert "did you mean 'digits.gin'?" in message


def test_what_an_experiment_needs_is_named(tmp_path):
    path = tmp_path / "short.gin"
    path.write_text("import data.digits\nExperiment.data = @digits\nExperiment.batch_size = 8\n")
    message = message_of(lambda: config.load([str(path)]))
    assert "Experiment.model" in message
    assert "Experiment.duration" in message


def test_what_the_outcome_does_not_depend_on_may_differ():
    saved = config.load([DIGITS]).written.config
    bindings = ["pipeline.max_broken = 5", "Experiment.log_every = '7 steps'"]
    assert written.differences(config.load([DIGITS], bindings), saved) == []
    assert "Experiment.log_every" in written.CHANGEABLE
    assert written.CHANGEABLE.endswith("pipeline.max_broken and Experiment.duration upwards")


@pytest.mark.parametrize(
    ("duration", "grows"),
    [("41 epochs", True), ("4e1 epochs", False), ("39 epochs", False), ("9999 steps", False)],
)
def test_a_run_may_get_longer_and_not_shorter(duration, grows, caplog):
    saved = config.load([DIGITS]).written.config
    ours = config.load([DIGITS], [f"Experiment.duration = '{duration}'"])
    differences = [f"Experiment.duration: 40 epochs there, {duration} here"]
    assert written.differences(ours, saved) == ([] if grows else differences)
    warned = [f"Experiment.duration grows from 40 epochs to {duration}: a schedule that ends "]
    assert [m[: len(warned[0])] for m in caplog.messages] == (warned if grows else [])


def test_growth_is_told_with_what_else_differs():
    saved = config.load([DIGITS]).written.config
    ours = config.load([DIGITS], ["Experiment.duration = '41 epochs'", "Experiment.seed = 1"])
    assert written.differences(ours, saved) == [
        "Experiment.duration: 40 epochs there, 41 epochs here",
        "Experiment.seed: not bound there, 1 here",
    ]


def test_a_source_alone_is_no_data():
    experiment = dataclasses.replace(config.load([DIGITS]), data=digits)
    message = message_of(lambda: tensorflow.build(experiment))
    assert message.startswith("Experiment.data takes @pipeline, with pipeline.source = @digits")


def test_a_config_that_includes_itself_is_named(tmp_path):
    path = tmp_path / "loop.gin"
    path.write_text(f"include '{path}'\n")
    assert "includes itself" in message_of(lambda: config.load([str(path)]))


def test_a_folder_is_no_config_file():
    assert "there is no config file" in message_of(lambda: config.load([str(ROOT / "configs")]))


def test_a_saved_config_that_cannot_be_read_differs():
    assert written.differences(config.load([DIGITS]), "foo bar (") == [
        "its config.gin cannot be read"
    ]


BAD_BUILDS = {
    "mobilenet_v1.image_size = 48": "mobilenet_v1 takes images of 48×48×3 and digits gives 32×32×3",
    "mobilenet_v1.num_experts = -1": "num_experts takes 0 (static) or a positive integer, not -1",
    "mobilenet_v1.first_condconv_block = 99": "first_condconv_block takes a block from 1 to 13",
    "whole.image_size = 0": "image_size takes at least 1 pixel, not 0",
    "whole.resize_method = 'cubic'": "resize takes one of legacy_bicubic, legacy_bilinear, bicubic",
    "shift_and_rotate.max_shift = -1.0": "shift_and_rotate: max_shift and max_degrees take no neg",
    "pipeline.max_broken = -1": "pipeline.max_broken takes no negative number, not -1",
    "Experiment.eval_split = 'validation'": "digits has no split 'validation'; it has minival, te",
    "Experiment.devices = 'gpus'": "Experiment.devices takes 'auto' or 'cpu:N', not 'gpus'",
    "cosine.warmup = '5 eopchs'": "cosine.warmup takes a number and one of",
    "Experiment.duration = '50 percent'": "is what percentages are of",
}


@pytest.mark.parametrize("binding", BAD_BUILDS)
def test_what_cannot_be_built_is_one_line(binding):
    experiment = config.load([DIGITS], [binding])
    assert BAD_BUILDS[binding] in message_of(lambda: tensorflow.build(experiment))


def test_a_folder_that_is_no_run_is_named(tmp_path):
    message = message_of(lambda: config.load_run(epath.Path(tmp_path)))
    assert "is not the folder of a run" in message
    (tmp_path / "config.gin").mkdir()
    message = message_of(lambda: config.load_run(epath.Path(tmp_path)))
    assert "is not the folder of a run" in message


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        tf.errors.PermissionDeniedError(None, None, "Permission denied\n\t when reading"),
    ],
)
def test_a_config_that_may_not_be_read_is_one_line(error, tmp_path, monkeypatch):
    written.save(config.load([DIGITS]), epath.Path(tmp_path))

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(type(epath.Path(tmp_path)), "is_file", refuse)
    for load in (
        lambda: config.load_run(epath.Path(tmp_path)),
        lambda: config.load([str(tmp_path / "config.gin")]),
    ):
        message = message_of(load)
        assert f"{tmp_path}/config.gin" in message
        assert "Permission denied" in message


def test_another_backend_than_tensorflow_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert "TensorFlow backend, not on jax" in message_of(backends.choose)


def test_what_is_no_path_is_named():
    assert "foo://x is no path" in message_of(lambda: config.load(["foo://x"]))


def test_a_config_of_another_folder_finds_what_it_includes(monkeypatch):
    monkeypatch.chdir(ROOT)
    config.load(["configs/digits.gin"])
    config.load(["configs/imagenet/efficientnet_b0.gin"])


def test_included_files_are_those_beside_the_config(tmp_path):
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared.gin").write_text(f"Experiment.seed = {seed}\n")
        (tmp_path / folder / f"{folder}.gin").write_text("include 'shared.gin'\n")
    for folder, seed in (("a", 1), ("b", 2), ("a", 1)):
        config.parse([str(DIGITS), str(tmp_path / folder / f"{folder}.gin")])
        assert gin.query_parameter("Experiment.seed") == seed
