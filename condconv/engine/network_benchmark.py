"""How fast a network is, beside its static twin, the authors' formulation and other libraries."""

import dataclasses
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from condconv.engine.benchmark import Contender, Measured, alternate, interval
from condconv.engine.errors import UsageError

AGAINST = ("static", "official_loop", "keras_applications", "timm")
FORMS = ("variables", "folded", "frozen", "folded_frozen")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
BACKENDS = ("tensorflow", "jax")

_APPLICATIONS = {
    "efficientnet_b0": "EfficientNetB0",
    "mobilenet_v1": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "resnet50": "ResNet50",
}
_TIMM = {
    ("efficientnet_b0", 0): "tf_efficientnet_b0",
    ("efficientnet_b0", 4): "tf_efficientnet_cc_b0_4e",
    ("efficientnet_b0", 8): "tf_efficientnet_cc_b0_8e",
    ("efficientnet_b0_depth", 0): "tf_efficientnet_b1",
    ("efficientnet_b0_depth", 8): "tf_efficientnet_cc_b1_8e",
    ("mobilenet_v1", 0): "mobilenetv1_100",
    ("mobilenet_v2", 0): "mobilenetv2_100",
    ("mnasnet_a1", 0): "semnasnet_100",
    ("resnet50", 0): "resnet50",
}
_MAKE_TIMM = (
    "python3 -m venv timm && timm/bin/pip install torch torchvision timm, then "
    "--timm_python=timm/bin/python"
)
_KERAS = "condconv.engine.contenders"
_TIMM_LAYOUTS = {"timm": False, "timm, channels_last": True}
_MEMORY = "memory bandwidth"
_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to measure.

    Attributes:
        mode: "infer" or "train".
        create: "module:function" that makes a network of a name.
        model: this name.
        num_experts: 0 for the static network.
        against: which of ``AGAINST``; the static twin if None and there are experts.
        timm_python: an interpreter that has timm.
        backend, precision, form: one of ``BACKENDS``, ``PRECISIONS``, ``FORMS``.
        batch_size, image_size, num_classes, width: of images and network.
        threads: and cores, of each contender.
        seconds: that a round lasts, but for its last step.
        xla: whether XLA compiles the whole step.
        dynamic_batch: whether the batch is unknown when a step is compiled.
    """

    mode: str
    create: str
    model: str
    num_experts: int
    against: Sequence[str] | None = None
    timm_python: str | None = None
    backend: str = "tensorflow"
    precision: str = "float32"
    form: str = "variables"
    batch_size: int = 1
    image_size: int = 224
    num_classes: int = 1000
    width: float = 1.0
    threads: int = 1
    seconds: float = 1.0
    xla: bool = False
    dynamic_batch: bool = False

    def others(self) -> list[str]:
        """Returns what ours is compared with, in the order of ``AGAINST``."""
        named = self.against or (("static",) if self.num_experts else ())
        wanted = {*named, *(("static",) if self._wants_static(named) else ())}
        return [name for name in AGAINST if name in wanted]

    def _wants_static(self, named: Sequence[str]) -> bool:
        """keras.applications has static networks only, to be compared with a static one of ours."""
        return bool(self.num_experts) and "keras_applications" in named

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            UsageError: which says what to change.
        """
        against, jax = self.others(), self.backend == "jax"
        timm, applications = "timm" in against, "keras_applications" in against
        loop = "official_loop" in against
        twin = _TIMM.get((self.model, self.num_experts))
        refusals = (
            (
                not self.num_experts and ("static" in against or loop),
                "--against=static and --against=official_loop need --num_experts above 0",
            ),
            (
                applications and self.model not in _APPLICATIONS,
                f"keras.applications has no {self.model}, only {', '.join(_APPLICATIONS)}",
            ),
            (
                timm and twin is None,
                f"timm has no {self.model} with {self.num_experts} experts, only "
                + ", ".join(f"{model} with {experts}" for model, experts in _TIMM),
            ),
            (
                timm and not self.timm_python,
                f"--against=timm needs --timm_python, an interpreter of its own: {_MAKE_TIMM}",
            ),
            (
                (timm or applications) and self.width != 1,
                "timm and keras.applications are measured at --width=1 only",
            ),
            (loop and jax, "--against=official_loop needs --backend=tensorflow"),
            (
                loop and self.dynamic_batch,
                "--against=official_loop needs a batch of known size: leave --dynamic_batch out",
            ),
            (jax and self.dynamic_batch, "--dynamic_batch needs --backend=tensorflow"),
            (
                self.mode == "train" and self.form != "variables",
                f"--form={self.form} is one of inference: it needs --mode=infer",
            ),
            (
                jax and "frozen" in self.form,
                f"--form={self.form} needs --backend=tensorflow: JAX has no graph to freeze",
            ),
            (
                self.threads > len(os.sched_getaffinity(0)),
                f"--threads={self.threads}: there are {len(os.sched_getaffinity(0))} cores",
            ),
        )
        for refused, reason in refusals:
            if refused:
                raise UsageError(reason)

    def contenders(self) -> dict[str, Contender]:
        """Returns the processes to measure, by what the table calls them."""
        build = {
            "static": lambda: {"static": self._ours(0)},
            "official_loop": self._loops,
            "keras_applications": self._applications,
            "timm": self._timms,
        }
        found = {"ours": self._ours(self.num_experts)}
        for name in self.others():
            found |= build[name]()
        memory = {"seconds": min(self.seconds, 0.5)}
        return found | {_MEMORY: self._keras(f"{_KERAS}:bandwidth", memory)}

    def _ours(self, num_experts: int, **options: Any) -> Contender:
        arguments = {"name": self.model, "num_experts": num_experts, "width": self.width}
        arguments |= {"num_classes": self.num_classes, "image_size": self.image_size}
        return self._network(self.create, arguments, **options)

    def _loops(self) -> dict[str, Contender]:
        module = "condconv.engine.official_loop"
        return {
            "official loop": self._ours(self.num_experts, remake=f"{module}:of_network"),
            "official loop, our batch norm": self._ours(
                self.num_experts, remake=f"{module}:with_our_layers"
            ),
        }

    def _applications(self) -> dict[str, Contender]:
        arguments = {"name": _APPLICATIONS[self.model], "num_classes": self.num_classes}
        arguments["image_size"] = self.image_size
        made = self._network(f"{_KERAS}:application", arguments)
        return {"keras.applications": made}

    def _network(self, create: str, arguments: Mapping[str, Any], **options: Any) -> Contender:
        given = {"create": create, "arguments": dict(arguments), "task": self._task()}
        if create != self.create or options:
            given["task"]["form"] = "variables"
        return self._keras(f"{_KERAS}:network", given | options)

    def _keras(self, make: str, arguments: Mapping[str, Any]) -> Contender:
        # A process may not take all memory of an accelerator: the others have theirs there too.
        environment = {
            "KERAS_BACKEND": self.backend,
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        return Contender(make, arguments, self.threads, environment=environment)

    def _timms(self) -> dict[str, Contender]:
        arguments = {"name": _TIMM[self.model, self.num_experts], "task": self._task()}
        arguments["threads"] = self.threads
        return {
            name: Contender(
                "condconv.engine.timm_contender:network",
                arguments | {"channels_last": channels_last},
                self.threads,
                self.timm_python,
            )
            for name, channels_last in _TIMM_LAYOUTS.items()
        }

    def _task(self) -> dict[str, Any]:
        names = ("mode", "batch_size", "image_size", "num_classes", "seconds", "precision")
        names += ("xla", "form", "dynamic_batch")
        return {name: getattr(self, name) for name in names}


def measure(comparison: Comparison, rounds: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Measures a network against others.

    Args:
        comparison: what to measure.
        rounds: how often.
        told: of ``alternate``.

    Returns:
        ``contenders``: rows of a table; ``conclusions``: lines; ``comparisons``, ``roofline``,
        ``rates`` (images/s of each time that counts), ``reports`` of the processes, ``machine``,
        ``asked`` (the fields of ``comparison``).

    Raises:
        UsageError: if this cannot be measured.
        RunError: if a contender fails.
    """
    comparison.check()
    measured = alternate(comparison.contenders(), rounds, told)
    (memory,) = measured.pop(_MEMORY).rates.values()
    rates = {name: each.rates["steps"] for name, each in measured.items()}
    reports = {name: each.report for name, each in measured.items()}
    comparisons = _comparisons(rates)
    line = _roofline(comparison, rates, reports, statistics.median(memory))
    return {
        "contenders": [
            _row(name, each, measured["ours"], comparison.batch_size)
            for name, each in measured.items()
        ],
        "conclusions": [*_compared(comparisons), *_bounds(line)],
        "comparisons": comparisons,
        "roofline": line,
        "rates": rates,
        "bytes_per_second": memory,
        "reports": reports,
        "machine": _machine(reports),
        "asked": dataclasses.asdict(comparison),
    }


def _times(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Returns how many times as long one took as the other, round by round, from their rates."""
    return [b / a for a, b in zip(over, under, strict=True)]


def _row(name: str, it: Measured, ours: Measured, batch_size: int) -> dict[str, Any]:
    rates, memory = it.rates["steps"], _peak(it.report) / _peak(ours.report)
    times = _times(ours.rates["steps"], rates)
    first = it.report["seconds_to_first_step"]
    return {
        "contender": name,
        "ms_per_step": _round(1000 * batch_size / statistics.median(rates)),
        "images_per_second": _round(statistics.median(rates)),
        "ours_over_it": round(statistics.median(times), 3),
        "95 %": _between(interval(times)),
        "peak_gb": round(_peak(it.report) / 1e9, 2),
        "ours_over_its_memory": round(1 / memory, 2),
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
    """Returns ours over each other, the static twin over keras.applications, and timm's best."""
    pairs = [("ours", name) for name in rates if name != "ours"]
    if {"static", "keras.applications"} <= rates.keys():
        pairs.append(("static", "keras.applications"))
    found = []
    for over, under in pairs:
        times = _times(rates[over], rates[under])
        found.append(
            {
                "over": over,
                "under": under,
                "ratio": statistics.median(times),
                "interval": interval(times),
            }
        )
    return found


def _compared(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    timms = [each for each in comparisons if each["under"] in _TIMM_LAYOUTS]
    lines = []
    for each in comparisons:
        if each["over"] == "static" or (timms and each is max(timms, key=lambda t: t["ratio"])):
            better = ", its better layout" if each in timms else ""
            between = _between(each["interval"]) or "unknown: too few rounds"
            lines.append(
                f"{each['over']} over {each['under']}{better}: {each['ratio']:.3f}, 95 %: {between}"
            )
    return lines


def traffic(
    mode: str, batch_size: int, num_experts: int, expert_weights: int, mixed_weights: int
) -> dict[str, int]:
    """Returns the bytes that a step moves because of its experts, in float32, by what moves them.

    With P weights of an expert, n experts and a batch of B, of which M of the P weights are mixed
    into a kernel for each example (a dense layer mixes its outputs instead):

    ============================================  ======  =========================
    what                                          bytes   when
    ============================================  ======  =========================
    experts, read to be mixed                     4·n·P   always
    mixed kernels, written and read               8·B·M   B > 1, or training
    mixed kernels, read for the input's gradient  4·B·M   training
    their gradients, written, read twice          12·B·M  training: routing, experts
    experts, read for the routing's gradient      4·n·P   training
    experts' gradients, written                   4·n·P   training
    optimizer: weight, gradient and momentum      20·n·P  training: 3 read, 2 written
    ============================================  ======  =========================

    The mixed kernel of a single image stays in the cache. For several images it may as well, so
    that a network can be a little faster than a bound made of this.

    Args:
        mode: "infer" or "train".
        batch_size: images in a step, B.
        num_experts: n.
        expert_weights: of one expert over all layers, P.
        mixed_weights: M.
    """
    experts = _FLOAT32_BYTES * num_experts * expert_weights
    mixed = _FLOAT32_BYTES * batch_size * mixed_weights
    moved = {"experts read": experts}
    if mode == "train" or batch_size > 1:
        moved["mixed kernels written and read"] = 2 * mixed
    if mode == "train":
        moved |= {
            "mixed kernels read for the input's gradient": mixed,
            "gradients of mixed kernels written, read twice": 3 * mixed,
            "experts read for the routing's gradient": experts,
            "gradients of experts written": experts,
            "optimizer": 5 * experts,
        }
    return moved


def roofline(
    moved: Mapping[str, int], bandwidth: float, static_seconds: float, multiply_adds_ratio: float
) -> dict[str, float]:
    """Returns by how much a network has to be slower than its static twin.

    Args:
        moved: of ``traffic``.
        bandwidth: of the memory, in bytes per second.
        static_seconds: that a step of the static twin takes.
        multiply_adds_ratio: of the network's multiply-adds over its twin's.

    Returns:
        ``bytes``, the ``seconds`` that they need, ``bytes_bound`` = 1 + these over the twin's,
        ``multiply_adds_ratio``, and ``bound``, the larger one.
    """
    total = sum(moved.values())
    seconds = total / bandwidth
    bytes_bound = 1 + seconds / static_seconds
    return {
        "bytes": total,
        "bandwidth": bandwidth,
        "seconds": seconds,
        "multiply_adds_ratio": multiply_adds_ratio,
        "bytes_bound": bytes_bound,
        "bound": max(bytes_bound, multiply_adds_ratio),
    }


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
    measured = statistics.median(_times(rates["ours"], rates["static"]))
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


def _machine(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the processor, its cores, and the versions and device that contenders reported."""
    names = ("python", "tensorflow", "jax", "keras", "torch", "timm", "device")
    told = {
        name: each[name] for name in names for each in reversed(reports.values()) if name in each
    }
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), **told}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
