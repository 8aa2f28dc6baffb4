"""Runs side by side, and one line wherever their files are not what they should be."""

import json

import pytest
from etils import epath
from matplotlib.figure import Figure

from condconv.engine import files
from condconv.engine.errors import RunError, UsageError
from condconv.tools import tables
from condconv.tools.reports import figures, records, report

RESULT = {
    "parameters": 10,
    "multiply_adds": 20,
    "top1": 0.87654,
    "images": 360,
    "dataset": "digits",
    "split": "test",
}


@pytest.fixture
def run(tmp_path) -> epath.Path:
    folder = epath.Path(tmp_path) / "run"
    folder.mkdir()
    files.write_json(folder / "eval.json", RESULT)
    lines = [{"step": step, "train_top1": 0.1 * step, "val_top1": 0.5} for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def accuracy_of(run: epath.Path) -> Figure:
    return figures.accuracy(records.read([run]))


@pytest.mark.parametrize("prefix", ["selection", "minival"])
def test_the_selection_split_of_an_old_run_is_drawn_too(run, prefix):
    files.write_text(run / "metrics.jsonl", f'{{"step": 7, "{prefix}_top1": 0.25}}\n')
    (curve,) = accuracy_of(run).axes[0].lines
    assert [*map(tuple, curve.get_xydata())] == [(7, 25)]


def message_of(function, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as error:
        function()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_row_holds_what_was_evaluated(run, capsys):
    rows = report.compare([run])
    row = {"run": "run", "parameters": 10, "multiply_adds": 20, "top1": 0.8765, "images": 360}
    assert rows == [row | {"split": "digits/test"}]
    tables.show(rows, False)
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "run", "10", "20", "0.8765", "360", "digits/test"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top1": None}, "holds 'top1' of None, which is no float"),
        ({"top1": "0.5"}, "holds 'top1' of '0.5', which is no float"),
        ({"parameters": 1.5}, "holds 'parameters' of 1.5, which is no int"),
        ({"images": True}, "holds 'images' of True, which is no int"),
        ({"split": ["test"]}, "holds 'split' of ['test'], which is no str"),
    ],
)
def test_results_of_a_wrong_type_are_named(run, change, said):
    files.write_json(run / "eval.json", RESULT | change)
    message = message_of(lambda: report.compare([run]))
    assert said in message
    assert f"run eval.py --workdir={run} again" in message


@pytest.mark.parametrize("missing", RESULT)
def test_missing_results_are_named(run, missing):
    files.write_json(run / "eval.json", {k: v for k, v in RESULT.items() if k != missing})
    assert f"eval.json lacks {missing!r}" in message_of(lambda: report.compare([run]))


@pytest.mark.parametrize("content", ["", "{", "[]", "1", "null", '{"top1": 1', "\xff"])
def test_an_eval_json_that_is_none_is_named(run, content):
    (run / "eval.json").write_bytes(content.encode("latin1"))
    assert f"{run}/eval.json" in message_of(lambda: report.compare([run]))


def test_an_accuracy_of_exactly_one_may_be_an_integer(run):
    files.write_json(run / "eval.json", RESULT | {"top1": 1})
    assert report.compare([run])[0]["top1"] == 1


def test_metrics_of_strange_lines_are_drawn_as_far_as_they_go(run, tmp_path, monkeypatch):
    lines = [{"step": step, "train_top1": 0.1, "val_top1": 0.5} for step in range(3)]
    lines += [3, [], None, {"val_top1": 1}, {"step": "x", "val_top1": 1}, {"step": 3}]
    lines += [{"step": 9, "val_top1": 0.75}]
    monkeypatch.setattr(records, "read_metrics", lambda _: lines)
    training, judged = (line.get_xydata() for line in accuracy_of(run).axes[0].lines)
    assert len(training) == 3
    assert [*map(tuple, judged)][-3:] == [(1, 50), (2, 50), (9, 75)]
    output = epath.Path(tmp_path) / "new" / "plot.png"
    report.plot_accuracy([run], output)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_is_drawn_empty(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    report.plot_accuracy([run], epath.Path(tmp_path) / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_an_output_that_cannot_be_written_is_named(run):
    message = message_of(lambda: report.plot_accuracy([run], run))
    assert message == f"--output={run} is a folder: name a file"
    below_a_file = run / "eval.json" / "plot.png"
    message = message_of(lambda: report.plot_accuracy([run], below_a_file))
    assert f"the folder of --output={run}/eval.json cannot be written to" in message


def refuse(monkeypatch, method: str, error: Exception) -> None:
    def raising(*_, **__):
        raise error

    monkeypatch.setattr(type(epath.Path("/")), method, raising)


def errors() -> list[Exception]:
    import tensorflow as tf

    said = "No access\n\t when writing"
    return [OSError(28, "No access"), tf.errors.PermissionDeniedError(None, None, said)]


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_what_a_store_refuses_is_one_line_and_keeps_its_cause(run, error, monkeypatch):
    refuse(monkeypatch, "write_bytes", error)
    refuse(monkeypatch, "read_text", error)
    for write in (
        lambda: files.write_json(run / "eval.json", {}),
        lambda: files.write_text(run / "eval.json", ""),
        lambda: report.plot_accuracy([], run / "eval.json"),
    ):
        assert "eval.json cannot be written (No access)" in message_of(write, RunError)
    with pytest.raises(UsageError, match=r"eval.json cannot be read \(No access\)") as caught:
        files.read_json(run / "eval.json")
    assert caught.value.__cause__ is error
    with pytest.raises(RunError) as caught:
        files.write_json(run / "eval.json", {})
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [*errors(), ValueError("No access")], ids=repr)
def test_metrics_that_cannot_be_read_are_one_line(run, error, monkeypatch):
    def raising(_):
        raise error

    monkeypatch.setattr(records, "read_metrics", raising)
    message = message_of(lambda: report.plot_accuracy([run], run / "plot.png"))
    assert f"the metrics of {run} cannot be read (No access)" in message
