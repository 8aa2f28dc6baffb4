"""What is compared in a benchmark of networks, and the processes that do it."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from condconv.engine.errors import UsageError
from condconv.tools.benchmarks.benchmark import Contender

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
_KERAS = "condconv.tools.benchmarks.contenders"
TIMM_LAYOUTS = {"timm": False, "timm, channels_last": True}
MEMORY = "memory bandwidth"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every contender does, however it does it.

    Attributes:
        mode: "infer", or "train": forward, mean softmax cross-entropy, backward, SGD.
        batch_size: images in a step.
        image_size: their height and width.
        num_classes: of the labels.
        seconds: how long a round lasts, but for its last step.
        precision: one of ``PRECISIONS``, Keras' policies.
        xla: whether XLA compiles the whole step; on JAX it always does.
        form: one of ``FORMS``, of our network and its static twin in inference: as it is trained;
            with batch norm folded into the kernels; with constants instead of variables; both.
        dynamic_batch: whether the batch is unknown when the step is compiled.
        learning_rate, momentum: of SGD. A small rate keeps all weights in the range in which
            arithmetic is fast.
    """

    mode: str
    batch_size: int
    image_size: int = 224
    num_classes: int = 1000
    seconds: float = 1.0
    precision: str = "float32"
    xla: bool = False
    form: str = "variables"
    dynamic_batch: bool = False
    learning_rate: float = 1e-3
    momentum: float = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Task):
    """Who does it.

    Attributes:
        create: "module:function" that makes a network of ours of a name.
        model: this name.
        num_experts: 0 for the static network.
        width: multiplier of its filters.
        against: which of ``AGAINST``; the static twin if None and there are experts.
        timm_python: an interpreter that has timm.
        backend: one of ``BACKENDS``.
        threads: and cores, of each contender.
    """

    create: str
    model: str
    num_experts: int
    width: float = 1.0
    against: Sequence[str] | None = None
    timm_python: str | None = None
    backend: str = "tensorflow"
    threads: int = 1

    def others(self) -> list[str]:
        """Returns what ours is compared with, in the order of ``AGAINST``."""
        wanted = set(self.against or (("static",) if self.num_experts else ()))
        if self.num_experts and "keras_applications" in wanted:
            wanted.add("static")  # keras.applications has no others to be compared with
        return [name for name in AGAINST if name in wanted]

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            UsageError: which says what to change.
        """
        for refused, reason in (*self._refusals(), *self._refused_peers()):
            if refused:
                raise UsageError(reason)

    def _refusals(self) -> Iterator[tuple[bool, str]]:
        jax, cores = self.backend == "jax", len(os.sched_getaffinity(0))
        yield (
            self.mode == "train" and self.form != "variables",
            f"--form={self.form} is one of inference: it needs --mode=infer",
        )
        yield (
            jax and "frozen" in self.form,
            f"--form={self.form} needs --backend=tensorflow: JAX has no graph to freeze",
        )
        yield jax and self.dynamic_batch, "--dynamic_batch needs --backend=tensorflow"
        yield self.threads > cores, f"--threads={self.threads} is more than the {cores} cores here"

    def _refused_peers(self) -> Iterator[tuple[bool, str]]:
        against = self.others()
        loop, timm = "official_loop" in against, "timm" in against
        applications = "keras_applications" in against
        yield (
            not self.num_experts and (loop or "static" in against),
            "--against=static and --against=official_loop need --num_experts above 0",
        )
        yield (
            loop and (self.backend == "jax" or self.dynamic_batch),
            "--against=official_loop needs --backend=tensorflow, and no --dynamic_batch",
        )
        yield (
            applications and self.model not in _APPLICATIONS,
            f"keras.applications has no {self.model}, only {', '.join(_APPLICATIONS)}",
        )
        yield (
            timm and (self.model, self.num_experts) not in _TIMM,
            f"timm has no {self.model} with {self.num_experts} experts, only "
            + ", ".join(f"{model} with {experts}" for model, experts in _TIMM),
        )
        yield (
            timm and not self.timm_python,
            f"--against=timm needs --timm_python, an interpreter of its own: {_MAKE_TIMM}",
        )
        yield (
            (timm or applications) and self.width != 1,
            "timm and keras.applications are measured at --width=1 only",
        )

    def contenders(self) -> dict[str, Contender]:
        """Returns the processes to measure, by what the table calls them."""
        build = {
            "static": lambda: {"static": self._ours(0, self.form)},
            "official_loop": self._loops,
            "keras_applications": self._applications,
            "timm": self._timms,
        }
        # This one goes first, so that nobody pays for reading the libraries from the disk.
        seconds = {"seconds": min(self.seconds, 0.5)}
        found = {MEMORY: self._keras(f"{_KERAS}:bandwidth", seconds)}
        found["ours"] = self._ours(self.num_experts, self.form)
        for name in self.others():
            found |= build[name]()
        return found

    def _ours(self, num_experts: int, form: str, replaced: str | None = None) -> Contender:
        arguments = {"name": self.model, "num_experts": num_experts, "width": self.width}
        arguments |= {"num_classes": self.num_classes, "image_size": self.image_size}
        return self._network(self.create, arguments, form, replaced)

    def _loops(self) -> dict[str, Contender]:
        module = "condconv.tools.benchmarks.official_loop"
        replacements = {
            "official loop": f"{module}:in_keras_layers",
            "official loop, our batch norm": f"{module}:in_our_layers",
        }
        return {
            name: self._ours(self.num_experts, "variables", replaced)
            for name, replaced in replacements.items()
        }

    def _applications(self) -> dict[str, Contender]:
        arguments = {"name": _APPLICATIONS[self.model], "num_classes": self.num_classes}
        arguments["image_size"] = self.image_size
        made = self._network(f"{_KERAS}:application", arguments, "variables")
        return {"keras.applications": made}

    def _network(
        self, create: str, arguments: Mapping[str, Any], form: str, replaced: str | None = None
    ) -> Contender:
        given = {"create": create, "arguments": arguments, "task": self._task(form=form)}
        given |= {"replaced": replaced, "costs": create == self.create}
        return self._keras(f"{_KERAS}:network", given)

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
                "condconv.tools.benchmarks.timm_contender:network",
                arguments | {"channels_last": channels_last},
                self.threads,
                self.timm_python,
            )
            for name, channels_last in TIMM_LAYOUTS.items()
        }

    def _task(self, **changed: Any) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(Task)
        } | changed
