"""The training loop, on tf.distribute: run k steps, look, evaluate, save, go on.

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

import tensorflow as tf
from etils import epath

from condconv.engine import checkpoints, config, files, telemetry
from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.backends.tensorflow.run import Run, build
from condconv.engine.backends.tensorflow.step import Stepper, Steps, train_batches
from condconv.engine.errors import RunError, UsageError
from condconv.engine.evaluation import Evaluator, Predictions
from condconv.engine.experiment import Experiment, failing_in_one_line
from condconv.tools.reports import report


@dataclasses.dataclass(frozen=True)
class _Place:
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

    def after(self, checkpoint: checkpoints.Checkpoint) -> "_Place":
        """Returns the place that a checkpoint was written at."""
        notes = checkpoint.notes
        return _Place(checkpoint.step, notes.skipped, notes.rollbacks, self.best)

    def notes(self, score: float | None) -> checkpoints.Notes:
        """Returns what a checkpoint must remember of this place."""
        return checkpoints.Notes(score, self.skipped, self.rollbacks)


def train(experiment: Experiment, workdir: epath.Path, tpu: str | None = None) -> int:
    """Trains from the last checkpoint in ``workdir``, or from the start, to the end.

    Args:
        experiment: as gin's config in force describes it.
        workdir: of the run; made if it is not there. Several workers share it.
        tpu: to train on, see ``devices.strategy``.

    Returns:
        The exit code: 0, or 128 + signal if one stopped the run, its state saved.

    Raises:
        UsageError: before the first step, if the config or the workdir do not allow a run.
        RunError: after it.
    """
    _check_same_experiment(workdir)
    strategy = devices.strategy(experiment.devices, tpu)
    run = build(experiment, strategy)
    if chief := devices.is_chief(strategy):
        files.make_writable(workdir, "--workdir")
    kept = _checkpoints(run, workdir)
    place = _restore(run, kept, chief)
    if chief:
        config.save(workdir)
        config.save_operative(workdir)
        files.write_json(workdir / "environment.json", telemetry.environment(experiment.seed))
    total = run.clock.total_steps
    if place.step >= total:
        print(f"{workdir} is already trained to step {place.step}", file=sys.stderr)
        return 0
    told = telemetry.Silence()
    if chief:
        told = telemetry.Telemetry(workdir, total, experiment.batch_size, place.step)
    with told, stopping_signals() as caught, _together(strategy), _writing(workdir):
        stopped = _Loop(run, kept, told, caught, chief).go(place)
    if stopped:
        print(f"stopped and saved; the same command goes on from {workdir}", file=sys.stderr)
        return 128 + (caught[0] if caught else signal.SIGTERM)
    if chief:
        report.conclude(run.model, workdir)
    return 0


def _check_same_experiment(workdir: epath.Path) -> None:
    path = workdir / "config.gin"
    if not files.is_file(path):
        if checkpoints.Checkpoints(workdir).steps():
            raise UsageError(
                f"--workdir={workdir} has checkpoints and no config.gin that says of what: restore "
                "it, or name another workdir"
            )
        return
    if differences := config.differences(files.read_text(path)):
        raise UsageError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differences)}. "
            f"Name another workdir, or remove this one (what may change: {config.CHANGEABLE})"
        )


def _checkpoints(run: Run, workdir: epath.Path) -> checkpoints.Checkpoints:
    experiment, every = run.experiment, None
    if experiment.keep_every:
        every = run.clock.period(experiment.keep_every, "Experiment.keep_every")
    return checkpoints.Checkpoints(workdir, experiment.keep_checkpoints, every)


def _restore(run: Run, kept: checkpoints.Checkpoints, chief: bool) -> _Place:
    """Takes over the last checkpoint, or what the run begins from; returns where to go on."""
    last = kept.load_last(set_aside=chief)
    devices.agreed(run.strategy, last.step if last else 0, "the step they go on from")
    if last is None:
        run.initialize()
        return _Place()
    run.restore(last)
    best = kept.best()
    return _Place(best=best[1] if best else None).after(last)


def tell(line: str) -> None:
    """Prints a line of progress to stderr, at once."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopping_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that work can be saved; a second one acts as ever."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for each, before in handlers.items():
            signal.signal(each, before)

    handlers = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


@contextlib.contextmanager
def _together(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns what TensorFlow has against a run into a RunError, a lost worker above all."""
    try:
        with failing_in_one_line():
            yield
    except RunError as error:
        if devices.workers(strategy) == 1 or not isinstance(error.__cause__, tf.errors.OpError):
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
            f"{workdir} cannot be written to ({files.reason(error)}): make room, and the same "
            "command goes on from the last checkpoint"
        ) from error


class _Loop:
    """Steps, and what is due between them.

    Args:
        run: to train.
        kept: where its checkpoints are.
        told: what it tells.
        writes: whether this worker writes the checkpoints.
        caught: signals, as they come.
    """

    def __init__(
        self,
        run: Run,
        kept: checkpoints.Checkpoints,
        told: telemetry.Telemetry | telemetry.Silence,
        caught: list[int],
        writes: bool = True,
    ):
        self._run, self._kept, self._told = run, kept, told
        self._caught, self._writes = caught, writes
        experiment = run.experiment
        self._periods = {
            name: run.clock.period(getattr(experiment, name), f"Experiment.{name}")
            for name in ("log_every", "evaluate_every", "checkpoint_every")
        }
        self._stepper = Stepper(run)
        batch_size = experiment.eval_batch_size or experiment.batch_size
        self._evaluator = Evaluator(run.model, run.data, batch_size, run.strategy)

    def go(self, place: _Place) -> bool:
        """Trains from ``place`` to the end; returns whether a signal stopped it before."""
        waiting = lambda: bool(self._stepper.waiting.numpy())  # noqa: E731
        with telemetry.Watch(self._run.experiment.stall_seconds, waiting) as watch:
            batches, window = self._batches(place), _Window(self._run)
            stopped = False
            while place.step < self._run.clock.total_steps and not stopped:
                steps = self._step(batches, place)
                if steps.bad is not None:
                    place = self._roll_back(place, steps.bad)
                    batches, window = self._batches(place), _Window(self._run)
                    continue
                place = dataclasses.replace(place, step=place.step + round(steps.sums["steps"]))
                stopped = self._stops(steps)
                window.add(steps.sums)
                watch.moved(place.step)
                place = self._after(place, window, stopped)
                watch.moved(place.step)
        return stopped

    def _batches(self, place: _Place) -> Any:
        return iter(train_batches(self._run, place.step + place.skipped))

    def _step(self, batches: Any, place: _Place) -> Steps:
        """Runs steps up to what is due next."""
        step, total = place.step, self._run.clock.total_steps
        until_due = min(period - step % period for period in self._periods.values())
        count = min(until_due, self._run.experiment.steps_per_call, total - step)
        return self._stepper(batches, step, count, place.skipped, bool(self._caught))

    def _stops(self, steps: Steps) -> bool:
        """Returns whether to stop: at once if alone, or when all workers know of it."""
        return steps.stop or (devices.workers(self._run.strategy) == 1 and bool(self._caught))

    def _after(self, place: _Place, window: "_Window", stopped: bool) -> _Place:
        """Does what is due behind ``place``; returns it with the best score so far."""
        last = place.step == self._run.clock.total_steps
        due = {name for name, period in self._periods.items() if last or not place.step % period}
        if "log_every" in due:
            self._told.record(place.step, window.close(place.step))
        with window.paused():
            score = self._evaluate(place.step) if "evaluate_every" in due else None
            better = score is not None and (place.best is None or score > place.best)
            if better:
                place = dataclasses.replace(place, best=score)
            if better or stopped or "checkpoint_every" in due:
                self._save(place, score)
        return place

    def _save(self, place: _Place, score: float | None) -> None:
        state = self._run.state()
        if not checkpoints.is_finite(state):
            raise RunError(self._not_finite("a weight", place.step))
        if self._writes:
            self._kept.save(place.step, state, place.notes(score))

    def _evaluate(self, step: int) -> float | None:
        """Evaluates raw and averaged weights, and tells; returns the score to select by.

        Without a split to select by, the reported one is evaluated to be seen, and chooses
        nothing.
        """
        selection = self._run.experiment.selection_split
        split, prefix = selection or self._run.experiment.eval_split, "val"
        prefix = "minival" if selection else prefix
        values = {}
        if self._run.average:
            values = {f"{prefix}_raw_{n}": v for n, v in self._summary(split).items()}
            del values[f"{prefix}_raw_images"]
        with self._run.averaged():
            result = self._summary(split)
        values |= {f"{prefix}_{name}": value for name, value in result.items()}
        self._told.record(step, values, notable=True)
        return result["top1"] if selection else None

    def _summary(self, split: str) -> dict[str, float | int]:
        predictions: Predictions = self._evaluator(split)
        return predictions.summary(self._run.data.num_classes)

    def _roll_back(self, place: _Place, bad: int) -> _Place:
        """Goes back to the last checkpoint, and past the batch of the step ``bad``.

        Raises:
            RunError: if there is none, or it has been done as often as the config allows.
        """
        found = self._not_finite("the loss or its gradient", bad)
        allowed = self._run.experiment.max_rollbacks
        last = self._kept.load_last() if allowed else None
        if place.rollbacks >= allowed or last is None:
            raise RunError(found)
        print(f"{found}; going back, and on behind this batch", file=sys.stderr, flush=True)
        self._run.restore(last)
        self._told.forget_after(last.step)
        return dataclasses.replace(
            place.after(last),
            skipped=bad + place.skipped + 1 - last.step,
            rollbacks=place.rollbacks + 1,
        )

    def _not_finite(self, what: str, step: int) -> str:
        rate = float(self._run.schedule(step))
        saved = self._kept.steps()[-1:]
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
        values = {
            "epoch": step * batch_size / clock.num_examples,
            **{f"train_{n}": sums[n] / sums["examples"] for n in ("loss", "top1", "objective")},
            "learning_rate": float(self._run.schedule(step)),
            "gradient_norm": sums["gradient_norm"] / sums["steps"],
        }
        if timed["examples"]:
            values["images_per_second"] = timed["examples"] / seconds
            values["input_share"] = timed["seconds_waited"] / seconds
        if self._run.loss_scale:
            values["loss_scale"] = float(self._run.loss_scale.read())
        self._open()
        return values
