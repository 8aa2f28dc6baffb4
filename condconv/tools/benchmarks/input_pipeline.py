"""How fast a config's input is: stage by stage, beside PIL, on one core and on two."""

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from condconv.engine import config
from condconv.engine.errors import UsageError
from condconv.engine.experiment import build_data
from condconv.tools.benchmarks.alternation import Contender, alternate, ratios

_HERE = "condconv.tools.benchmarks.input_pipeline:of_config"


def of_config(
    gin_files: Sequence[str], bindings: Sequence[str], function: str, batch_size: int
) -> Any:
    """Calls "module:function" with a config's data, training split and a batch size."""
    experiment = config.load(gin_files, bindings)
    data = build_data(experiment, experiment.train_split)
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(data, experiment.train_split, batch_size)


def measure(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    batch_size: int,
    count: int,
    accelerator_rate: float,
    tell: Callable[[str], None],
    ours: str,
    pil: str,
) -> dict[str, Any]:
    """Measures the input that a config describes.

    Args:
        gin_files, bindings: the config.
        batch_size: images in a batch.
        count: how often each is measured.
        accelerator_rate: images per second that the input should reach.
        tell: of ``alternate``.
        ours: module that has rounds of our ``stages`` and ``recipes``, and ``inputs`` for PIL.
        pil: module that has rounds of the same in PIL.

    Returns:
        ``stages``, ``compared``: rows of a table; ``conclusions``: lines.

    Raises:
        UsageError, RunError: as ``alternate``.
    """

    def contender(function: str, cores: int = 1) -> Contender:
        given = {"gin_files": gin_files, "bindings": bindings, "batch_size": batch_size}
        return Contender(_HERE, given | {"function": f"{ours}:{function}"}, cores)

    inputs = of_config(gin_files, bindings, f"{ours}:inputs", batch_size)
    measured = alternate(
        {
            "stages": contender("stages"),
            "pil": Contender(f"{pil}:rounds", inputs),
            "one": contender("recipes"),
            "two": contender("recipes", cores=2),
        },
        count,
        tell,
    )
    rates = {name: each.rates for name, each in measured.items()}
    stages = _stages(rates["stages"])
    return {
        "stages": stages,
        "compared": _compared(rates["pil"] | rates["one"], rates["two"]),
        "conclusions": _conclusions(stages, accelerator_rate),
    }


def _stages(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns what each stage takes, as the difference from those before it."""
    milliseconds = {name: 1000 / statistics.median(each) for name, each in rates.items()}
    whole, rows, before = list(milliseconds.values())[-1], [], 0.0
    for name, taken in milliseconds.items():
        own = max(taken - before, 0.0)
        rows.append(
            {
                "stage": name,
                "images_per_second": round(1000 / taken),
                "ms_per_image": round(own, 3),
                "percent": round(100 * own / whole),
            }
        )
        before = max(taken, before)
    return rows


def _compared(one: dict[str, list[float]], two: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns rates on one core, over the first of them (PIL's), and on two cores over one."""
    base = next(iter(one.values()))
    return [
        {
            "on one core": name,
            "images_per_second": round(statistics.median(each)),
            "over_pil": _ratio(each, base),
            "two_cores_over_one": _ratio(two[name], each) if name in two else None,
        }
        for name, each in one.items()
    ]


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return round(statistics.median(ratios(over, under)), 2)


def _conclusions(stages: list[dict[str, Any]], accelerator_rate: float) -> list[str]:
    slowest = max(stages, key=lambda row: row["ms_per_image"])
    rate = stages[-1]["images_per_second"]
    if not rate:
        raise UsageError("the input is too slow to be measured: take a smaller --batch_size")
    return [
        f"the limit is the stage {slowest['stage']!r}: {slowest['percent']} % of the time",
        f"{accelerator_rate:,.0f} images/s would need {math.ceil(accelerator_rate / rate)} cores "
        f"like this one, at {rate:,} images/s each",
    ]
