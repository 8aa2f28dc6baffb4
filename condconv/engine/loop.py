"""The way of a run: take k steps, look, evaluate, save, go on; on whichever backend.

Keras' ``fit`` cannot do several workers, several steps in a call under a strategy, or a seed for
each step and replica, so the loop is our own.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from etils import epath

from condconv.engine import backends, files, telemetry, written
from condconv.engine.backends import Devices, Run, Steps
from condconv.engine.checkpoints import Checkpoint, Checkpoints, Notes, is_finite
from condconv.engine.errors import RunError, UsageError, gist, in_one_line
from condconv.engine.evaluation import in_order
from condconv.engine.experiment import Experiment
from condconv.engine.restore import initialize


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        exit_code: 0, or 128 + signal if one stopped the run, its state saved.
        model: the trained network; None where it is not, or where another worker is the chief.
    """

    exit_code: int
    model: keras.Model | None = None


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        step: steps done.
        skipped: by how many steps the data is ahead of them.
        rollbacks: how often the run went back.
        best: score of the best checkpoint so far, or None.
    """

    step: int = 0
    skipped: int = 0
    rollbacks: int = 0
    best: float | None = None

    def after(self, checkpoint: Checkpoint) -> "Position":
        """Returns the position that a checkpoint was written at."""
        notes = checkpoint.notes
        return Position(checkpoint.step, notes.skipped, notes.rollbacks, self.best)

    def notes(self, score: float | None) -> Notes:
        """Returns what a checkpoint must remember of this position."""
        return Notes(score, self.skipped, self.rollbacks)


def train(experiment: Experiment, workdir: epath.Path, tpu: str | None = None) -> Outcome:
    """Trains from the last checkpoint in ``workdir``, or from the start, to the end.

    Args:
        experiment: to train.
        workdir: of the run; made if it is not there. Several workers share it.
        tpu: to train on, see ``backends.Backend.connect``.

    Raises:
        UsageError: before the first step, if the config or the workdir do not allow a run.
        RunError: after it.
    """
    _check_same_experiment(experiment, workdir)
    backend = backends.choose()
    run = backend.build(experiment, backend.connect(experiment.devices, tpu))
    if chief := run.devices.is_chief:
        files.make_writable(workdir, "--workdir")
    checkpoints = _checkpoints_of(run, workdir)
    position = _restore(run, checkpoints)
    total = run.clock.total_steps
    if chief:
        written.save(experiment, workdir)
        environment = telemetry.environment(experiment.seed, run.devices.names)
        files.write_json(workdir / "environment.json", environment)
    if position.step >= total:
        print(f"{workdir} is already trained to step {position.step}", file=sys.stderr)
        return Outcome(0, run.model if chief else None)
    log = telemetry.Silence()
    if chief:
        log = telemetry.Telemetry(workdir, total, experiment.batch_size, position.step)
    watch = telemetry.Watch(experiment.stall_seconds, run.is_waiting)
    failing = _failing_in_one_line(run.devices)
    with log, watch, stopping_signals() as signals, failing, _writing(workdir):
        training = _Training(run, checkpoints, log, watch, position)
        while training.goes_on():
            steps = run.steps(training.batches, *training.next_steps(), bool(signals))
            training.took(steps, bool(signals))
    if training.is_stopped:
        print(f"stopped and saved; the same command goes on from {workdir}", file=sys.stderr)
        return Outcome(128 + (signals[0] if signals else signal.SIGTERM))
    return Outcome(0, run.model if chief else None)


def _check_same_experiment(experiment: Experiment, workdir: epath.Path) -> None:
    path = workdir / written.CONFIG
    if not files.is_file(path):
        if Checkpoints(workdir).steps():
            raise UsageError(
                f"--workdir={workdir} has checkpoints and no config.gin that says of what: restore "
                "it, or name another workdir"
            )
        return
    if differences := written.differences(experiment, files.read_text(path)):
        raise UsageError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differences)}. "
            f"Name another workdir, or remove this one (what may change: {written.CHANGEABLE})"
        )


def _checkpoints_of(run: Run, workdir: epath.Path) -> Checkpoints:
    experiment, every = run.experiment, None
    if experiment.keep_every:
        every = run.clock.period(experiment.keep_every, "Experiment.keep_every")
    return Checkpoints(workdir, experiment.keep_checkpoints, every)


def _restore(run: Run, checkpoints: Checkpoints) -> Position:
    """Takes over the last checkpoint, or what the run begins from; returns where to go on."""
    last = checkpoints.load_last(set_aside=run.devices.is_chief)
    run.devices.agreed(last.step if last else 0, "the step they go on from")
    if last is None:
        initialize(run)
        return Position()
    run.restore(last.state, last.name)
    best = checkpoints.best()
    return Position(best=best[1] if best else None).after(last)


@contextlib.contextmanager
def _failing_in_one_line(devices: Devices) -> Iterator[None]:
    """Turns what the machine has against a run into a RunError, a lost worker above all."""
    try:
        with in_one_line(RunError, errors=devices.failures):
            yield
    except RunError as error:
        if devices.workers == 1 or not isinstance(error.__cause__, devices.failures):
            raise
        raise RunError(
            f"the workers lost each other: {error}. Start all of them again, and they go on from "
            "the last checkpoint"
        ) from error


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    """Turns a disk that fills up between two checkpoints into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{workdir} cannot be written to ({gist(error)}): make room, and the same "
            "command goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def stopping_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that work can be saved; a second one acts as ever."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for each, before in handlers.items():
            signal.signal(each, before)

    handlers = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


class _Training:
    """What is between the calls of the backend: what to run next, and what is due behind it.

    Attributes:
        batches: to come.
        is_stopped: whether a signal stopped the run.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        log: telemetry.Telemetry | telemetry.Silence,
        watch: telemetry.Watch,
        position: Position,
    ):
        self._run, self._checkpoints, self._log, self._watch = run, checkpoints, log, watch
        self._periods = {
            name: run.clock.period(getattr(run.experiment, name), f"Experiment.{name}")
            for name in ("log_every", "evaluate_every", "checkpoint_every")
        }
        self.is_stopped = False
        self._go_on_from(position)

    def _go_on_from(self, position: Position) -> None:
        self._position, self._window = position, _Window(self._run)
        self.batches = self._run.batches(position.step + position.skipped)

    def goes_on(self) -> bool:
        """Returns whether there are steps to take."""
        return self._position.step < self._run.clock.total_steps and not self.is_stopped

    def next_steps(self) -> tuple[int, np.ndarray, int]:
        """Returns the first of the steps up to what is due next, their rates, and data skipped."""
        step, total = self._position.step, self._run.clock.total_steps
        until_due = min(period - step % period for period in self._periods.values())
        count = min(until_due, self._run.experiment.steps_per_call, total - step)
        return step, self._run.schedule(np.arange(step, step + count)), self._position.skipped

    def took(self, steps: Steps, asked_to_stop: bool) -> None:
        """Takes note of steps, and does what is due behind them."""
        if steps.bad is not None:
            self._roll_back(steps.bad)
            return
        step = self._position.step + round(steps.sums["steps"])
        self._position = dataclasses.replace(self._position, step=step)
        # At once if alone, or when all workers know of it.
        self.is_stopped = steps.stop or (self._run.devices.workers == 1 and asked_to_stop)
        self._window.add(steps.sums)
        self._watch.moved(step)
        self._do_what_is_due(step)
        self._watch.moved(step)

    def _do_what_is_due(self, step: int) -> None:
        last = step == self._run.clock.total_steps
        due = {name for name, period in self._periods.items() if last or not step % period}
        if "log_every" in due:
            self._log.record(step, self._window.close(step))
        with self._window.paused():
            score = self._evaluate(step) if "evaluate_every" in due else None
            best = self._position.best
            better = score is not None and (best is None or score > best)
            if better:
                self._position = dataclasses.replace(self._position, best=score)
            if better or self.is_stopped or "checkpoint_every" in due:
                self._save(score)

    def _save(self, score: float | None) -> None:
        step, state = self._position.step, self._run.state()
        if not is_finite(state):
            raise RunError(self._not_finite("a weight", step))
        if self._run.devices.is_chief:
            self._checkpoints.save(step, state, self._position.notes(score))

    def _evaluate(self, step: int) -> float | None:
        """Evaluates raw and averaged weights, and logs; returns the score to select by.

        Without a split to select by, the reported one is evaluated to be seen, and chooses
        nothing.
        """
        selection, values = self._run.experiment.selection_split, {}
        split = selection or self._run.experiment.eval_split
        prefix = "selection" if selection else "val"
        with self._run.averaged() as averages:
            result = self._summary(split)
        if averages:
            values = {f"{prefix}_raw_{n}": v for n, v in self._summary(split).items()}
            values.pop(f"{prefix}_raw_images", None)
        values |= {f"{prefix}_{name}": value for name, value in result.items()}
        self._log.record(step, values, notable=True)
        return self._run.task.score(result) if selection else None

    def _summary(self, split: str) -> dict[str, float | int]:
        columns = in_order(self._run.evaluator(split), self._run.data, split)
        return self._run.task.summary(columns)

    def _roll_back(self, bad: int) -> None:
        """Goes back to the last checkpoint, and past the batch of the step ``bad``.

        Raises:
            RunError: if there is none, or it has been done as often as the config allows.
        """
        found = self._not_finite("the loss or its gradient", bad)
        allowed, position = self._run.experiment.max_rollbacks, self._position
        last = self._checkpoints.load_last() if allowed else None
        if position.rollbacks >= allowed or last is None:
            raise RunError(found)
        print(f"{found}; going back, and on behind this batch", file=sys.stderr, flush=True)
        self._run.restore(last.state, last.name)
        self._log.forget_after(last.step)
        again = dataclasses.replace(
            position.after(last),
            skipped=bad + position.skipped + 1 - last.step,
            rollbacks=position.rollbacks + 1,
        )
        self._go_on_from(again)

    def _not_finite(self, what: str, step: int) -> str:
        rate = float(self._run.schedule(step))
        saved = self._checkpoints.steps()[-1:]
        return (
            f"{what} is not finite (step {step}, learning rate {rate:.4g}); "
            f"last checkpoint: {saved[0] if saved else 'none'}"
        )


class _Window:
    """What happened since the last line of the log."""

    def __init__(self, run: Run):
        self._run, self._compiled = run, False
        self._open()

    def _open(self) -> None:
        self._began = time.monotonic()
        self._sums: dict[str, float] = {}
        self._untimed = {"examples": 0.0, "seconds_waited": 0.0}

    def add(self, sums: dict[str, float]) -> None:
        """Adds what some steps came to; time counts from behind the first, which are compiled."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if not self._compiled:
            self._compiled, self._began = True, time.monotonic()
            self._untimed = {name: sums[name] for name in ("examples", "seconds_waited")}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps time that is spent on other things out of the throughput."""
        paused = time.monotonic()
        yield
        self._began += time.monotonic() - paused

    def close(self, step: int) -> dict[str, float]:
        """Returns what to log at ``step``, and begins anew."""
        batch_size, clock = self._run.experiment.batch_size, self._run.clock
        sums, seconds = self._sums, time.monotonic() - self._began
        timed = {name: sums[name] - untimed for name, untimed in self._untimed.items()}
        means = (*self._run.task.means, "objective")
        values = {
            "epoch": step * batch_size / clock.num_examples,
            **{f"train_{name}": sums[name] / sums["examples"] for name in means},
            "learning_rate": float(self._run.schedule(step)),
            "gradient_norm": sums["gradient_norm"] / sums["steps"],
        }
        if timed["examples"]:
            values["images_per_second"] = timed["examples"] / seconds
            values["input_share"] = timed["seconds_waited"] / seconds
        if self._run.loss_scale is not None:
            values["loss_scale"] = self._run.loss_scale
        self._open()
        return values
