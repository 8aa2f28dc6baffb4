"""What is compared in a benchmark of networks, and the processes that do it."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from condconv.engine.errors import UsageError
from condconv.tools.benchmarks.alternation import ROOT, Contender
from condconv.tools.benchmarks.contenders.workload import Workload

AGAINST = ("static", "engine", "official_loop", "keras_applications", "timm")
FORMS = ("variables", "folded", "frozen", "folded_frozen")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
BACKENDS = ("tensorflow", "jax")
_CHOICES = {"form": FORMS, "precision": PRECISIONS, "backend": BACKENDS}

_APPLICATIONS = {
    "efficientnet_b0": "EfficientNetB0",
    "mobilenet_v1": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "resnet50": "ResNet50",
}
_MAKE_TIMM = (
    "python3 -m venv timm && timm/bin/pip install torch torchvision timm, then "
    "--timm_python=timm/bin/python"
)
_LOOPS = {
    "official loop": "contenders.official_loop:in_keras_layers",
    "official loop, our batch norm": "contenders.official_loop:in_our_layers",
}
TIMM_LAYOUTS = {"timm": False, "timm, channels_last": True}
MEMORY = "memory bandwidth"
CHECKOUTS = ("this checkout", "this checkout again", "other checkout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Workload):
    """Who has to do it.

    Attributes:
        create: "module:function" that makes a network of ours of a name.
        model: this name.
        num_experts: 0 for the static network.
        width: multiplier of its filters.
        against: which of ``AGAINST``; if None, the static twin if there are experts, and the
            engine where it can be.
        against_checkout: folder of another checkout, which is compared with this one, alone.
        timm_name: what timm calls the network, if it has it.
        timm_python: an interpreter that has timm.
        backend: one of ``BACKENDS``.
        threads: and cores, of each contender.
    """

    create: str
    model: str
    num_experts: int
    width: float = 1.0
    against: Sequence[str] | None = None
    against_checkout: str | None = None
    timm_name: str | None = None
    timm_python: str | None = None
    backend: str = "tensorflow"
    threads: int = 1

    def others(self) -> list[str]:
        """Returns what ours is compared with, in the order of ``AGAINST``."""
        usual = {"static": self.num_experts, "engine": self._has_engine()}
        wanted = set(self.against or (name for name, has in usual.items() if has))
        if self.num_experts and "keras_applications" in wanted:
            wanted.add("static")  # keras.applications has no others to be compared with
        return [name for name in AGAINST if name in wanted]

    def _has_engine(self) -> bool:
        return self.mode == "train" and self.backend == "tensorflow"

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            UsageError: which says what to change.
        """
        for refusals in (self._refusals, self._refused_peers):
            for refused, reason in refusals():
                if refused:
                    raise UsageError(reason)

    def _refusals(self) -> Iterator[tuple[bool, str]]:
        jax, cores = self.backend == "jax", len(os.sched_getaffinity(0))
        given = [(name, getattr(self, name), known) for name, known in _CHOICES.items()]
        given += [("against", name, AGAINST) for name in self.against or ()]
        for name, value, known in given:
            yield value not in known, f"--{name}={value}: known are {', '.join(known)}"
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
        if self.against_checkout is not None:
            there = f"--against_checkout={self.against_checkout}"
            found = pathlib.Path(self.against_checkout, "train.py").is_file()
            yield not found, f"{there} is no checkout of this project: it has no train.py"
            yield bool(self.against), f"{there} leaves no room for --against: measure them apart"

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
            "engine" in against and not self._has_engine(),
            "--against=engine needs --mode=train and --backend=tensorflow",
        )
        yield (
            applications and self.model not in _APPLICATIONS,
            f"keras.applications has no {self.model}, only {', '.join(_APPLICATIONS)}",
        )
        yield (
            timm and not self.timm_name,
            f"timm has no {self.model} with {self.num_experts} experts",
        )
        yield (
            timm and not self.timm_python,
            f"--against=timm needs --timm_python, an interpreter of its own: {_MAKE_TIMM}",
        )
        yield (
            (timm or applications) and self.width != 1,
            "timm and keras.applications are measured at --width=1 only",
        )

    def contenders(self, folder: str) -> dict[str, Contender]:
        """Returns the processes to measure, by what the table calls them.

        Args:
            folder: empty, for what they write.
        """
        if self.against_checkout is not None:
            return self._checkouts(folder)
        build = {
            "static": lambda: {"static": self._ours("bare", 0)},
            "engine": lambda: {"engine": self._ours("in_engine")},
            "official_loop": lambda: {
                name: self._ours("bare", form="variables", replaced=replaced)
                for name, replaced in _LOOPS.items()
            },
            "keras_applications": self._applications,
            "timm": self._timms,
        }
        # This one goes first, so that nobody pays for reading the libraries from the disk.
        seconds = {"seconds": min(self.seconds, 0.5)}
        found = {MEMORY: self._keras("keras_network:bandwidth", seconds)}
        found["ours"] = self._ours("bare")
        for name in self.others():
            found |= build[name]()
        return found

    def _ours(
        self, step: str, num_experts: int | None = None, form: str | None = None, **more: Any
    ) -> Contender:
        given = {"create": self.create, "workload": self._workload(form=form or self.form)}
        arguments = self._arguments(num_experts) | {"name": self.model}
        return self._keras(f"our_network:{step}", given | {"arguments": arguments, **more})

    def _arguments(self, num_experts: int | None = None) -> dict[str, Any]:
        """Returns those of a network of ours."""
        count = self.num_experts if num_experts is None else num_experts
        arguments = {"num_experts": count, "width": self.width}
        return arguments | {"num_classes": self.num_classes, "image_size": self.image_size}

    def _applications(self) -> dict[str, Contender]:
        given = {"name": _APPLICATIONS[self.model], "workload": self._workload(form="variables")}
        return {"keras.applications": self._keras("keras_network:application", given)}

    def _timms(self) -> dict[str, Contender]:
        given = {"name": self.timm_name, "workload": self._workload(), "threads": self.threads}
        return {
            name: Contender(
                "contenders.timm_network:network",
                given | {"channels_last": channels_last},
                self.threads,
                self.timm_python,
            )
            for name, channels_last in TIMM_LAYOUTS.items()
        }

    def _checkouts(self, folder: str) -> dict[str, Contender]:
        """Returns this checkout twice, which shows what is chance, and the other one."""
        roots = (ROOT, ROOT, os.path.abspath(self.against_checkout))
        return {
            name: self._checkout(root, f"{folder}/{number}")
            for number, (name, root) in enumerate(zip(CHECKOUTS, roots, strict=True))
        }

    def _checkout(self, root: str, folder: str) -> Contender:
        given = {"arguments": self._arguments(), "workload": self._workload()}
        if self.mode == "train":
            del given["arguments"]["num_classes"]  # the data's
            given |= {"model": self.model, "folder": folder}
            return self._keras("checkout:training", given, root)
        given["arguments"]["name"] = self.model
        return self._keras("keras_network:network", given | {"create": self.create}, root)

    def _keras(self, make: str, arguments: Mapping[str, Any], root: str = ROOT) -> Contender:
        # A process may not take all memory of an accelerator: the others have theirs there too.
        environment = {
            "KERAS_BACKEND": self.backend,
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        return Contender(
            f"contenders.{make}", arguments, self.threads, root=root, environment=environment
        )

    def _workload(self, **changed: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(Workload)]
        return {name: getattr(self, name) for name in names} | changed
