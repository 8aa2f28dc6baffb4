"""Alternated timings: each contender in a process of its own, pinned to its cores, in turn.

Ratios taken within one such run hold where absolute times do not: whatever slows the machine down
for a while slows all contenders.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from condconv.engine.errors import RunError, UsageError

# Of a contender: begins a round; the first yield starts the clock, each next one counts images.
Rounds = Mapping[str, Callable[[], Iterator[int]]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A process that offers rounds.

    Attributes:
        make: "module:function", which returns the rounds by name.
        arguments: of the function, by name.
        cores: how many the process may use.
        tensorflow: whether to load it, without its greeting.
    """

    make: str
    arguments: Mapping[str, Any]
    cores: int = 1
    tensorflow: bool = True


def alternate(
    contenders: Mapping[str, Contender],
    rounds: int,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, list[float]]]:
    """Runs every round of every contender once, then again, and so on.

    Args:
        contenders: by name.
        rounds: how often; the first time is not counted.
        told: called with how many times are done, and of how many.

    Returns:
        Images per second, by contender and round.

    Raises:
        UsageError: if the machine has fewer cores than a contender wants.
        RunError: if a contender fails.
    """
    available = sorted(os.sched_getaffinity(0))
    for name, contender in contenders.items():
        if contender.cores > len(available):
            raise UsageError(f"{name} wants {contender.cores} cores; there are {len(available)}")
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(contender, available[: contender.cores]))
            for name, contender in contenders.items()
        }
        names = {name: _answer(worker) for name, worker in workers.items()}
        rates = {name: {each: [] for each in names[name]} for name in workers}
        for done in range(rounds + 1):
            for name, each in ((n, e) for n in workers for e in names[n]):
                workers[name].send(each)
                rate = _answer(workers[name])
                if done:
                    rates[name][each].append(rate)
            told(done, rounds)
    return rates


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Returns the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@contextlib.contextmanager
def _worker(contender: Contender, cores: list[int]) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, contender, cores), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.terminate()
        process.join()


def _answer(worker: Connection) -> Any:
    try:
        answer = worker.recv()
    except EOFError:
        raise RunError("a process of the benchmark died: it may have run out of memory") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, contender: Contender, cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    try:
        rounds = _make(contender)
        connection.send(list(rounds))
        while True:
            connection.send(_rate(rounds[connection.recv()]))
    except EOFError:
        return
    except UsageError as error:
        connection.send(error)
    except Exception as error:  # told by the parent, in one line
        connection.send(RunError(f"{contender.make}: {str(error).splitlines()[0]}"))


def _make(contender: Contender) -> Rounds:
    from condconv.engine import command

    if contender.tensorflow:
        command.keep_freed_memory()
        with command.quiet_tensorflow():
            import tensorflow  # noqa: F401
    module, function = contender.make.split(":")
    return getattr(importlib.import_module(module), function)(**contender.arguments)


def _rate(begin: Callable[[], Iterator[int]]) -> float:
    images, done = begin(), 0
    next(images)
    start = end = time.perf_counter()
    for count in images:
        done, end = done + count, time.perf_counter()
    return done / (end - start)  # without what it takes to close a round
