"""Contenders that do nothing, or fail in one of the ways in which a contender can."""

import os
import pathlib
import signal
import time

from condconv.engine.errors import UsageError
from condconv.tools.benchmarks.worker import Made, steps


def good(images=3, log=None, name=""):
    def step():
        if log:
            with open(log, "a") as lines:
                print(name, file=lines)

    return Made({"steps": steps(step, images, 0.0)}, lambda: {"told": [images]})


def surroundings(variables):
    found = {name: os.environ.get(name) for name in variables}
    return Made(good().rounds, lambda: found | {"cores": sorted(os.sched_getaffinity(0))})


def fails():
    raise RuntimeError("first line\nsecond line")


def fails_as_keras_does():
    raise ValueError("Exception encountered when calling Conv.call().\n\n\x1b[1mthe reason\x1b[0m")


def refuses():
    raise UsageError("cannot be")


def lacks_a_module():
    import no_such_module  # noqa: F401


def runs_out_of_memory():
    raise MemoryError


def dies():
    def step():
        os.kill(os.getpid(), signal.SIGKILL)

    return {"steps": steps(step, 1, 0.0)}


def exits():
    print("last words")
    os._exit(3)


def hangs(pid_file):
    def step():
        pathlib.Path(pid_file).write_text(str(os.getpid()))
        time.sleep(600)

    return {"steps": steps(step, 1, 0.0)}
