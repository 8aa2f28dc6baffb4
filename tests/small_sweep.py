"""A small sweep whose train.py and eval.py are stand-ins; run as a script, one that can be stopped.

python tests/small_sweep.py FOLDER, after ``make_commands(FOLDER)``
"""

import pathlib
import sys

from etils import epath

from condconv.tools.studies import sweep
from condconv.tools.studies.study import Study
from condconv.tools.studies.table import parse_table

TABLE = """
title = "Small"
config = "configs/imagenet/mobilenet_v1.gin"
proxy = "configs/proxy/mobilenet_v1.gin"
[[rows]]
name = "static"
[[rows]]
name = "condconv2"
baseline = "static"
bindings = ["mobilenet_v1.num_experts = 2"]
"""

# Each call leaves a line; what stands in the file `mood` of a run or above it decides how it ends.
TRAIN = """
import json, os, pathlib, signal, sys, time
flags = [flag.partition("=")[::2] for flag in sys.argv[1:]]
workdir = pathlib.Path(dict(flags)["--workdir"])
moods = [folder / "mood" for folder in (workdir, workdir.parents[4])]
mood = next((path.read_text() for path in moods if path.exists()), "")
with open(workdir / "calls", "a") as file:
    file.write(f"train on {sorted(os.sched_getaffinity(0))}\\n")
if mood == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if mood == "fails":
    sys.exit("first line\\ntrain.py: the loss is not finite\\n")
if mood == "waits":
    (workdir / "pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((workdir / "saved").write_text("") or 143))
    (workdir / "calls").open("a").write("waiting\\n")
    time.sleep(30)
params = [value for name, value in flags if name == "--gin_param"]
(workdir / "config.gin").write_text("\\n".join(params))
(workdir / "environment.json").write_text("{}")
"""
EVAL = """
import json, pathlib, sys
workdir = pathlib.Path(sys.argv[1].partition("=")[2])
(workdir / "calls").open("a").write("eval\\n")
experts = "num_experts = 2" in (workdir / "config.gin").read_text()
counts = dict(images=100, parameters=1, multiply_adds=1, macs=1)
(workdir / "eval.json").write_text(json.dumps({"top1": 0.5 + 0.1 * experts, "loss": 1.0, **counts}))
"""


def make_commands(folder: pathlib.Path) -> None:
    (folder / "train.py").write_text(TRAIN)
    (folder / "eval.py").write_text(EVAL)
    sweep.ROOT = folder


def small_study(*gin_params: str) -> Study:
    return Study(parse_table("small", TABLE), "digits", gin_params)


def place(folder: pathlib.Path) -> epath.Path:
    return epath.Path(folder) / "runs" / "small" / "digits"


if __name__ == "__main__":
    sweep.ROOT = pathlib.Path(sys.argv[1])
    sys.exit(sweep.run(small_study(), place(sweep.ROOT), range(1)))
