"""Experiments need nothing of gin's state once loaded, and say what they were made from."""

import dataclasses
import functools
import pathlib

import gin
import keras
import numpy as np
import pytest
from etils import epath
from tiny_runs import experiment, same, state

from condconv.engine import config, loop, written
from condconv.engine.errors import UsageError

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.gin")
LITTLE = (
    "Experiment.duration = '2 steps'",
    "Experiment.selection_split = None",
    "Experiment.batch_size = 8",
    "mobilenet_v1.width = 0.01",
)


@gin.register
def shelf(books: tuple, label: str = "none") -> tuple:
    return (label, *(book() if callable(book) else book for book in books))


@gin.register
def book(title: str = "untitled", pages: int = 0) -> tuple[str, int]:
    return title, pages


@pytest.fixture
def loaded(tmp_path):
    """A function of bindings to what an experiment's data factory, a shelf, gives."""
    (tmp_path / "shelf.gin").write_text(
        "Experiment.model = @book\nExperiment.optimizer = @book\nExperiment.schedule = @book\n"
        "Experiment.duration = '1 steps'\nExperiment.batch_size = 1\n"
    )
    return lambda *bindings: config.load([str(tmp_path / "shelf.gin")], bindings).data


@pytest.mark.parametrize(
    ("bindings", "found"),
    [
        (("Experiment.data = @shelf", "shelf.books = (1, 2)"), ("none", 1, 2)),
        (("Experiment.data = @shelf", "shelf.books = (%N,)", "N = 3"), ("none", 3)),
        (
            ("Experiment.data = @top/shelf", "shelf.books = (@book,)", "top/shelf.label = 'top'",
             "book.pages = 7", "top/book.title = 'here'"),
            ("top", ("here", 7)),
        ),
        (
            ("Experiment.data = @a/b/shelf", "shelf.books = (@c/book(), @book())",
             "a/book.pages = 1", "a/b/book.pages = 2", "c/book.title = 'c'"),
            ("none", ("c", 0), ("untitled", 2)),
        ),
        (
            ("Experiment.data = %SHELF", "SHELF = @shelf", "shelf.books = (%BOOK, %BOOK)",
             "BOOK = @x/book()", "x/book.title = 'x'"),
            ("none", ("x", 0), ("x", 0)),
        ),
    ],
    ids=["literal", "macro", "scope", "nested scopes", "macro of a reference"],
)  # fmt: skip
def test_a_frozen_factory_gives_what_gin_would(loaded, bindings, found):
    factory = loaded(*bindings)
    wrapper = gin.get_bindings("Experiment")["data"]
    assert wrapper() == found
    with gin.unlock_config():
        gin.clear_config()
    assert factory() == found
    assert factory(books=()) == found[:1]
    assert factory((), label="own") == ("own",)


def test_a_binding_in_a_scope_that_is_inherited_counts_as_used(loaded):
    bindings = ("Experiment.data = @top/shelf", "shelf.books = (@book,)")
    loaded(*bindings, "top/book.pages = 1")
    with pytest.raises(UsageError, match="nothing uses bottom/book.pages"):
        loaded(*bindings, "bottom/book.pages = 1")


def test_two_experiments_of_one_process_keep_apart(tmp_path):
    one = config.load([DIGITS], [*LITTLE, "Experiment.seed = 1"])
    two = config.load([DIGITS], [*LITTLE, "Experiment.seed = 2", "mobilenet_v1.num_experts = 2"])
    folders = [epath.Path(tmp_path) / name for name in ("one", "two")]
    for each, folder in zip((one, two), folders, strict=True):
        assert loop.train(each, folder).exit_code == 0
    texts = [(f / "config.gin").read_text() + (f / "operative_config.gin").read_text()
             for f in folders]  # fmt: skip
    assert [t.count("Experiment.seed = 1") for t in texts] == [2, 0]
    assert [t.count("mobilenet_v1.num_experts = 2") for t in texts] == [0, 2]
    assert "mobilenet_v1.num_experts = 0" in texts[0]  # a default
    assert "block6_routing/kernel" not in str(state(folders[0]).keys())
    assert any("routing" in name for name in state(folders[1]))
    for each, folder in zip((one, two), folders, strict=True):
        again = config.load_run(folder)
        assert again.written == each.written or again.written.config == each.written.config


def test_an_experiment_of_python_trains_and_says_what_it_cannot_write(tmp_path, caplog):
    workdir = epath.Path(tmp_path) / "run"
    assert loop.train(experiment(duration="2 steps"), workdir).exit_code == 0
    text = (workdir / "config.gin").read_text()
    assert "Experiment.duration = '2 steps'" in text
    assert "# Experiment.model: network, of Python" in text
    assert "Experiment.model and Experiment.data and Experiment.optimizer and" in caplog.text
    with pytest.raises(UsageError, match="the config leaves out what an experiment needs: Exp"):
        config.load_run(workdir)
    with pytest.raises(UsageError, match="Experiment.batch_size: 8 there, 4 here"):
        loop.train(experiment(duration="2 steps", batch_size=4), workdir)


def test_a_change_in_python_is_part_of_what_is_written(tmp_path):
    changed = dataclasses.replace(config.load([DIGITS], ["Experiment.seed = 1"]), seed=2)
    written.save(changed, epath.Path(tmp_path))
    assert config.load_run(epath.Path(tmp_path)).seed == 2
    assert written.differences(config.load([DIGITS], ["Experiment.seed = 2"]),
                               (tmp_path / "config.gin").read_text()) == []  # fmt: skip


ADAMW = (*LITTLE, "Experiment.optimizer = @AdamW", "AdamW.weight_decay = 0.05")


def test_an_optimizer_of_keras_trains_and_resumes_to_the_same_bits(tmp_path):
    whole, parts = (epath.Path(tmp_path) / name for name in ("whole", "parts"))
    longer = (
        *ADAMW,
        "Experiment.schedule = @schedules.constant",
        "schedules.constant.warmup = '0 steps'",
    )
    longer = (*longer, "Experiment.checkpoint_every = '2 steps'")
    no_cosine = tmp_path / "plain.gin"
    lines = pathlib.Path(DIGITS).read_text().splitlines()
    no_cosine.write_text("\n".join(line for line in lines if not line.startswith("cosine.")))
    four = config.load([str(no_cosine)], [*longer, "Experiment.duration = '4 steps'"])
    assert loop.train(four, whole).exit_code == 0
    assert loop.train(config.load([str(no_cosine)], longer), parts).exit_code == 0
    assert loop.train(four, parts).exit_code == 0
    assert "AdamW.weight_decay = 0.05" in (whole / "config.gin").read_text()
    assert same(state(whole), state(parts))
    assert any(name.startswith("optimizer/adamw/") for name in state(whole))


def test_decay_of_an_optimizer_of_keras_spares_batch_norm(tmp_path):
    kernel, gamma = "model/conv/kernel", "model/bn/gamma"
    final = {}
    for decay in (0.0, 0.5):
        adamw = functools.partial(keras.optimizers.AdamW, weight_decay=decay, name="adamw")
        run = experiment(optimizer=adamw, duration="2 steps", weight_decay=0.0)
        workdir = epath.Path(tmp_path) / str(decay)
        assert loop.train(run, workdir).exit_code == 0
        final[decay] = state(workdir)
    assert not np.array_equal(final[0.0][kernel], final[0.5][kernel])
    assert np.abs(final[0.0][gamma] - final[0.5][gamma]).max() < 1e-2


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        ("Experiment.optimizer = @AdamV", "unknown name 'AdamV'; did you mean 'Adam"),
        ("Experiment.optimizer = @LossScaleOptimizer", "the engine scales losses itself"),
        ("Experiment.optimizer = @MultiOptimizer", "one optimizer for all of its weights"),
        ("Experiment.optimizer = @ScheduleFreeAdamW", "cannot be a run's optimizer"),
        ("AdamW.use_ema = True", "AdamW.use_ema is the engine's own matter: set Experiment.ema_d"),
        ("AdamW.clipnorm = 1.0", "set Experiment.clip_norm"),
        ("AdamW.gradient_accumulation_steps = 2", "set Experiment.accumulation_steps"),
        ("AdamW.loss_scale_factor = 2.0", "set Experiment.precision = 'mixed_float16'"),
        ("AdamW.learning_rate = 1.0", "AdamW.learning_rate is set by the run itself"),
        ("AdamW.weight_decai = 1.0", "has no parameter 'weight_decai'; did you mean 'weight_deca"),
        ("AdamW.beta_1 = '0.9'", "AdamW.beta_1 takes float, not '0.9', of type str"),
        ("AdamW.amsgrad = 1", "AdamW.amsgrad takes bool, not 1, of type int"),
    ],
)
def test_what_an_optimizer_of_keras_cannot_be_given(binding, says):
    with pytest.raises(UsageError) as error:
        config.load([DIGITS], [*ADAMW, binding])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda rate: keras.optimizers.Adam(rate, use_ema=True), "Adam.use_ema is the engine's"),
        (
            lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(rate)),
            "LossScaleOptimizer cannot be",
        ),
    ],
)
def test_an_optimizer_of_python_is_refused_alike(make, says, tmp_path):
    wanted = experiment(optimizer=lambda learning_rate: make(learning_rate))
    with pytest.raises(UsageError, match=says):
        loop.train(wanted, epath.Path(tmp_path) / "run")


def test_a_smoothing_of_an_older_config_is_the_tasks(tmp_path):
    old, new = (
        config.load([DIGITS], [f"{name}.label_smoothing = 0.1"])
        for name in ("Experiment", "classification")
    )
    assert written.differences(new, old.written.config) == []
    with pytest.raises(UsageError, match="classification.label_smoothing takes float"):
        config.load([DIGITS], ["classification.label_smoothing = 'much'"])
