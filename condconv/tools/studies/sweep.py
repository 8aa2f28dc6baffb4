"""Runs what is missing of a study: each row and seed as ``train.py`` and ``eval.py`` would.

Each run is a child process in a session of its own, so that Ctrl-C reaches it once, through us,
and it saves its state. A child also holds its run's lock: should this process be killed, the next
call waits for what still runs and goes on from there.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from etils import epath

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError
from condconv.engine.loop import stopping_signals
from condconv.engine.telemetry import clock
from condconv.tools.studies.study import Study, read_result, read_study, write_result
from condconv.tools.studies.table import ROOT, Row

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class _Task:
    """A row and a seed to run in ``folder``."""

    row: Row
    seed: int
    folder: epath.Path

    def __str__(self) -> str:
        return f"{self.row.name} seed {self.seed}"


@dataclasses.dataclass
class _Running:
    """A task under way: its place among the jobs, its present process and what that says."""

    task: _Task
    slot: int
    lock: int | None
    commands: collections.deque[list[str]]
    began: float
    process: subprocess.Popen | None = None
    said: Any = None


def run(study: Study, folder: epath.Path, seeds: Iterable[int], jobs: int = 1) -> int:
    """Trains and evaluates the rows of a study that have no result yet.

    Args:
        study: to run.
        folder: of it, WORKDIR/TABLE/DATASET; made if it is not there.
        seeds: of each row.
        jobs: runs at a time; the cores are divided among them.

    Returns:
        The exit code: 0; 1 if a run failed, each named on stderr; 128 + signal if one stopped it.

    Raises:
        UsageError: if the folder holds another study or cannot be written to, or a gin file of the
            table is missing.
    """
    files.make_writable(folder, "the folder of --workdir")
    _check_same_study(study, folder)
    tasks = [
        _Task(row, seed, folder / row.name / f"seed{seed}")
        for seed in seeds
        for row in study.table.rows
    ]
    for task in tasks:
        study.digest(task.row, task.seed)  # raises, before anything runs, if a gin file is missing
    study.write(folder)
    with stopping_signals() as signals:
        return _Sweep(study, tasks, jobs, signals).go()


def _check_same_study(study: Study, folder: epath.Path) -> None:
    if not files.is_file(folder / "study.json"):
        return
    there = read_study(folder).gin_params
    if there != study.gin_params:
        raise UsageError(
            f"{folder} holds runs with --gin_param {list(there)}, not {list(study.gin_params)}: "
            "repeat these, or name another workdir"
        )


class _Sweep:
    """Tasks on their way.

    Args:
        study: they are of.
        tasks: all of it, done or not.
        jobs: runs at a time.
        signals: that ask it to stop, as they come.
    """

    def __init__(self, study: Study, tasks: list[_Task], jobs: int, signals: list[int]):
        self._study, self._jobs, self._signals = study, jobs, signals
        self._total = len(tasks)
        self._waiting = [task for task in tasks if not self._is_done(task)]
        self._running: list[_Running] = []
        self._elsewhere: set[_Task] = set()
        self._failed: dict[_Task, str] = {}
        self._seconds: list[float] = []
        self._skipped = self._total - len(self._waiting)

    def go(self) -> int:
        """Runs all tasks; returns the exit code."""
        if self._skipped:
            _tell(f"{self._skipped} of {self._total} are done already")
        try:
            while (self._waiting or self._running) and not self._signals:
                self._start_some()
                time.sleep(_POLL_SECONDS)
                self._look()
        finally:
            self._stop()
        if self._signals:
            _tell(f"stopped with {self._done()} of {self._total} done; the same command goes on")
            return 128 + self._signals[0]
        for task, reason in self._failed.items():
            _tell(f"failed: {task}: {reason}")
        return 1 if self._failed else 0

    def _is_done(self, task: _Task) -> bool:
        path = task.folder / "result.json"
        if not files.is_file(path):
            return False
        try:
            read_result(self._study, path)
        except UsageError as error:
            _tell(f"{task}: its result {error}; running it again")
            return False
        return True

    def _done(self) -> int:
        return self._total - len(self._waiting) - len(self._running) - len(self._failed)

    def _start_some(self) -> None:
        """Starts waiting tasks while there are free places; leaves those that others are at."""
        for task in list(self._waiting):
            if len(self._running) >= self._jobs:
                return
            try:
                lock = _lock(task.folder)
            except BlockingIOError:
                if task not in self._elsewhere:
                    _tell(f"{task}: another process is at it; waiting for that one")
                self._elsewhere.add(task)
                continue
            self._waiting.remove(task)
            if task in self._elsewhere and self._is_done(task):
                _unlock(lock)
            else:
                self._start(task, lock)

    def _start(self, task: _Task, lock: int | None) -> None:
        slot = min({*range(self._jobs)} - {running.slot for running in self._running})
        running = _Running(task, slot, lock, self._commands(task), time.monotonic())
        self._running.append(running)
        _tell(f"{task}: begins")
        self._next_command(running)

    def _commands(self, task: _Task) -> collections.deque[list[str]]:
        file, bindings = self._study.gin(task.row, task.seed)
        config = [f"--gin_file={file}", *(f"--gin_param={binding}" for binding in bindings)]
        commands = (("train.py", config), ("eval.py", []))
        return collections.deque(
            [sys.executable, str(ROOT / script), f"--workdir={task.folder}", *flags]
            for script, flags in commands
        )

    def _next_command(self, running: _Running) -> None:
        running.said = tempfile.TemporaryFile()  # noqa: SIM115  closed when the process has ended
        running.process = subprocess.Popen(
            running.commands.popleft(),
            stdin=subprocess.DEVNULL,
            stdout=running.said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if running.lock is None else (running.lock,),
        )
        _pin(running.process.pid, running.slot, self._jobs)

    def _look(self) -> None:
        """Goes on with the tasks whose process has ended."""
        for running in list(self._running):
            if (code := running.process.poll()) is None:
                continue
            said = _all_of(running.said)
            if code == 0 and running.commands:
                self._next_command(running)
                continue
            self._running.remove(running)
            self._end(running, code, said)

    def _end(self, running: _Running, code: int, said: str) -> None:
        task, seconds = running.task, time.monotonic() - running.began
        try:
            if code:
                files.write_text(task.folder / "output.log", said)
                raise RunError(_reason(code, said))
            write_result(self._study, task.row, task.seed, task.folder, seconds)
            result = read_result(self._study, task.folder / "result.json")
        except (RunError, UsageError) as error:
            self._failed[task] = str(error)
            _tell(f"{task}: failed: {error}")
        else:
            self._seconds.append(seconds)
            _tell(
                f"{task}: top-1 {result.metrics['top1']:.4f} after {clock(seconds)}; "
                f"{self._done()} of {self._total} done, {self._remaining()}"
            )
        finally:
            _unlock(running.lock)

    def _remaining(self) -> str:
        left = len(self._waiting) + len(self._running)
        if not left:
            return "none left"
        mean = sum(self._seconds) / len(self._seconds)
        return f"about {clock(mean * left / self._jobs)} left"

    def _stop(self) -> None:
        """Stops what runs, once, and waits until it has saved."""
        for running in self._running:
            running.process.send_signal(signal.SIGTERM)
        for running in self._running:
            running.process.wait()
            running.said.close()
            _unlock(running.lock)


def _lock(folder: epath.Path) -> int | None:
    """Takes a run's lock, which children inherit; returns None on an object store, which has none.

    Raises:
        BlockingIOError: if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "://" in str(folder):
        return None
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _pin(process: int, slot: int, jobs: int) -> None:
    """Gives a process its share of the cores, before it has any threads."""
    cores = sorted(os.sched_getaffinity(0))
    if 1 < jobs <= len(cores):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process, cores[slot::jobs])


def _all_of(said: Any) -> str:
    """Returns what a process said, and closes its file."""
    with said:
        said.seek(0)
        return said.read().decode(errors="replace")


def _reason(code: int, said: str) -> str:
    """Returns the last line that a process said, and what ended it if that was a signal."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code > 0 and lines:
        return lines[-1]
    ended = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    return f"{ended}; {lines[-1] if lines else 'nothing said'}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
