"""Tables are strict, results are trusted in their place only, and the rest is arithmetic."""

import io
import json
import re

import numpy as np
import pytest
from etils import epath
from scipy import stats

from condconv.engine.errors import UsageError
from condconv.tools.studies import study
from condconv.tools.studies.table import (
    DATASETS,
    TABLES,
    PublishedNumber,
    Row,
    parse_table,
    read_table,
)
from condconv.tools.studies.text import show_results
from data.hard_digits import VIEWS

ROW = '[[rows]]\nname = "a"\nconfig = "c.gin"\nproxy = "p.gin"\n'
TABLE = 'title = "T"\n' + ROW


def refused(text: str) -> str:
    with pytest.raises(UsageError) as error:
        parse_table("mine", text)
    message = str(error.value)
    assert message.startswith("table mine: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "Invalid value"),
        (ROW, "leaves out title"),
        ('title = "T"', "leaves out rows"),
        ('title = "T"\nrows = []', "rows takes one [[rows]] or more"),
        ('title = "T"\nrows = [1]', "rows takes one [[rows]] or more"),
        ("tilte = 1\n" + TABLE, "unknown key 'tilte'; known are title, rows, config"),
        (TABLE + "top_1 = 3", "row 'a': unknown key 'top_1'"),
        (TABLE.replace('config = "c.gin"\n', ""), "row 'a': leaves out config"),
        (TABLE + ROW, "row 'a': another row has this name"),
        (TABLE.replace('"a"', '"a/b"'), "row 'a/b': name takes letters"),
        (TABLE.replace('"a"', '".."'), "row '..': name takes letters"),
        (TABLE.replace('"a"', "3"), "row 3: name takes a text, not 3"),
        (TABLE + 'baseline = "b"', "row 'a': baseline takes a row above it (), not 'b'"),
        (TABLE + 'baseline = "a"', "row 'a': baseline takes a row above it (), not 'a'"),
        (TABLE + 'bindings = "x = 1"', "bindings takes a list of gin bindings, not 'x = 1'"),
        (TABLE + "digits = [1]", "digits takes a list of gin bindings, not [1]"),
        (TABLE + "top1 = 70.1", "top1 takes [number, certainty] with one of verified"),
        (TABLE + 'top1 = [70.1, "sure"]', "not [70.1, 'sure']"),
        (TABLE + 'top1 = ["70", "verified"]', "not ['70', 'verified']"),
        ('counted_as = "flops"\n' + TABLE, "counted_as takes multiply_adds or macs, not 'flops'"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(text, said):
    assert said in refused(text)


def test_an_unknown_table_is_named_with_the_known_ones(tmp_path):
    for name in ("imagnet", str(tmp_path / "none.toml")):
        with pytest.raises(UsageError, match="take one of imagenet, released"):
            read_table(name)


@pytest.mark.parametrize("name", TABLES)
def test_each_table_of_the_paper_is_whole(name):
    table = read_table(name)
    header = table.text.partition("\ntitle")[0]
    assert "# Source: " in header
    for dataset in ("none", "digits --seeds=3", "imagenet2012"):
        assert f"scripts/reproduce.py --table={name} --dataset={dataset}" in header
    runs = [study.Study(table, dataset) for dataset in DATASETS]
    for each in runs:  # every gin file is there, and no two rows are the same run
        assert len({each.digest(row, 0) for row in table.rows}) == len(table.rows)
    assert all(row.baseline or index == 0 or name in ("imagenet", "released", "frontier")
               for index, row in enumerate(table.rows))  # fmt: skip


def test_the_frontier_is_four_widths_by_six_numbers_of_experts():
    rows = read_table("frontier").rows
    assert len(rows) == 24
    assert [row.baseline for row in rows].count(None) == 4
    experts = [re.findall(r"num_experts = (\d+)", " ".join(row.bindings)) for row in rows[:6]]
    assert experts == [[], ["2"], ["4"], ["8"], ["16"], ["32"]]


def test_on_digits_the_widths_of_the_frontier_are_quarters_of_the_papers():
    def width(text: str) -> float:
        return float(re.search(r"mobilenet_v1\.width = ([\d.]+)", text)[1])

    rows = read_table("frontier").rows
    for row in rows:
        assert width(row.digits[0]) == width(row.imagenet2012[0]) / 4


@pytest.mark.parametrize(
    ("published", "ours", "agrees"),
    [
        (567, 567.716, True),  # truncated
        (413, 412.8, True),  # rounded
        (413, 411.9, False),
        (413, 414.0, False),
        (55.4, 55.352, True),
        (55.4, 55.6, False),
        (24.0, 24.013, True),
        (24.0, 24.1, False),  # 24.0 was printed with a digit behind the point
    ],
)
def test_numbers_agree_within_the_last_printed_digit(published, ours, agrees):
    assert PublishedNumber(published, "verified").agrees(ours) == agrees


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    """Returns a study on digits: a static row and one to compare with it, seeds 0 to 2 of each."""
    (tmp_path / "base.gin").write_text("a.b = 1\n")
    (tmp_path / "p.gin").write_text("# a comment\ninclude 'base.gin'\n\nc.d = 2\n")
    text = TABLE.replace('"p.gin"', f'"{tmp_path}/p.gin"')
    text += text.partition("\n")[2].replace('"a"', '"b"') + 'baseline = "a"\ndigits = ["x.y = 3"]\n'
    text += 'top1 = [70.5, "verified"]\n'
    made = study.Study(parse_table("mine", text), "digits", ("z = 1",))
    place = epath.Path(tmp_path) / "mine" / "digits"
    place.mkdir(parents=True)
    made.write(place)
    for index, row in enumerate(made.table.rows):
        for seed in range(3):
            add(made, row, seed, place, right=60 + 10 * index + seed * (index + 1))
    return place


def add(made: study.Study, row: Row, seed: int, folder: epath.Path, right: int) -> None:
    run = folder / row.name / f"seed{seed}"
    run.mkdir(parents=True)
    counts = {"images": 100, "parameters": 10, "multiply_adds": 20, "macs": 30}
    metrics = {"top1": right / 100, "loss": 0.5, **counts}
    (run / "eval.json").write_text(json.dumps(metrics))
    (run / "environment.json").write_text('{"commit": "abc"}')
    (run / "config.gin").write_text(f"# Experiment\nExperiment.seed = {seed}\n")
    predictions = {"index": np.arange(100)[::-1], "correct": np.arange(100)[::-1] < right}
    content = io.BytesIO()
    np.savez(content, **predictions)
    (run / "predictions.npz").write_bytes(content.getvalue())
    study.write_result(made, row, seed, run, seconds=12)


def change(folder: epath.Path, **values: object) -> None:
    path = folder / "b" / "seed1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_results_come_back_as_they_were_written(folder):
    results, rejected = study.read_results(folder)
    assert rejected == []
    assert [(each.row, each.seed) for each in results] == [(r, s) for r in "ab" for s in range(3)]
    last = results[-1]
    assert (last.table, last.dataset, last.seconds) == ("mine", "digits", 12.0)
    assert last.metrics["top1"] == 0.74
    assert last.environment == {"commit": "abc"}
    assert "Experiment.seed = 2" in last.config
    np.testing.assert_array_equal(last.correct, np.arange(100) < 74)
    assert study.find_studies(folder.parent.parent) == [folder] == study.find_studies(folder)
    assert study.read_study(folder).gin_params == ("z = 1",)


def assert_left_out(folder: epath.Path, said: str) -> None:
    results, (rejected,) = study.read_results(folder)
    assert rejected.path == folder / "b" / "seed1" / "result.json"
    assert said in rejected.reason
    assert len(rejected.reason.splitlines()) == 1
    assert [each.seed for each in results if each.row == "b"] == [0, 2]
    assert study.summary(study.read_study(folder).table, results)[1].top1.count == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"format": 1', "\xff\x00"])
def test_a_damaged_result_is_named_and_left_out(folder, content):
    (folder / "b" / "seed1" / "result.json").write_bytes(content.encode("latin1"))
    assert_left_out(folder, "b/seed1/result.json ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "is of format 2, not 1"),
        ({"format": None}, "is of format None, not 1"),
        ({"format": "1"}, "is of format '1', not 1"),
        ({"seed": 2}, "is of seed 2, but lies where that of '1' would"),
        ({"seed": True}, "holds 'seed' of True, which is no int"),
        ({"row": "a"}, "is of row 'a', but lies where that of 'b' would"),
        ({"table": "other"}, "is of table 'other'"),
        ({"dataset": "imagenet2012"}, "is of dataset 'imagenet2012'"),
        ({"digest": "0" * 64}, "was run by another config"),
        ({"config": "Experiment.seed = 11"}, "is of seed 1, which its config does not say"),
        ({"metrics": []}, "holds 'metrics' of []"),
        ({"metrics": {"top1": 0.5}}, "holds 'images' of None, which cannot be"),
    ],
)
def test_a_result_that_contradicts_its_place_is_left_out(folder, changes, said):
    change(folder, **changes)
    assert_left_out(folder, said)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top1", 1.5), ("top1", float("nan")), ("loss", float("inf")), ("loss", "1"), ("images", 9.5)],
)
def test_a_result_of_impossible_numbers_is_left_out(folder, name, value):
    path = folder / "b" / "seed1" / "result.json"
    metrics = json.loads(path.read_text())["metrics"]
    change(folder, metrics=metrics | {name: value})
    assert_left_out(folder, f"holds {name!r} of")


def test_predictions_of_another_evaluation_are_left_out_and_missing_ones_are_not(folder):
    path = folder / "b" / "seed1" / "predictions.npz"
    path.write_bytes((folder / "a" / "seed1" / "predictions.npz").read_bytes())
    assert_left_out(folder, "its predictions.npz is of another evaluation")
    path.write_bytes(b"garbage")
    assert_left_out(folder, "its predictions.npz cannot be read")
    path.unlink()
    results, rejected = study.read_results(folder)
    assert rejected == []
    line = study.summary(study.read_study(folder).table, results)[1]
    assert (line.over_baseline.count, line.over_baseline_by_image) == (3, None)


def test_a_changed_row_or_recipe_leaves_its_results_out_and_a_changed_comment_does_not(folder):
    base = folder.parent.parent / "base.gin"
    base.write_text("# other words\n\na.b = 1\n")
    assert len(study.read_results(folder)[0]) == 6
    base.write_text("a.b = 2\n")
    assert len(study.read_results(folder)[1]) == 6
    base.write_text("a.b = 1\n")
    path = folder / "study.json"
    path.write_text(path.read_text().replace("x.y = 3", "x.y = 4"))
    results, rejected = study.read_results(folder)
    assert {each.row for each in results} == {"a"}
    assert len(rejected) == 3


@pytest.mark.parametrize("content", ["{", "{}", '{"format": 2}'])
def test_a_study_of_another_format_is_one_line(folder, content):
    (folder / "study.json").write_text(content)
    with pytest.raises(UsageError, match="study.json") as error:
        study.read_results(folder)
    assert len(str(error.value).splitlines()) == 1


def test_the_summary_is_arithmetic(folder):
    table = study.read_study(folder).table
    results, _ = study.read_results(folder)
    static, compared = study.summary(table, results)
    ours, theirs = np.array([0.70, 0.72, 0.74]), np.array([0.60, 0.61, 0.62])
    assert static.over_baseline is static.over_baseline_by_image is None
    assert (static.seeds, static.parameters, static.macs) == ((0, 1, 2), 10, 30)
    assert compared.top1.mean == pytest.approx(0.72)
    assert compared.top1.deviation == pytest.approx(np.std(ours, ddof=1))
    assert compared.over_baseline.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)

    def share(lowest: np.ndarray) -> np.ndarray:
        """Returns how often the 10 views of each image were right, if example i < 100 · lowest."""
        right = np.arange(100) < np.round(100 * lowest)[:, None]
        return right.mean(axis=0).reshape(10, 10).mean(axis=1)

    reference = stats.ttest_rel(share(ours), share(theirs))
    by_image = compared.over_baseline_by_image
    assert (by_image.count, by_image.p_value) == (10, pytest.approx(reference.pvalue))
    assert by_image.mean == pytest.approx(compared.over_baseline.mean)


def test_pairs_are_of_the_same_seed_and_other_seeds_count_for_the_mean_alone(folder):
    table = study.read_study(folder).table
    results = [r for r in study.read_results(folder)[0] if (r.row, r.seed) != ("a", 2)]
    compared = study.summary(table, results)[1]
    assert (compared.top1.count, compared.over_baseline.count) == (3, 2)
    assert compared.over_baseline.mean == pytest.approx((0.10 + 0.11) / 2)
    alone = study.summary(table, [r for r in results if r.row == "b"])
    assert (alone[0].seeds, alone[0].top1) == ((), None)
    assert alone[1].over_baseline is None


def test_results_of_other_tables_or_two_data_sets_are_not_mixed(folder):
    results, _ = study.read_results(folder)
    with pytest.raises(ValueError, match="on one data set"):
        study.summary(parse_table("other", TABLE), results)


def test_the_printed_table_says_what_the_json_says(folder, capsys):
    change(folder, format=7)
    show_results(folder, True)
    printed = capsys.readouterr()
    static, compared = json.loads(printed.out)
    assert "seed1/result.json: is of format 7" in printed.err
    assert (static["baseline"], compared["baseline"]) == (None, "a")
    assert (compared["seeds"], compared["paper_top1"]) == ([0, 2], 70.5)
    assert compared["over_baseline"]["mean"] == pytest.approx(0.11)
    show_results(folder, False)
    text = capsys.readouterr().out
    assert "72.00 ±2.83 (46.6 to 97.4)" in text
    assert "+11.00 (-1.7 to +23.7)" in text
    assert "the 10 views of an image counted as one" in text
    assert "one seed" not in text


def test_one_seed_is_said_to_have_no_interval(folder, capsys):
    for seed in (1, 2):
        (folder / "b" / f"seed{seed}" / "result.json").unlink()
    show_results(folder, False)
    text = capsys.readouterr().out
    assert "Rows of one seed have no interval over seeds" in text
    assert re.search(r"^b +1 .* 70\.00 +\+10\.00 +– ", text, re.MULTILINE)


def test_digits_have_as_many_views_as_their_source_makes():
    assert study.VIEWS["digits"] == VIEWS
