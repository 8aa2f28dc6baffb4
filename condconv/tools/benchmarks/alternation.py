"""Alternated timings: each contender in a process of its own, pinned to its cores, in turn.

Ratios taken within one such run hold where absolute times do not: whatever slows the machine down
for a while slows all contenders.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

import condconv
from condconv.engine.errors import RunError, UsageError, gist

ROOT = str(pathlib.Path(condconv.__file__).parents[1])
_CODE = "import sys; sys.path[:0] = {}; from contenders.worker import serve; serve({})"

# Where ``contenders`` is a package of its own, which imports no ``condconv``.
_PACKAGES = str(pathlib.Path(__file__).parent)

# As ``command.keep_freed_memory`` has it, so that it holds from the start and for any interpreter.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}
_OUT_OF_MEMORY = re.compile(
    "out of memory|oom when|allocate memory|resource ?exhausted|memoryerror"
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A process that offers rounds.

    Attributes:
        make: "module:function", which returns the rounds by name, or ``contenders.worker.Made``.
        arguments: of the function, by name.
        cores: how many the process may use, and how many threads it shall.
        python: the interpreter; this one if None.
        root: of the checkout whose packages are imported.
        environment: variables to set.
    """

    make: str
    arguments: Mapping[str, Any]
    cores: int = 1
    python: str | None = None
    root: str = ROOT
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What became of a contender.

    Attributes:
        rates: images per second, by round, for each time that counts.
        report: ``peak_bytes`` of its process, ``seconds_to_first_step`` from the start of the
            process, its ``python``, and what else it says of itself.
    """

    rates: dict[str, list[float]]
    report: dict[str, Any]


def alternate(
    contenders: Mapping[str, Contender],
    rounds: int,
    tell: Callable[[str], None] = lambda progress: None,
) -> dict[str, Measured]:
    """Runs every round of every contender once, then again in the opposite order, and so on.

    A time that is not counted goes before: for each contender as soon as it is made, and the next
    one is made after it, so that nothing else runs while it starts.

    Args:
        contenders: by name.
        rounds: how often.
        tell: called with what has begun or is done, in words.

    Returns:
        What was measured, by contender.

    Raises:
        UsageError: if the machine has fewer cores than a contender wants, or has no such
            interpreter.
        RunError: if a contender fails.
    """
    with contextlib.ExitStack() as stack:
        workers = _started(contenders, stack, tell)
        rates = {name: {each: [] for each in workers[name].names} for name in workers}
        turns = [(name, each) for name, worker in workers.items() for each in worker.names]
        for done in range(rounds):
            for name, each in turns if done % 2 == 0 else reversed(turns):
                rates[name][each].append(workers[name].ask(each))
            tell(f"measured {done + 1} of {rounds} times")
        return {name: Measured(rates[name], workers[name].ask(None)) for name in workers}


def _started(
    contenders: Mapping[str, Contender], stack: contextlib.ExitStack, tell: Callable[[str], None]
) -> "dict[str, _Worker]":
    """Starts contenders one after the other, each when the one before has run its rounds once."""
    available, workers = sorted(os.sched_getaffinity(0)), {}
    for name, contender in contenders.items():
        if contender.cores > len(available):
            raise UsageError(f"{name} wants {contender.cores} cores; there are {len(available)}")
    for name, contender in contenders.items():
        tell(f"starting {name}")
        workers[name] = _Worker(name, contender, available[: contender.cores], stack)
        for each in workers[name].names:
            workers[name].ask(each)
    return workers


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Returns round by round how often one rate is the other: how much longer that one takes."""
    return [a / b for a, b in zip(over, under, strict=True)]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Returns two of the values between which the median lies, whatever its distribution.

    Of n independent values, those below the median are binomial with n and 1/2; so the k-th
    smallest and the k-th largest enclose it with probability 1 − 2·P(fewer than k below).

    Args:
        values: independent measurements of one thing.
        confidence: with which the interval shall hold at least.

    Returns:
        The narrowest such interval; None of too few values (six are enough for 95 %).
    """
    count, ordered = len(values), sorted(values)
    outside, smallest = 0.0, None
    for k in range(count // 2 + 1):
        outside += 2 * math.comb(count, k) / 2**count
        if outside > 1 - confidence:
            break
        smallest = k
    return None if smallest is None else (ordered[smallest], ordered[-1 - smallest])


class _Worker:
    """A contender's process, seen from here. It ends with ``stack`` at the latest.

    Attributes:
        names: of its rounds.
    """

    def __init__(
        self, name: str, contender: Contender, cores: list[int], stack: contextlib.ExitStack
    ):
        self._name = name
        self._said = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with theirs:
            started = time.time()
            self._process = _start(name, contender, theirs.fileno(), self._said)
        stack.callback(self._end)
        self._connection = stack.enter_context(Connection(ours.detach()))
        order = (contender.make, dict(contender.arguments), cores, started)
        self.names = self.ask(order)

    def ask(self, order: Any) -> Any:
        """Sends an order and returns the answer.

        Raises:
            UsageError, RunError: as the contender says, or because it died.
        """
        try:
            self._connection.send(order)
            kind, answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise RunError(f"{self._name}: {self._death()}") from None
        if kind == "done":
            return answer
        kinds = {"refused": UsageError, "failed": RunError}
        raise kinds[kind](f"{self._name}: {_reason(kind, *answer)}")

    def _end(self) -> None:
        """Ends the process, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _death(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "its process was killed; it may have run out of memory"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"its process died, exit code {code}: {''.join(last) or 'it said nothing'}"


def _reason(kind: str, error: str, said: str) -> str:
    """Returns in one line why a contender has failed, or refuses."""
    if _OUT_OF_MEMORY.search(f"{error}: {said}".lower()):
        return "out of memory: take a smaller --batch_size or --image_size"
    line = gist(Exception(said)) if said else ""
    return line if kind == "refused" else f"{error}: {line}"


def _start(name: str, contender: Contender, connection: int, said: IO[bytes]) -> subprocess.Popen:
    """Starts a contender's process, in a session of its own: Ctrl-C is this process' business."""
    python = contender.python or sys.executable
    try:
        return subprocess.Popen(
            [python, "-c", _CODE.format([contender.root, _PACKAGES], connection)],
            env=_environment(contender),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=[connection],
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(
            f"{name}: {python} is no Python interpreter that can be run: {error.strerror}"
        ) from error


def _environment(contender: Contender) -> dict[str, str]:
    """Returns all variables; another interpreter sees no packages of this one's."""
    threads = dict.fromkeys(_THREADS, str(contender.cores))
    settings = {**_MALLOC, **threads, "TF_CPP_MIN_LOG_LEVEL": "3", **contender.environment}
    hidden = {"PYTHONPATH"} if contender.python else set()
    return {name: os.environ[name] for name in os.environ.keys() - hidden} | settings
