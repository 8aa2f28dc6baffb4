"""A contender's side of a benchmark: makes its rounds, and runs one whenever it is asked to.

This file needs the standard library only. What it says goes through a connection, as JSON: objects
of its libraries would not arrive. stdout and stderr are a file.
"""

import importlib
import json
import os
import platform
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# Begins a round; the first yield starts the clock, each next one counts images.
Round = Callable[[], Iterator[int]]
Rounds = Mapping[str, Round]


class Refusal(Exception):
    """What other flags would cure, as ``condconv.engine.errors.UsageError``."""

    exit_code = 2


class Made(NamedTuple):
    """What a contender is made of.

    Attributes:
        rounds: by name.
        facts: called when all is measured; what there is to say about the contender.
        clock: that rounds are timed by, in seconds.
    """

    rounds: Rounds
    facts: Callable[[], Mapping[str, Any]] = dict
    clock: Callable[[], float] = time.perf_counter


def steps(step: Callable[[], object], images: int, seconds: float) -> Round:
    """Returns a round that repeats a step for so long, and at least once.

    Args:
        step: returns when its result is there.
        images: that it counts for.
        seconds: after which no further step begins.
    """

    def begin() -> Iterator[int]:
        yield 0  # the clock starts here
        end = time.perf_counter() + seconds
        while True:
            step()
            yield images
            if time.perf_counter() >= end:
                return

    return begin


def serve(descriptor: int) -> None:
    """Answers the parent until it is gone.

    It sends where to find the contender, on which cores, and when the process was started; then
    the name of a round at a time, and None at last.

    Args:
        descriptor: of the connection to the parent.
    """
    connection = Connection(descriptor)
    orders = _listen(connection)
    try:
        make, arguments, cores, started = orders.get()
        os.sched_setaffinity(0, cores)
        made = _make(make, arguments)
        _say(connection, "done", list(made.rounds))
        first = None
        while (name := orders.get()) is not None:
            rate, after_first = _rate(made.rounds[name], made.clock)
            first = first or after_first
            _say(connection, "done", rate)
        report = {"peak_bytes": peak_bytes(), "seconds_to_first_step": first - started}
        report["python"] = platform.python_version()
        _say(connection, "done", report | dict(made.facts()))
    except ImportError as error:
        said = f"{sys.executable} cannot import what it needs: {error}"
        _say(connection, "refused", ["ImportError", said])
    except BaseException as error:  # told by the parent, in one line
        kind = "refused" if getattr(error, "exit_code", None) == 2 else "failed"
        _say(connection, kind, [type(error).__name__, str(error)])


def _say(connection: Connection, kind: str, what: Any) -> None:
    connection.send_bytes(json.dumps([kind, what]).encode())


def _listen(connection: Connection) -> "queue.SimpleQueue[Any]":
    """Reads all orders ahead: so the end of the parent is noticed, and shared, at any time."""
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                orders.put(connection.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # what it has started too

    threading.Thread(target=listen, daemon=True).start()
    return orders


def _make(make: str, arguments: Mapping[str, Any]) -> Made:
    module, function = make.split(":")
    made = getattr(importlib.import_module(module), function)(**arguments)
    return made if isinstance(made, Made) else Made(made)


def _rate(begin: Round, clock: Callable[[], float]) -> tuple[float, float]:
    """Returns images per second, and the time of day after the first step."""
    images, done, first = begin(), 0, None
    next(images)
    start = end = clock()
    for count in images:
        done, end = done + count, clock()
        first = first or time.time()
    return done / (end - start), first  # without what it takes to close a round


def peak_bytes(process: int | str = "self") -> int:
    """Returns the most memory that a process has held.

    Not ru_maxrss where there is better: it begins with what the process that started this one
    held.
    """
    try:
        with open(f"/proc/{process}/status") as status:
            (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
        return int(peak) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
