"""The recipes on ImageNet: they parse, cost what they say, and follow the published schedules."""

import dataclasses
import inspect
import math
import pathlib
import re
import subprocess
import sys

import gin
import keras
import numpy as np
import pytest

from condconv import count_cost
from condconv.engine import config
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment
from data.autoaugment import auto_augment
from data.mixing import mixup
from models import MODELS, create_model
from models.blocks import Stage, bottleneck
from models.network import Network
from models.paper import PAPER

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
IMAGENET = CONFIGS / "imagenet"
SHARED = ("imagenet", "paper", "proxy", "efficientnet", "kornblith", "modern", "modern_rmsprop")
OVERLAYS = ("plain", "mixing")
ENTRIES = sorted(path for path in CONFIGS.rglob("*.gin") if path.stem not in {*SHARED, *OVERLAYS})
RECIPES = [path.stem for path in ENTRIES if path.parent == IMAGENET]
MODERN = [name for name in RECIPES if name.endswith("_modern")]
ROWS = [name for name in RECIPES if name not in MODERN]

IMAGES = 1_281_167
COST = re.compile(r"([\d,]+) multiply-adds and ([\d,]+) parameters")


def load(name: str, *bindings: str) -> Experiment:
    return config.load([str(IMAGENET / f"{name}.gin")], bindings)


def bound(parameter: str) -> object:
    return gin.query_parameter(parameter)


def model_of(experiment: Experiment) -> str:
    return experiment.model.__name__


def rates(experiment: Experiment, epochs: list[float], images: int = IMAGES) -> np.ndarray:
    clock = experiment.clock(images)
    schedule = experiment.schedule(clock=clock)
    per_epoch = images / experiment.batch_size
    return np.array([float(schedule(math.ceil(epoch * per_epoch))) for epoch in epochs])


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_every_config_parses_without_data_and_says_how_to_run_it(path):
    text = path.read_text()
    command = f"python train.py --gin_file={path.relative_to(CONFIGS.parent)}"
    assert command in text
    assert f"--workdir=runs/{path.stem}\n" in text
    assert "Reproduces " in text or path.parent == CONFIGS
    config.load([str(path)])


def test_there_is_a_row_for_every_trained_network_of_the_paper_with_its_numbers():
    found = {}
    for name in ROWS:
        model = model_of(load(name))
        try:
            num_experts = bound(f"{model}.num_experts")
        except ValueError:
            num_experts = 0
        found[model, num_experts] = (IMAGENET / f"{name}.gin").read_text()
    trained = {(row.model, row.num_experts): row for row in PAPER if row.top1}
    assert set(found) == set(trained)
    for key, row in trained.items():
        assert f"{row.multiply_adds:,} M multiply-adds, {row.top1} % top-1" in found[key]


def test_every_network_has_a_modern_recipe_but_the_deeper_variant_which_shares_one():
    models = {model_of(load(name)) for name in MODERN}
    assert models == {*MODELS} - {"efficientnet_b0_depth"}
    deeper = load("efficientnet_b0_modern", "Experiment.model = @efficientnet_b0_depth")
    assert model_of(deeper) == "efficientnet_b0_depth"


@pytest.mark.parametrize("name", ROWS)
def test_plain_takes_autoaugment_and_mixup_away(name):
    load(name)
    assert [each.configurable.wrapped for each in bound("crops.augmentations")] == [auto_augment]
    assert bound("pipeline.mixing").configurable.wrapped is mixup
    config.load([str(IMAGENET / f"{each}.gin") for each in (name, "plain")])
    assert bound("crops.augmentations") == ()
    assert bound("pipeline.mixing") is None


def test_what_the_rows_leave_to_defaults_is_what_they_say():
    defaults = inspect.signature(auto_augment).parameters, inspect.signature(mixup).parameters
    assert defaults[0]["variant"].default == "published"
    assert (defaults[1]["alpha"].default, defaults[1]["pairing"].default) == (0.2, "official")
    momentum = {
        name: inspect.signature(factory).parameters["batch_norm_momentum"].default
        for name, factory in MODELS.items()
    }
    slow = ("efficientnet_b0", "efficientnet_b0_depth", "mnasnet_a1")
    assert momentum == {name: 0.99 if name in slow else 0.9 for name in MODELS}


@pytest.mark.parametrize("name", MODERN)
def test_modern_recipes_take_experts_and_mixing(name):
    model = name.removesuffix("_modern")
    files = [str(IMAGENET / f"{each}.gin") for each in (name, "mixing")]
    config.load(files, [f"{model}.num_experts = 8"])
    assert bound(f"{model}.num_experts") == 8
    assert bound("rand_augment.variant") == "corrected"


def test_efficientnet_follows_the_official_schedule():
    experiment = load("efficientnet_b0_condconv8")
    assert experiment.clock(IMAGES).total_steps == 218_949
    got = rates(experiment, [0, 2.5, 5, 7.3, 349.9])
    stairs = [0.97 ** math.floor(epoch / 2.4) for epoch in (5, 7.3, 349.9)]
    wanted = 0.128 * np.array([0, 0.5, *stairs])
    np.testing.assert_allclose(got, wanted, rtol=1e-3)
    assert (experiment.weight_decay, experiment.ema_decay) == (1e-5, 0.9999)
    assert bound("classification.label_smoothing") == 0.1
    assert experiment.precision == "mixed_bfloat16"


def test_mnasnet_follows_the_official_schedule():
    experiment = load("mnasnet_a1")
    assert abs(experiment.clock(IMAGES).total_steps - 437_898) <= 1
    np.testing.assert_allclose(rates(experiment, [5]), 0.064 * 0.97**2, rtol=1e-3)
    assert bound("crops.resize_method") == "legacy_bilinear"
    assert experiment.precision == "float32"


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2_condconv8", "resnet50_condconv8"])
def test_kornblith_rises_to_1_6_and_falls_by_a_fortieth_every_epoch(name):
    experiment = load(name)
    got = rates(experiment, [0, 5, 10, 100.5])
    wanted = 1.6 * np.array([0, 0.5, 0.975**10, 0.975**100])
    np.testing.assert_allclose(got, wanted, rtol=2e-3)
    assert experiment.ema_decay == 0
    assert experiment.optimizer(learning_rate=0.1).nesterov


@pytest.mark.parametrize(
    ("name", "peak"), [("resnet50_modern", 0.5), ("mobilenet_v1_modern", 0.064)]
)
def test_modern_cosines_end_at_zero(name, peak):
    experiment = load(name)
    got = rates(experiment, [2.5, 300, 600])
    np.testing.assert_allclose(got, peak * np.array([0.5, 0.5, 0]), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_batch_scales_the_learning_rate_and_keeps_the_epochs(name):
    first = load(name)
    epochs = [3.0, 40.5]
    before = rates(first, epochs)
    second = load(name, "Experiment.batch_size = 256")
    after = rates(second, epochs)
    np.testing.assert_allclose(after / before, 256 / first.batch_size, rtol=2e-3)
    assert second.duration == first.duration
    assert first.duration.endswith("epochs")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_header_has_the_cost_of_the_network(name):
    costs = COST.findall((IMAGENET / f"{name}.gin").read_text())
    model = model_of(load(name))
    variants = [(), (f"{model}.num_experts = 8",)] if name in MODERN else [()]
    for bindings, stated in zip(variants, costs, strict=True):
        cost = count_cost(load(name, *bindings).model(num_classes=1000))
        assert stated == (f"{cost.multiply_adds:,}", f"{cost.parameters:,}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "mnasnet_a1", "resnet50", *MODERN])
def test_the_input_of_a_recipe_runs_on_made_up_photographs(name):
    data = load(name).data(stand_in=True)
    (batch,) = data.train_batches("train", batch_size=8, seed=0).take(1)
    assert batch["image"].shape == (8, 224, 224, 3)
    mixed = name in ROWS or name == "resnet50_modern"
    assert batch["label"].shape == ((8, 1000) if mixed else (8,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Network):
    """Has one conditional residual block."""

    name = "small"
    stages = (Stage(block=bottleneck, repeats=1, filters=8, expansion=4),)
    stem_filters = 8

    num_classes: int = 3
    num_experts: int = 4
    image_size: int | None = 16


def test_dropped_experts_have_no_weight_and_the_others_more(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    model = Small(expert_dropout=0.25).build()
    layers = ("block1_routing", "block1_expert_dropout")
    routing = keras.Model(model.input, [model.get_layer(layer).output for layer in layers])
    weights, used = (np.asarray(each) for each in routing(images, training=True))
    kept = used != 0
    np.testing.assert_allclose(used[kept], weights[kept] / 0.75, rtol=1e-6)
    assert 0.65 < kept.mean() < 0.85
    assert len(np.unique(kept, axis=0)) > 4  # drawn for each example and expert

    weights, used = (np.asarray(each) for each in routing(images, training=False))
    np.testing.assert_array_equal(used, weights)
    logits = np.asarray(model(images))
    without = Small().build()
    for ours, theirs in zip(without.weights, model.weights, strict=True):
        ours.assign(theirs)
    np.testing.assert_array_equal(np.asarray(without(images)), logits)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("block1_expert_dropout").rate == 0.25
    np.testing.assert_array_equal(np.asarray(loaded(images)), logits)


TINY = {"width": 0.1, "num_classes": 3, "image_size": 32, "num_experts": 4}


def test_the_convolutions_of_a_block_of_resnet_share_the_draw():
    model = create_model("resnet50", **TINY, expert_dropout=0.25)
    for block, parts in ((14, ("reduce", "conv", "expand", "shortcut")), (16, ("reduce", "conv"))):
        dropped = model.get_layer(f"block{block}_expert_dropout").output
        for part in parts:
            layer = model.get_layer(f"block{block}_{part}")
            assert layer.input[1] is dropped


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="expert_dropout takes a probability"):
        create_model("resnet50", **TINY, expert_dropout=rate)


@pytest.mark.parametrize("width", [0, -1.0, math.nan])
@pytest.mark.parametrize("name", MODELS)
def test_impossible_widths_are_refused(name, width):
    with pytest.raises(ValueError, match="^width takes a number above 0, not"):
        create_model(name, width=width)


def test_impossible_depths_are_refused():
    with pytest.raises(ValueError, match="^depth takes a number above 0, not 0$"):
        create_model("efficientnet_b0", depth=0)


def test_a_config_binds_what_a_network_can_have():
    with pytest.raises(UsageError, match="mobilenet_v1 has no parameter 'survival'"):
        load("mobilenet_v1_condconv8", "mobilenet_v1.survival = 0.9")
    with pytest.raises(UsageError, match="mobilenet_v1.num_classes is set by the run itself"):
        load("mobilenet_v1_condconv8", "mobilenet_v1.num_classes = 9")


NETWORKS = ("efficientnet_b0", "mnasnet_a1", "mobilenet_v1", "mobilenet_v2", "resnet50")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["condconv8", "modern"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_recipe_passes_a_dry_run(network, recipe):
    done = subprocess.run(
        [
            *(sys.executable, "train.py", "--dry_run"),
            f"--gin_file=configs/imagenet/{network}_{recipe}.gin",
        ],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "imagenet2012" in done.stdout
    assert "expected duration" in done.stdout
