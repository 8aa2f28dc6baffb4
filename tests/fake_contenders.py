"""Contenders that do nothing, or fail in one of the ways in which a contender can."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from contenders.worker import Made, Refusal, steps  # as it is called where these are made


def good(images=3, log=None, name=""):
    def step():
        if log:
            with open(log, "a") as lines:
                print(name, file=lines)

    return Made({"steps": steps(step, images, 0.0)}, lambda: {"counted": [images]})


def surroundings(variables):
    found = {name: os.environ.get(name) for name in variables}
    found |= {"path": sys.path[:2], "cores": sorted(os.sched_getaffinity(0))}
    return Made(good().rounds, lambda: found)


def timed_by_itself():
    """Two images in each of its own seconds."""
    now = [0.0]

    def begin():
        yield 0
        for _ in range(3):
            now[0] += 1.0
            yield 2

    return Made({"steps": begin}, clock=lambda: now[0])


def fails():
    raise RuntimeError("first line\nsecond line")


def fails_as_keras_does():
    raise ValueError("Exception encountered when calling Conv.call().\n\n\x1b[1mthe reason\x1b[0m")


def refuses():
    raise Refusal("cannot be\n  because")


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
    """Waits for ever, as does what it has started; writes all pids, its parent's first."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    child.send_signal(signal.SIGSTOP)

    def step():
        pathlib.Path(pid_file).write_text(f"{os.getppid()} {os.getpid()} {child.pid}\n")
        time.sleep(600)

    return {"steps": steps(step, 1, 0.0)}
