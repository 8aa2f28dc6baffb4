"""Sweeps: what is done is skipped, what was cut goes on, and a row that fails stops no other.

Quick ones run stand-ins of train.py and eval.py, as real processes; slow ones the real commands.
"""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_sweep
from etils import epath
from small_sweep import TABLE, make_commands, place, small_study

from condconv.engine.errors import UsageError
from condconv.tools.studies import study, sweep
from condconv.tools.studies.table import Row, parse_table, read_table
from condconv.tools.studies.text import show_results

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(sweep, "ROOT", None)  # so that it is restored
    make_commands(tmp_path)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)
    return tmp_path


def calls(tmp_path: pathlib.Path) -> dict[str, list[str]]:
    """Returns what was called in each run, without the cores."""
    found = sorted(place(tmp_path).glob("*/seed*/calls"))
    return {
        f"{path.parent.parent.name} {path.parent.name}": re.sub(
            " on .*", "", path.read_text()
        ).splitlines()
        for path in found
    }


BOTH = ["train", "eval"]


def test_what_is_missing_is_run_and_what_is_done_is_not(stand_ins, capsys):
    assert sweep.run(small_study(), place(stand_ins), range(1)) == 0
    assert calls(stand_ins) == {"condconv2 seed0": BOTH, "static seed0": BOTH}
    assert sweep.run(small_study(), place(stand_ins), range(2), jobs=2) == 0
    runs = [f"{row} seed{seed}" for row in ("condconv2", "static") for seed in (0, 1)]
    assert calls(stand_ins) == dict.fromkeys(runs, BOTH)
    said = capsys.readouterr().err
    assert "2 of 4 are done already" in said
    assert re.search(r"condconv2 seed 1: top-1 0\.6000 after 0:0\d; \d of 4 done, ", said)
    results, rejected = study.read_results(place(stand_ins))
    assert rejected == []
    assert [(r.row, r.seed, r.metrics["top1"]) for r in results] == [
        ("static", 0, 0.5), ("static", 1, 0.5), ("condconv2", 0, 0.6), ("condconv2", 1, 0.6)
    ]  # fmt: skip


def test_rows_at_a_time_share_the_cores(stand_ins):
    cores = sorted(os.sched_getaffinity(0))
    assert sweep.run(small_study(), place(stand_ins), range(1), jobs=2) == 0
    used = [(path / "calls").read_text() for path in place(stand_ins).glob("*/seed0")]
    shares = [cores[0::2], cores[1::2]] if len(cores) > 1 else [cores, cores]
    assert sorted(used) == sorted(f"train on {share}\neval\n" for share in shares)


def test_a_damaged_result_is_run_again(stand_ins, capsys):
    sweep.run(small_study(), place(stand_ins), range(1))
    path = place(stand_ins) / "static" / "seed0" / "result.json"
    path.write_text(path.read_text()[:100])
    assert sweep.run(small_study(), place(stand_ins), range(1)) == 0
    assert calls(stand_ins)["static seed0"] == 2 * BOTH
    assert "static seed 0: its result" in capsys.readouterr().err
    assert len(study.read_results(place(stand_ins))[0]) == 2


@pytest.mark.parametrize(
    ("mood", "said", "logged"),
    [
        ("fails", "train.py: the loss is not finite", "first line"),
        ("dies", "ended by SIGKILL; nothing said", ""),
    ],
)
def test_a_row_that_fails_stops_no_other_and_is_named_at_the_end(
    stand_ins, capsys, mood, said, logged
):
    failing = place(stand_ins) / "static" / "seed0"
    failing.mkdir(parents=True)
    (failing / "mood").write_text(mood)
    assert sweep.run(small_study(), place(stand_ins), range(2)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"failed: static seed 0: {said}"
    assert logged in (failing / "output.log").read_text()
    assert len(study.read_results(place(stand_ins))[0]) == 3
    (failing / "mood").unlink()
    assert sweep.run(small_study(), place(stand_ins), range(2)) == 0
    assert len(study.read_results(place(stand_ins))[0]) == 4


def wait_until(holds, seconds: float = 20) -> None:
    for _ in range(round(20 * seconds)):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("never came")


def in_background(tmp_path: pathlib.Path) -> subprocess.Popen:
    """Runs the sweep in a process of its own, which a test can stop."""
    command = [sys.executable, small_sweep.__file__, str(tmp_path)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_signal_stops_the_children_and_the_next_call_goes_on(stand_ins, number):
    (stand_ins / "mood").write_text("waits")
    process = in_background(stand_ins)
    wait_until(lambda: calls(stand_ins).get("static seed0", [])[-1:] == ["waiting"])
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert said.splitlines()[-1].endswith("stopped with 0 of 2 done; the same command goes on")
    assert (place(stand_ins) / "static" / "seed0" / "saved").exists()
    (stand_ins / "mood").unlink()
    assert sweep.run(small_study(), place(stand_ins), range(1)) == 0
    assert calls(stand_ins)["static seed0"] == ["train", "waiting", *BOTH]


def test_after_a_kill_the_next_call_waits_for_what_still_runs(stand_ins, capsys):
    (stand_ins / "mood").write_text("waits")
    process = in_background(stand_ins)
    wait_until(lambda: calls(stand_ins).get("static seed0", [])[-1:] == ["waiting"])
    process.kill()
    process.communicate()
    (stand_ins / "mood").unlink()
    orphan = int((place(stand_ins) / "static" / "seed0" / "pid").read_text())
    threading.Timer(0.1, os.kill, (orphan, signal.SIGTERM)).start()
    assert sweep.run(small_study(), place(stand_ins), range(1)) == 0
    said = capsys.readouterr().err
    assert "static seed 0: another process is at it; waiting for that one" in said
    assert said.index("condconv2 seed 0: begins") < said.index("static seed 0: begins")
    assert calls(stand_ins)["static seed0"] == ["train", "waiting", *BOTH]


def test_what_another_call_has_finished_meanwhile_is_not_run_again(stand_ins):
    sweep.run(small_study(), place(stand_ins), range(1))
    path = place(stand_ins) / "static" / "seed0" / "result.json"
    result = path.read_text()
    path.unlink()
    with open(path.parent / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for seconds, act in ((0.1, lambda: path.write_text(result)), (0.3, file.close)):
            threading.Timer(seconds, act).start()
        assert sweep.run(small_study(), place(stand_ins), range(1)) == 0
    assert calls(stand_ins)["static seed0"] == BOTH


def test_other_bindings_belong_into_another_workdir(stand_ins):
    sweep.run(small_study("a.b = 1"), place(stand_ins), range(1))
    with pytest.raises(UsageError, match=r"--gin_param \['a.b = 1'\], not \['a.b = 2'\]"):
        sweep.run(small_study("a.b = 2"), place(stand_ins), range(1))


def test_a_table_of_files_that_are_not_there_is_refused_before_anything_runs(stand_ins):
    table = parse_table("small", TABLE.replace("proxy/mobilenet_v1", "proxy/none", 1))
    with pytest.raises(UsageError, match=r"configs/proxy/none.gin cannot be read"):
        sweep.run(study.Study(table, "digits"), place(stand_ins), range(1))
    assert calls(stand_ins) == {}


def reproduce(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/reproduce.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture
def table(tmp_path) -> str:
    (tmp_path / "small.toml").write_text(TABLE)
    return f"--table={tmp_path}/small.toml"


def test_when_all_is_done_the_command_prints_and_runs_nothing(stand_ins, table):
    sweep.run(small_study(), place(stand_ins), range(1))
    done = reproduce(table, "--dataset=digits", f"--workdir={stand_ins}/runs", "--json")
    assert (done.returncode, done.stderr) == (0, "2 of 2 are done already\n")
    assert [row["name"] for row in json.loads(done.stdout)] == ["static", "condconv2"]
    assert calls(stand_ins) == {"condconv2 seed0": BOTH, "static seed0": BOTH}


def test_wrong_calls_are_one_line(table, tmp_path):
    for flags, said in (
        ([], "needs --table=NAME"),
        (["--table=imagnet"], "there is no table 'imagnet'"),
        ([table, "--dataset=digits"], "--dataset=digits needs --workdir=FOLDER"),
    ):
        done = reproduce(*flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def costs_of(name: str) -> list[dict]:
    from condconv.tools.studies import costs  # loads TensorFlow, which the quick tests do without

    return list(costs.cost_lines(read_table(name)))


@pytest.mark.slow
def test_the_command_prints_costs(tmp_path):
    (tmp_path / "one.toml").write_text(TABLE.partition('[[rows]]\nname = "condconv2"')[0])
    done = reproduce(f"--table={tmp_path}/one.toml", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["multiply_adds"], row["paper_top1"]) == ("static", 567_716_352, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "released", "frontier", "experts"])
def test_costs_are_the_papers_to_the_printed_digit(name):
    rows = costs_of(name)
    assert [row["name"] for row in rows] == [row.name for row in read_table(name).rows]
    for row in rows:
        wanted = row["name"] != "efficientnet_b0_depth"  # nobody published it
        assert row["multiply_adds_agree"] is (True if wanted else None), row
        assert row["parameters_agree"] in (True, None), row
    if name == "frontier":
        assert all(abs(r["multiply_adds"] - r["paper_multiply_adds"]) < 1e5 for r in rows)
    if name == "released":
        assert [row["parameters_agree"] for row in rows] == [True, True, True, None, True]


@pytest.mark.slow
def test_ablations_cost_what_follows_from_their_architecture():
    """Counted plainly, as derived from the paper's description; see the tables' headers."""
    derived = {
        "routing": [41.03, 55.61, 55.61, 55.57, None, 55.60, 55.84, 57.78, 55.62],
        "placement": [41.03, 55.9, 55.8, 55.6, 52.5, 49.2, 47.4],
    }
    for name, millions in derived.items():
        for row, wanted in zip(costs_of(name), millions, strict=True):
            digits = 2 if name == "routing" or row["name"] == "static" else 1
            assert wanted is None or abs(row["macs"] / 1e6 - wanted) < 10**-digits, row


@pytest.mark.slow
def test_digits_are_trained_killed_and_gone_on_with_to_the_same_table(tmp_path, table, capsys):
    params = ("Experiment.duration = '30 steps'", "Experiment.checkpoint_every = '5 steps'")
    short = [f"--gin_param={each}" for each in (*params, "mobilenet_v1.width = 0.1")]
    flags = [table, "--dataset=digits", "--jobs=2", "--json", *short]
    whole = reproduce(*flags, f"--workdir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    cut = epath.Path(tmp_path) / "cut" / "small" / "digits"
    shutil.copytree(tmp_path / "whole" / "small" / "digits", cut)
    shutil.rmtree(cut / "static")  # so that one row is left to run
    flags.append(f"--workdir={tmp_path}/cut")
    process = subprocess.Popen([sys.executable, "scripts/reproduce.py", *flags], cwd=ROOT)
    checkpoints = cut / "static" / "seed0" / "checkpoints"
    wait_until(lambda: checkpoints.exists() and any(checkpoints.iterdir()), 300)
    process.kill()
    process.communicate()
    for done in ("1 of 2 are done already", "2 of 2 are done already"):
        capsys.readouterr()
        assert sweep.run(study.read_study(cut), cut, range(1)) == 0
        assert capsys.readouterr().err.splitlines()[0] == done
    show_results(cut, as_json=True)
    assert capsys.readouterr().out == whole.stdout


@pytest.mark.parametrize("name", ["imagenet", "released"])
def test_on_digits_a_row_differs_from_its_baseline_by_its_experts_alone(name):
    table = read_table(name)
    for row in table.rows:
        if row.baseline is None:
            continue
        (file, bindings), (other, others) = (
            each.gin("digits") for each in (row, table.row(row.baseline))
        )
        assert file == other
        (extra,) = {*bindings} - {*others}
        assert re.fullmatch(r"\w+\.num_experts = [48]", extra)
        assert {*others} <= {*bindings}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "released"])
def test_on_digits_twins_are_normalised_and_regularised_alike(name):
    from condconv.engine import config  # loads TensorFlow, which the quick tests do without

    table = read_table(name)

    def training(row: Row) -> tuple[object, ...]:
        file, bindings = row.gin("digits")
        experiment = config.load([file], bindings)
        layers = experiment.model(num_classes=10).layers
        named = ("PixelNormalization", "Dropout", "StochasticDepth", "BatchNormalization")
        kept = [layer.get_config() for layer in layers if type(layer).__name__ in named]
        chosen = ("duration", "batch_size", "weight_decay", "ema_decay")
        smoothing = experiment.task(data=experiment.data()).label_smoothing
        return kept, smoothing, [getattr(experiment, each) for each in chosen]

    for row in table.rows:
        if row.baseline:
            assert training(row) == training(table.row(row.baseline)), row.name
