"""What a run tells: a live line, ``metrics.jsonl``, TensorBoard, ``environment.json``."""

import json
import math
import pathlib
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import rich.console
import rich.progress
import rich.table
from etils import epath
from tensorboard import summary

from condconv.engine import files

_METRICS = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0


class Telemetry:
    """Records what happens in a run, and shows it on stderr.

    On a terminal there is one live line. Elsewhere there is a plain line for each evaluation,
    and one every ten seconds in between.
    """

    def __init__(self, workdir: epath.Path, total_steps: int, examples_per_step: int, start: int):
        self._file = workdir / _METRICS
        self._total, self._examples = total_steps, examples_per_step
        self._writer = summary.Writer(str(workdir / "tensorboard"))
        self.forget_after(start)
        self._last_line = time.monotonic()
        self._rate = 0.0
        console = rich.console.Console(stderr=True)
        self._live = None
        if console.is_terminal:
            self._live = rich.progress.Progress(
                rich.progress.TimeRemainingColumn(table_column=rich.table.Column(min_width=7)),
                rich.progress.TextColumn("left  {task.description}"),
                console=console,
            )
            self._task = self._live.add_task("starting", total=total_steps, completed=start)

    def __enter__(self) -> "Telemetry":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.close()
        if self._live:
            self._live.stop()

    def record(self, step: int, values: Mapping[str, float], notable: bool = False) -> None:
        """Writes one object to ``metrics.jsonl`` and TensorBoard, and shows it.

        Args:
            step: done.
            values: by name.
            notable: whether to print a line even where nobody watches live.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._show(step, values, notable)

    def _show(self, step: int, values: Mapping[str, float], notable: bool) -> None:
        self._rate = values.get("images_per_second", self._rate)
        text = f"step {step}/{self._total}  {_brief(values)}"
        if self._live:
            if notable:
                self._live.console.print(text, highlight=False)
            description = {} if notable else {"description": text}
            self._live.update(self._task, completed=step, **description)
            return
        now = time.monotonic()
        if notable or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._total - step) * self._examples / self._rate if self._rate else None
            left = "" if left is None else f"  {clock(left)} left"
            print(f"{text}{left}", file=sys.stderr, flush=True)

    def forget_after(self, step: int) -> None:
        """Drops lines behind the checkpoint that the run goes on from: they will come again."""
        if not self._file.exists():
            return
        lines = [line for line in _lines(self._file) if _step_of(line) <= step]
        files.write_text(self._file, "".join(f"{line}\n" for line in lines))


class Silence:
    """The telemetry of a worker that leaves it to another one."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: Any) -> None:
        """Does nothing."""

    def record(self, step: int, values: Mapping[str, float], notable: bool = False) -> None:
        """Does nothing."""

    def forget_after(self, step: int) -> None:
        """Does nothing."""


class Watch:
    """Says what a run is waiting for when no step ends for a while; once for each such wait."""

    def __init__(self, seconds: float, waiting: Callable[[], bool]):
        self._seconds, self._waiting = seconds, waiting
        self._step, self._end = 0, threading.Event()
        self._moved = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        self._moved.set()
        self._thread.join()

    def moved(self, step: int) -> None:
        """Takes note that ``step`` has been reached."""
        self._step = step
        self._moved.set()

    def _look(self) -> None:
        while not self._end.is_set():
            self._moved.clear()
            if self._moved.wait(self._seconds):
                continue
            what = "input: no batch has come" if self._waiting() else "the devices: no step ended"
            print(
                f"step {self._step}: waiting for {what} for {self._seconds:g} s",
                file=sys.stderr,
                flush=True,
            )
            self._moved.wait()


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """Returns the objects of ``metrics.jsonl``, in order, without half a line of a killed run."""
    lines = _lines(workdir / _METRICS)
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def environment(seed: int, devices: Sequence[str]) -> dict[str, Any]:
    """Returns what else could explain a result: versions, devices, commit, seed."""
    packages = ("condconv", "keras", "tensorflow", "tensorflow-datasets", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "devices": list(devices),
        "commit": _commit(),
        "seed": seed,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = pathlib.Path(__file__).parents[2]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _lines(path: epath.Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed


def _brief(values: Mapping[str, float]) -> str:
    """Returns what a person wants to see of some values, in one line of a terminal."""
    shown = ("epoch", "loss", "top1", "learning_rate", "images_per_second")
    formats = ("epoch {:.1f}", "loss {:.3f}", "top1 {:.4f}", "lr {:.2g}", "{:,.0f} images/s")
    texts = [
        (prefix if prefix != "train_" else "").replace("_", " ") + text.format(values[key])
        for name, text in zip(shown, formats, strict=True)
        for prefix in ("", "train_", "selection_", "val_")
        if (key := prefix + name) in values
    ]
    return "  ".join(texts)


def clock(seconds: float) -> str:
    """Returns a duration as people read it, "1:05" or "1:00:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
