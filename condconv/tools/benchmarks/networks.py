"""How fast a network is, beside its static twin, other formulations, libraries and checkouts."""

import dataclasses
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from condconv.tools.benchmarks.alternation import Measured, alternate, interval, ratios
from condconv.tools.benchmarks.comparison import CHECKOUTS, MEMORY, TIMM_LAYOUTS, Comparison
from condconv.tools.benchmarks.roofline import roofline, traffic

_ALSO = (("engine", "ours"), ("static", "keras.applications"))  # ratios besides those of the first


def measure(comparison: Comparison, rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measures a network against others.

    Args:
        comparison: what to measure.
        rounds: how often.
        tell: of ``alternate``.

    Returns:
        ``contenders``: rows of a table; ``conclusions``: lines; ``comparisons``, ``roofline``,
        ``rates`` (images/s of each time that counts), ``reports`` of the processes, ``machine``,
        ``asked`` (the fields of ``comparison``).

    Raises:
        UsageError: if this cannot be measured.
        RunError: if a contender fails.
    """
    comparison.check()
    tell(f"Python: {sys.executable}")
    with tempfile.TemporaryDirectory() as folder:
        measured = alternate(comparison.contenders(folder), rounds, tell)
    memory = measured.pop(MEMORY).rates["bytes"] if MEMORY in measured else None
    rates = {name: each.rates["steps"] for name, each in measured.items()}
    reports = {name: each.report for name, each in measured.items()}
    comparisons, machine = _comparisons(rates), _machine(reports)
    line = _roofline(comparison, rates, reports, statistics.median(memory)) if memory else None
    ours = next(iter(measured.values()))
    return {
        "contenders": [
            _row(name, each, ours, comparison.batch_size) for name, each in measured.items()
        ],
        "conclusions": [*_compared(comparisons), *_bounds(line), *_described(comparison, machine)],
        "comparisons": comparisons,
        "roofline": line,
        "rates": rates,
        "bytes_per_second": memory,
        "reports": reports,
        "machine": machine,
        "asked": dataclasses.asdict(comparison),
    }


def _row(name: str, it: Measured, ours: Measured, batch_size: int) -> dict[str, Any]:
    rates = it.rates["steps"]
    times = ratios(rates, ours.rates["steps"])
    first = it.report["seconds_to_first_step"]
    return {
        "contender": name,
        "ms_per_step": _round(1000 * batch_size / statistics.median(rates)),
        "images_per_second": _round(statistics.median(rates)),
        "ours_over_it": round(statistics.median(times), 3),
        "95 %": None if it is ours else _between(interval(times)),
        "peak_gb": round(_peak(it.report) / 1e9, 2),
        "ours_over_its_memory": round(_peak(ours.report) / _peak(it.report), 2),
        "first_step_s": round(first, 1),
        "ours_over_its_first_step": round(ours.report["seconds_to_first_step"] / first, 2),
    }


def _peak(report: Mapping[str, Any]) -> int:
    """Returns the most memory that was held where the network is: on an accelerator, there."""
    return report.get("device_peak_bytes") or report["peak_bytes"]


def _round(number: float) -> float:
    return float(f"{number:.4g}")


def _between(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.3f}–{ends[1]:.3f}"


def _comparisons(rates: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Returns the first over each other, and what else is told."""
    first, *others = rates
    pairs = [*((first, name) for name in others), *(p for p in _ALSO if rates.keys() >= set(p))]
    times = {(over, under): ratios(rates[under], rates[over]) for over, under in pairs}
    return [
        {"over": o, "under": u, "ratio": statistics.median(each), "interval": interval(each)}
        for (o, u), each in times.items()
    ]


def _compared(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    timms = [each for each in comparisons if each["under"] in TIMM_LAYOUTS]
    best = max(timms, key=lambda each: each["ratio"], default=None)
    lines = []
    for each in comparisons:
        pair = (each["over"], each["under"])
        if each is best or pair in _ALSO or pair[1] in CHECKOUTS:
            better = ", its better layout" if each is best else ""
            between = _between(each["interval"]) or "unknown: too few rounds"
            lines.append(f"{' over '.join(pair)}{better}: {each['ratio']:.3f}, 95 %: {between}")
    return lines


def _roofline(
    comparison: Comparison,
    rates: Mapping[str, Sequence[float]],
    reports: Mapping[str, Mapping[str, Any]],
    bandwidth: float,
) -> dict[str, Any] | None:
    if "static" not in rates:
        return None
    ours, static = reports["ours"], reports["static"]
    names = ("num_experts", "expert_weights", "mixed_weights")
    moved = traffic(comparison.mode, comparison.batch_size, *(ours[name] for name in names))
    line = roofline(
        moved,
        bandwidth,
        comparison.batch_size / statistics.median(rates["static"]),
        ours["multiply_adds"] / static["multiply_adds"],
    )
    measured = statistics.median(ratios(rates["static"], rates["ours"]))
    over = {"measured": measured, "measured_over_bound": measured / line["bound"]}
    return {"moved": moved} | line | over


def _bounds(line: Mapping[str, Any] | None) -> list[str]:
    if line is None:
        return []
    return [
        f"experts: {line['moved']['experts read'] / 1e6:,.1f} MB read, "
        f"{line['bytes'] / 1e6:,.1f} MB moved in all by a step because of them; "
        f"{1000 * line['seconds']:,.2f} ms at the {line['bandwidth'] / 1e9:,.1f} GB/s measured",
        f"over static: multiply-adds {line['multiply_adds_ratio']:.3f}, "
        f"bytes {line['bytes_bound']:.3f}, so the bound is {line['bound']:.3f}; measured "
        f"{line['measured']:.3f}, which is {line['measured_over_bound']:.3f} times the bound",
    ]


def _described(asked: Comparison, machine: Mapping[str, Any]) -> list[str]:
    """Returns what was measured, and on what."""
    step = "training step" if asked.mode == "train" else "inference"
    options = [asked.form, asked.precision, asked.backend]
    options += [name for name in ("xla", "dynamic_batch") if getattr(asked, name)]
    return [
        f"{asked.model}, {asked.num_experts} experts, width {asked.width:g}: {step} of "
        f"{asked.batch_size} × {asked.image_size}×{asked.image_size}, {asked.threads} thread"
        f"{'s' if asked.threads > 1 else ''}, {', '.join(options)}",
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        *([f"other checkout: {asked.against_checkout}"] if asked.against_checkout else []),
    ]


def _machine(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the processor, its cores, and the versions and device that contenders reported."""
    names = ("python", "tensorflow", "jax", "keras", "torch", "timm", "device")
    found = {
        name: each[name] for name in names for each in reversed(reports.values()) if name in each
    }
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), **found}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
