"""Training by a checkout of this project as a contender, driven by what every version has.

That is ``train.py``, the names that configs use, and ``metrics.jsonl``. A run goes on from round
to round and is stopped in between, so that it is started and compiled once.
"""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from .worker import Made, Refusal, peak_bytes
from .workload import Workload

_SECONDS_BETWEEN_LOOKS = 0.01
_CONFIG = """
import data.configurables
import models.configurables

Experiment.model = @{model}
Experiment.data = @pipeline
Experiment.optimizer = @momentum
Experiment.schedule = @cosine
Experiment.duration = '1e9 steps'
Experiment.batch_size = {batch_size}
Experiment.precision = '{precision}'
Experiment.xla = {xla}
Experiment.log_every = '1 steps'
Experiment.evaluate_every = '1e9 steps'
Experiment.checkpoint_every = '1e9 steps'

cosine.base_learning_rate = {learning_rate}
cosine.warmup = '0 steps'
momentum.momentum = {momentum}

pipeline.source = @synthetic
pipeline.preprocessing = @crops
synthetic.num_classes = {num_classes}
synthetic.height = {image_size}  # as small as they may be: input is not what is measured
synthetic.width = {image_size}
crops.image_size = {image_size}
"""


def training(
    model: str, arguments: Mapping[str, Any], workload: Mapping[str, Any], folder: str
) -> Made:
    """Returns the rounds of ``train.py``, of the checkout that is first on the path.

    Args:
        model: its name in a config.
        arguments: of the network, by name.
        workload: the fields of a ``Workload``.
        folder: new, for the config and the run.
    """
    config = config_of(model, arguments, workload)
    run = _Run(config, pathlib.Path(folder), Workload(**workload))
    return Made({"steps": run.round}, run.facts, lambda: run.seconds)


def config_of(model: str, arguments: Mapping[str, Any], workload: Mapping[str, Any]) -> str:
    """Returns a config of made-up photographs, which are there without a download."""
    bindings = [f"{model}.{name} = {value!r}" for name, value in arguments.items()]
    return _CONFIG.format(model=model, **workload) + "\n".join(bindings) + "\n"


class _Run:
    """A run of ``train.py``.

    Attributes:
        seconds: that its steps took, by its own clock, without those in which it was stopped.
    """

    def __init__(self, config: str, folder: pathlib.Path, work: Workload):
        folder.mkdir()
        (folder / "train.gin").write_text(config)
        self._work, self._said, self.seconds = work, folder / "said", 0.0
        flags = [f"--gin_file={folder / 'train.gin'}", f"--workdir={folder / 'run'}"]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "train.py", *flags], cwd=sys.path[0], stdout=said, stderr=said
            )
        metrics = folder / "run" / "metrics.jsonl"
        while not metrics.exists():
            self._wait()
        self._lines = metrics.open("rb")
        self._stopped = time.monotonic()

    def round(self) -> Iterator[int]:
        """Lets the run go on; yields the images of each step that began and ended in this round."""
        away = time.monotonic() - self._stopped
        self._lines.seek(0, 2)
        self._process.send_signal(signal.SIGCONT)
        try:
            # What is logged first may have been taken before the run was stopped.
            any(self._step() > 0.9 * away for _ in range(3))
            yield 0
            end = self.seconds + self._work.seconds
            while True:
                self.seconds += self._step()
                yield self._work.batch_size
                if self.seconds >= end:
                    return
        finally:
            self._process.send_signal(signal.SIGSTOP)
            self._stopped = time.monotonic()

    def _step(self) -> float:
        """Returns how long the next step takes; the first, which is compiled, is not timed."""
        while True:
            line = self._lines.readline()
            if not line.endswith(b"\n"):
                self._lines.seek(-len(line), 1)
                self._wait()
            elif rate := json.loads(line).get("images_per_second"):
                return self._work.batch_size / rate

    def _wait(self) -> None:
        if (code := self._process.poll()) is not None:
            last = self._said.read_text(errors="replace").strip().splitlines()[-1:]
            kind = Refusal if code == 2 else RuntimeError
            raise kind(f"train.py ended with exit code {code}: {''.join(last)}")
        time.sleep(_SECONDS_BETWEEN_LOOKS)

    def facts(self) -> dict[str, Any]:
        """Returns versions, and the most memory that the run has held."""
        versions = {name: metadata.version(name) for name in ("keras", "tensorflow")}
        return versions | {"peak_bytes": peak_bytes(self._process.pid)}
