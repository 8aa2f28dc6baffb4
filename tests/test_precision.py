"""Half the bits, the same accuracy: paired seeds on real digits."""

import numpy as np
import pytest
from etils import epath

from condconv.engine import config, evaluation
from condconv.engine import loop as training

SEEDS = range(5)
T = 2.776  # of Student's distribution with 4 degrees of freedom, at 97.5 %
BINDINGS = ("Experiment.duration = '16 epochs'", "Experiment.evaluate_every = '16 epochs'")


def top1(folder: epath.Path, precision: str, seed: int) -> float:
    bindings = (*BINDINGS, f"Experiment.precision = '{precision}'", f"Experiment.seed = {seed}")
    experiment = config.load(["configs/digits_condconv.gin"], bindings)
    workdir = folder / f"{precision}_{seed}"
    assert training.train(experiment, workdir).exit_code == 0
    return evaluation.evaluate_run(experiment, workdir)["top1"]


@pytest.mark.slow
def test_half_precision_costs_no_accuracy(tmp_path):
    folder = epath.Path(tmp_path)
    names = ("float32", "mixed_bfloat16", "mixed_float16")
    found = {name: [top1(folder, name, seed) for seed in SEEDS] for name in names}
    print(found)
    for name in names[1:]:
        differences = 100 * (np.array(found[name]) - np.array(found["float32"]))
        spread = T * differences.std(ddof=1) / np.sqrt(len(SEEDS))
        assert differences.mean() + spread > -0.5, found
    assert min(found["float32"]) > 0.8
