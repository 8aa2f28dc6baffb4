"""The report: what is on the page is what is in the files, and nothing comes from outside."""

import base64
import html.parser
import json
import logging
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator

import headless_browser
import keras
import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from condconv import CondConv2D
from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.tools.reports import charts, figures, records, report, study_page
from condconv.tools.reports.charts import Curve
from condconv.tools.studies.study import Study, read_results, summary, write_result
from condconv.tools.studies.table import parse_table

ROOT = pathlib.Path(__file__).parents[1]
HOSTILE = "<script>alert('x')</script>&\"é漢\u202e"
CONFIG = "Experiment.seed = {seed}\nwhole.augmentations = \\\n    (@flip,\n     @<b>)\n"
RESULT = {
    "top1": 0.87654321,
    "top5": 0.99,
    "loss": 0.4567891,
    "images": 360,
    "parameters": 1234567,
    "multiply_adds": 2345678,
    "macs": 2345000,
    "dataset": "digits",
    "split": "test",
    "step": 400,
    "weights": "ema",
}
LAYERS = [
    {"layer": f"conv{i}", "parameters": i, "static": 1000 * i, "mixing": 500 * (i % 2),
     "routing": i, "macs": 1000 * i}
    for i in range(1, 30)
]  # fmt: skip
COST = {"parameters": 7, "multiply_adds": 8, "macs": 9, "rows": LAYERS}


def lines_of(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    lines = []
    for i in range(1, count + 1):
        share = 1 - math.exp(-5 * i / count)
        training = {"train_top1": share * rng.uniform(0.8, 1), "train_loss": 2.5 - 2 * share}
        speed = {"images_per_second": 1000 * rng.random(), "input_share": rng.random()}
        lines.append({"step": 2 * i, **training, "learning_rate": 0.1 * (1 - share), **speed})
        if i % 10 == 0:
            judged = {"selection_top1": share, "selection_loss": 2.4 - 2 * share}
            lines.append({"step": 2 * i, **judged})
    return lines


def make_run(folder: epath.Path, seed: int = 0, **changes) -> epath.Path:
    """Makes the folder of a run as train.py and eval.py leave it."""
    folder.mkdir(parents=True)
    contents = {"eval.json": RESULT, "cost.json": COST, "environment.json": {"python": "3.11"}}
    for name, values in (contents | changes).items():
        files.write_json(folder / name, values)
    files.write_text(folder / "config.gin", CONFIG.format(seed=seed))
    text = "".join(json.dumps(line) + "\n" for line in lines_of(200, seed))
    files.write_text(folder / "metrics.jsonl", text)
    return folder


TABLE = """
title = "Two widths & <i>"
config = "configs/digits.gin"
proxy = "configs/digits.gin"
[[rows]]
name = "narrow"
multiply_adds = [40.8, "derived"]
top1 = [50.3, "digitised"]
[[rows]]
name = "narrow_8"
baseline = "narrow"
bindings = ["mobilenet_v1.num_experts = 8"]
multiply_adds = [44.4, "derived"]
top1 = [59.7, "digitised"]
[[rows]]
name = "wide"
multiply_adds = [149, "derived"]
top1 = [63.8, "verified"]
[[rows]]
name = "nobody_ran_it"
"""


def make_study(folder: epath.Path, dataset: str = "digits") -> epath.Path:
    """Makes the folder of a study of two seeds, one result of which is cut off."""
    study = Study(parse_table("widths", TABLE), dataset)
    folder.mkdir(parents=True)
    study.write(folder)
    for number, row in enumerate(study.table.rows[:3]):
        for seed in range(2):
            right = np.arange(360) % 100 < 60 + 8 * number + 3 * seed
            cost = {"multiply_adds": 10**6 * (number + 1), "top1": float(np.mean(right))}
            run = folder / row.name / f"seed{seed}"
            make_run(run, seed, **{"eval.json": RESULT | cost})
            np.savez(str(run / "predictions.npz"), index=np.arange(360), correct=right)
            write_result(study, row, seed, run, 60)
    cut = folder / "wide" / "seed1" / "result.json"
    cut.write_text(cut.read_text()[:100])
    return folder


@pytest.fixture
def tmp(tmp_path) -> epath.Path:
    return epath.Path(tmp_path)


class Page(html.parser.HTMLParser):
    """Reads a page; refuses what is not nested well.

    Attributes:
        elements: name and attributes of each.
        tables: by label; rows of (text, exact value or None).
        text: all that is shown.
        drawn: for each figure in the page, the paths of its marks.
    """

    def __init__(self, path: epath.Path):
        super().__init__()
        self._open, self._cell = [], None
        self.elements, self.tables, self.text, self.drawn = [], {}, "", []
        self.feed(path.read_text())
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "path" and self._open[-1] == ("g", "mark"):
            self.drawn[-1].append(attributes["d"])
        if tag != "meta":
            self._open.append((tag, attributes.get("class")))
        if "aria-label" in attributes and tag == "div":
            self._rows = self.tables[attributes["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._cell = ["", None]
        if tag == "data":
            self._cell[1] = json.loads(attributes["value"])
        if tag == "figure":
            self.drawn.append([])

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "use", "rect", "g")
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag
        if tag in ("td", "th"):
            self._rows[-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "style":
            assert not re.search(r"url\(|@import|http", data)
            return
        self.text += data
        if self._cell:
            self._cell[0] += data

    def named(self, *tags: str) -> list[dict]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def downloads(self) -> Iterator[xml.etree.ElementTree.Element]:
        for link in self.named("a"):
            kind, content = link["href"].split(",")
            assert kind == "data:image/svg+xml;base64"
            assert re.fullmatch(r"\w+\.svg", link["download"])
            yield xml.etree.ElementTree.fromstring(base64.b64decode(content))


def page_of(output: epath.Path, *workdirs: epath.Path) -> Page:
    report.write(workdirs, output)
    return Page(output)


def test_a_page_is_whole_and_asks_for_nothing(tmp):
    page = page_of(tmp / "r.html", make_run(tmp / "a"), make_study(tmp / "study"))
    assert len(page.named("h1")) == len(page.named("title")) == 1
    assert not page.named("script", "link", "img", "iframe", "object", "base", "form", "image")
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "onload"} & attributes.keys()
        assert attributes.get("href", "data:").startswith("data:")
        assert attributes.get("xlink:href", "#").startswith("#")
        assert not re.search(r"url\((?!#)", " ".join(filter(None, attributes.values())))
    addresses = set(re.findall(r"\w+://[^\"'<\s]*", (tmp / "r.html").read_text()))
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert addresses == names  # which nobody fetches


def test_the_table_of_a_run_is_its_json(tmp):
    page = page_of(tmp / "r.html", make_run(tmp / "a"), make_run(tmp / "b", step=None))
    head, first, second = page.tables["Results"]
    assert [text for text, _ in head][:4] == ["run", "top-1 (%)", "top-5 (%)", "loss"]
    names = ["top1", "top5", "loss", "images", None, None, "step", None]
    names += ["parameters", "multiply_adds", "macs"]
    assert [value for _, value in first[1:]] == [RESULT.get(name) for name in names]
    assert [text for text, _ in first] == [
        "a", "87.65", "99.00", "0.4568", "360", "digits", "test", "400", "ema",
        "1,234,567", "2,345,678", "2,345,000",
    ]  # fmt: skip
    assert [second[0][0], *first[1:]] == ["b", *second[1:]]


def test_cost_per_layer_is_that_of_the_file(tmp):
    page = page_of(tmp / "r.html", make_run(tmp / "a"))
    _, *rows = page.tables["Cost per layer, a"]
    assert [[cell[0] for cell in row[:1]] + [cell[1] for cell in row[1:]] for row in rows] == [
        list(layer.values()) for layer in LAYERS
    ]


def test_config_and_environment_are_there_and_what_differs_is_told(tmp):
    runs = make_run(tmp / "a", seed=3), make_run(tmp / "b", seed=4)
    page = page_of(tmp / "one.html", runs[0])
    assert CONFIG.format(seed=3) in page.text
    assert page.tables["Environment"][1:] == [[("python", None), ("3.11", None)]]
    files.write_json(runs[1] / "environment.json", {"python": "3.13", "devices": ["x", "y"]})
    both = page_of(tmp / "two.html", *runs)
    assert [[cell[0] for cell in row] for row in both.tables["Environment"]] == [
        ["", "a", "b"], ["python", "3.11", "3.13"], ["devices", "–", "x, y"]
    ]  # fmt: skip
    assert [[cell[0] for cell in row] for row in both.tables["Config: what differs"]] == [
        ["", "a", "b"], ["Experiment.seed", "3", "4"]
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_every_figure_has_drawn_marks_and_is_a_file_too(tmp, count):
    runs = [make_run(tmp / f"run{i}", i) for i in range(count)]
    page = page_of(tmp / "r.html", *runs)
    assert len(page.drawn) == 6
    for title in ("Accuracy", "Loss", "Learning rate", "Throughput", "Waiting", "Cost per layer"):
        assert f"{title}" in page.text
    for paths in page.drawn:
        assert any(len(path) > 100 for path in paths)
    for file, paths in zip(page.downloads(), page.drawn, strict=True):
        marks = file.findall(".//*[@class='mark']/{*}path")
        assert [mark.get("d") for mark in marks] == paths
        assert "http" not in "".join(file.itertext())


def marks_of(figure: Figure) -> list[list[tuple[float, float]]]:
    """Returns the corners of each mark of a chart, in units of the drawing."""
    drawn = xml.etree.ElementTree.fromstring(charts.svg(figure))
    paths = [mark.get("d") for mark in drawn.findall(".//*[@class='mark']/{*}path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", d)] for d in paths]


def chart(points: records.Points, **more) -> Figure:
    return charts.curves("t", "x", "y", [Curve(points, charts.look(0))], **more)


def test_a_curve_passes_through_its_points():
    (path,) = marks_of(chart([(0, 0.0), (50, 100.0), (100, 50.0)], bounds=(0, 100)))
    (x0, y0), (x1, y1), (x2, y2) = path
    assert x1 - x0 == x2 - x1 > 100
    assert y0 - y1 == pytest.approx(2 * (y0 - y2)) and y0 - y1 > 100


def test_columns_are_stacked():
    parts = {"a": ("red", [10.0, 0.0]), "b": ("blue", [30.0, 20.0])}
    first, second = marks_of(charts.columns("t", "x", "y", parts))
    bottom, low = max(y for _, y in first), min(y for _, y in first)
    ys = sorted({y for _, y in second})
    assert ys == [pytest.approx(bottom - n * (bottom - low), abs=0.1) for n in (4, 2, 1, 0)]


def test_a_value_that_is_no_number_breaks_the_line():
    curve = records.points([{"step": i, "v": None if i == 2 else i} for i in range(5)], "v")
    assert (
        re.search(r'class="mark"> <path d="([^"]*)"', charts.svg(chart(curve)))[1].count("M") == 2
    )


def test_strange_metrics_are_drawn_as_far_as_they_go(tmp):
    run = make_run(tmp / "a")
    strange = [
        '{"step": 500, "train_loss": NaN, "train_top1": Infinity, "learning_rate": null}',
        '{"step": 501, "train_loss": 1e308, "train_top1": "x", "learning_rate": [1]}',
        '{"step": 502, "train_loss": -1e308, "train_top1": true}',
        '{"step": NaN, "train_loss": 1}', '{"step": "7", "train_loss": 1}', "[]", "null", "3", "",
        '{"step": 503, "train_loss": 5e-324}', "\x00\ufffd", '{"step": 504, "train_lo',
    ]  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(strange))
    page = page_of(tmp / "r.html", run)
    assert len(page.drawn) == 6
    assert not re.search("nan|inf", "".join(path for paths in page.drawn for path in paths))


@pytest.mark.parametrize("values", [[], [0], [5], [-5], [1e-320, 2e-320], [1e299, -1e299], [7, 7]])
def test_any_numbers_have_axes(values):
    points = records.points([{"step": 1, "v": v} for v in values], "v")
    drawn = charts.svg(chart(points, log="xy"))
    assert 2 <= drawn.count("stroke-opacity: 0.2") <= 9  # lines of the grid
    assert not re.search("nan|inf", drawn)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_run_is_a_small_page_that_keeps_its_spikes(tmp, count):
    run = make_run(tmp / "a")
    lines = [
        f'{{"step": {i}, "train_loss": {90 if i == 5432 else 2}, "train_top1": 0.5, '
        f'"learning_rate": 0.1, "images_per_second": {i % 97}, "input_share": 0.{i % 89:02}}}\n'
        for i in range(count)
    ]
    files.write_text(run / "metrics.jsonl", "".join(lines))
    page = page_of(tmp / "r.html", run)
    assert (tmp / "r.html").stat().length < 2e5
    (loss,) = page.drawn[1]
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", loss)]
    assert heights.count(min(heights)) == 1 and min(heights) < sorted(heights)[1] - 100


def test_hostile_names_and_contents_are_text(tmp):
    run = make_run(tmp / HOSTILE.replace("/", "∕"), **{"environment.json": {HOSTILE: HOSTILE}})
    rows = [LAYERS[0] | {"layer": HOSTILE + "\x00\x1b"}, *LAYERS]
    files.write_json(run / "cost.json", COST | {"rows": rows})
    files.write_json(run / "eval.json", RESULT | {"dataset": HOSTILE, "weights": [HOSTILE]})
    files.write_text(run / "config.gin", f"a.b = '</pre>{HOSTILE}'\n")
    page = page_of(tmp / "r.html", run, make_run(tmp / "plain"))
    assert not page.named("script", "b")
    assert page.tables["Results"][1][0][0] == run.name
    assert page.tables["Results"][1][5][0] == HOSTILE
    assert page.tables[f"Cost per layer, {run.name}"][1][0][0] == HOSTILE + "\ufffd\ufffd"
    assert f"</pre>{HOSTILE}" in page.text
    assert len(list(page.downloads())) == 7


def test_a_name_that_is_no_unicode_is_written_as_far_as_it_goes(tmp):
    folder = epath.Path(os.fsdecode(os.fsencode(tmp / "run") + b"\xff"))
    page = page_of(tmp / "r.html", make_run(folder))
    assert page.tables["Results"][1][0][0] == "run?"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("eval.json", "{"),
        ("eval.json", '{"top1": 1}'),
        ("cost.json", '{"rows": [{"layer": "a"}]}'),
        ("cost.json", json.dumps({"rows": [LAYERS[0] | {"static": -1}]})),
        ("environment.json", "[]"),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + "}"),
    ],
)
def test_a_damaged_file_is_named_and_left_out(tmp, file, content):
    run = make_run(tmp / "a")
    (run / file).write_text(content)
    (problem,) = report.write([run], tmp / "r.html")
    page = Page(tmp / "r.html")
    assert str(run) in problem and file in problem
    assert problem in page.text
    assert ("87.65" in page.text) == (file != "eval.json")


def test_results_of_impossible_size_are_shown(tmp):
    run = make_run(tmp / "a", **{"eval.json": RESULT | {"top1": 10**400, "loss": math.nan}})
    assert report.write([run], tmp / "r.html") == []
    text = (tmp / "r.html").read_text()
    assert "1" + "0" * 400 in text and ">nan<" in text


def test_a_run_that_was_not_evaluated_says_what_to_do(tmp):
    run = make_run(tmp / "a")
    (run / "eval.json").unlink()
    page = page_of(tmp / "r.html", run)
    assert f"run eval.py --workdir={run}, then scripts/report.py" in page.text
    assert [value for _, value in page.tables["Results"][1]][-3:] == [7, 8, 9]  # of cost.json


def test_folders_of_neither_runs_nor_studies_are_refused(tmp):
    for folder in (tmp, tmp / "none"):
        with pytest.raises(UsageError, match="is the folder of neither a run") as error:
            report.write([folder], folder / "report.html")
        assert len(str(error.value).splitlines()) == 1
    assert not list(tmp.iterdir())
    with pytest.raises(UsageError, match="is a folder: name a file"):
        report.write([make_run(tmp / "a")], tmp)


def test_runs_of_one_name_are_told_apart(tmp):
    runs = make_run(tmp / "a" / "seed0"), make_run(tmp / "b" / "seed0")
    page = page_of(tmp / "r.html", *runs)
    assert [row[0][0] for row in page.tables["Results"][1:]] == [str(run) for run in runs]


def test_the_tables_of_a_study_are_its_summary(tmp):
    folder = make_study(tmp / "widths" / "digits")
    page = page_of(tmp / "r.html", tmp)
    results, (rejected,) = read_results(folder)
    lines = summary(parse_table("widths", TABLE), results)
    _, *reached = page.tables["Two widths & <i>, on digits"]
    for line, row in zip(lines, reached, strict=True):
        top1 = line.top1
        values = [len(line.seeds)]
        values += [top1.mean, top1.low, top1.high, top1.deviation] if top1 else [None] * 4
        assert row[0][0] == line.row.name
        assert [value for _, value in row[1:6]] == values
    (_, gained) = page.tables["Gain"]
    gain, by_image = lines[1].over_baseline, lines[1].over_baseline_by_image
    assert [value for _, value in gained[2:-1]] == [
        gain.mean, gain.low, gain.high, gain.p_value,
        by_image.mean, by_image.low, by_image.high, by_image.p_value,
    ]  # fmt: skip
    assert gained[-1] == ("+9.4", 9.4)
    _, *costs = page.tables["Cost"]
    assert [row[2][1] for row in costs] == [1e6, 2e6, 3e6, None]
    assert str(rejected.path) in page.text
    assert [row[1][1] for row in reached] == [2, 2, 1, 0]


@pytest.mark.parametrize("dataset", ["digits", "imagenet2012"])
def test_the_frontier_has_the_papers_points_and_ours(tmp, dataset):
    study = Study(parse_table("widths", TABLE), dataset)
    results, _ = read_results(make_study(tmp / "study", dataset))
    lines = summary(study.table, results)
    drawn = study_page.frontiers(study, lines)
    assert len(drawn) == (1 if dataset == "imagenet2012" else 2)
    lines_of = [line for figure in drawn for line in figure.axes[0].lines]
    curves = [line for line in lines_of if line.get_marker() != "_"]
    points = [tuple(point) for curve in curves for point in curve.get_xydata()]
    paper = {(40.8e6, 50.3), (44.4e6, 59.7), (149e6, 63.8)}
    ours = {(line.multiply_adds, 100 * line.top1.mean) for line in lines if line.top1}
    assert set(points) == paper | ours and len(points) == 6
    intervals = [tuple(i.get_ydata() / 100) for i in lines_of if i.get_marker() == "_"]
    assert intervals == [(line.top1.low, line.top1.high) for line in lines[:2]]


def test_a_study_of_which_nothing_has_run_is_a_page(tmp):
    study = Study(parse_table("widths", TABLE), "digits")
    study.write(tmp)
    page = page_of(tmp / "r.html", tmp)
    assert len(page.drawn) == 1  # the paper's points
    assert len(page.tables["Cost"]) == 5


def network() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = CondConv2D(4, 3, num_experts=2, name="conv")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="classifier")(x))


def test_a_run_that_ends_leaves_cost_and_page(tmp):
    run = make_run(tmp / "a")
    (run / "cost.json").unlink()
    report.conclude(network(), run)
    cost = json.loads((run / "cost.json").read_text())
    assert cost["multiply_adds"] == sum(cost[part] for part in ("static", "mixing", "routing"))
    rows = Page(run / "report.html").tables["Cost per layer, a"][1:]
    assert sum(row[3][1] for row in rows) == cost["mixing"] > 0
    assert sum(row[1][1] for row in rows) == cost["parameters"]


def test_a_report_that_fails_is_a_line_in_the_log(tmp, monkeypatch, caplog):
    def failing(*_):
        raise RuntimeError("no ink\nleft")

    monkeypatch.setattr(figures, "of_runs", failing)
    with caplog.at_level(logging.WARNING):
        report.conclude(network(), make_run(tmp / "a"))
    (line,) = caplog.messages
    assert line == f"{tmp}/a/report.html was not written: no ink"


def test_a_network_whose_cost_cannot_be_counted_has_a_page(tmp, caplog):
    inputs = keras.Input((None, None, 3))
    open_size = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    run = make_run(tmp / "a")
    (run / "cost.json").unlink()
    report.conclude(open_size, run)
    (line,) = caplog.messages
    assert "a/cost.json was not written" in line and "open size" in line
    assert len(Page(run / "report.html").drawn) == 5


@pytest.mark.slow
def test_training_ends_with_a_page_and_evaluation_adds_to_it(tmp):
    def call(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = "--gin_param=Experiment.duration = '6 steps'"
    call("train.py", "--gin_file=configs/digits_condconv.gin", short, f"--workdir={tmp / 'run'}")
    page = Page(tmp / "run" / "report.html")
    assert "has not been evaluated" in page.text and len(page.drawn) >= 3
    call("eval.py", f"--workdir={tmp / 'run'}")
    printed = call("scripts/report.py", str(tmp / "run"))
    assert printed.strip() == str(tmp / "run" / "report.html")
    top1 = json.loads((tmp / "run" / "eval.json").read_text())["top1"]
    assert Page(tmp / "run" / "report.html").tables["Results"][1][1][1] == top1


# What the eye would object to: parts of a page, or texts of a drawing, over one another or cut off.
LOOK = """(width => {
  const found = [], name = e => e.tagName + " " + e.textContent.trim().slice(0, 40);
  const box = e => e.getBoundingClientRect();
  const shown = e => e.checkVisibility() && box(e).width && box(e).height;
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const apart = list => list.forEach((a, i) => list.slice(i + 1).forEach(b => {
    if (!a.contains(b) && meet(box(a), box(b))) found.push(name(a) + " over " + name(b)); }));
  const inside = (e, outer) => { const a = box(e), b = box(outer);
    if (a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1
        || a.bottom > b.bottom + 1) found.push(name(e) + " leaves its drawing"); };
  const all = (root, what) => [...root.querySelectorAll(what)].filter(shown);
  apart(all(document, "h1, h2, h3, p, .box, figure, .problems, summary"));
  for (const drawing of all(document, "svg")) {
    const texts = all(drawing, "text"), marks = all(drawing, ".mark");
    apart(texts);
    [...texts, ...marks].forEach(e => inside(e, drawing));
    const ink = getComputedStyle(document.body).color;
    if (texts.some(e => getComputedStyle(e).fill != ink)) found.push("text is not as the page's");
    if (!marks.length) found.push(name(drawing) + " is empty");
  }
  for (const e of all(document, "td, th, h1, h2, p, li, figure"))
    if (e.scrollWidth > e.clientWidth + 1) found.push(name(e) + " is too wide");
  if (document.documentElement.scrollWidth > width) found.push("the page is too wide");
  return found;
})"""


@pytest.fixture(scope="module")
def browser(request):
    program = headless_browser.find()
    if not program:
        said = "NO CHROMIUM: nobody looks at the report's pages; put one on PATH, or set $CHROME"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{said}", file=sys.stderr)
        pytest.skip(said)
    with headless_browser.Browser(program) as opened:
        yield opened


def objections(browser, page: epath.Path, width: int, scheme: str = "light") -> list[str]:
    """Returns what a browser finds wrong with a page: outside addresses, errors, looks."""
    page = pathlib.Path(page)
    browser.open(page, width, scheme=scheme)
    seen = browser.evaluate(f"{LOOK}({width})")
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    noted = browser.said("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert page.as_uri() in asked
    return [*seen, *(url for url in asked if url != page.as_uri()), *map(str, noted)]


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_a_browser_shows_the_pages_as_they_should_be(browser, tmp, width, scheme):
    runs = [make_run(tmp / f"run{i}", i) for i in range(8)]
    long = make_run(tmp / ("long" * 40), **{"environment.json": {"x" * 300: "y" * 300}})
    (long / "eval.json").write_text("{")
    for workdirs in ([runs[0]], runs, [long], [long, runs[0]], [make_study(tmp / "study")]):
        report.write(workdirs, tmp / "r.html")
        assert objections(browser, tmp / "r.html", width, scheme) == []


def test_the_look_at_a_page_can_fail(browser, tmp):
    bad = """<meta name="viewport" content="width=device-width"><p style="width: 900px">wide</p>
      <h2 style="margin-bottom: -30px">one</h2><h2>two</h2><svg><text y="9">a</text>
      <text y="10">b</text></svg><script>console.error("oh")</script><img src="missing.png">"""
    (tmp / "bad.html").write_text(bad)
    found = "\n".join(objections(browser, tmp / "bad.html", 400))
    for fault in ("one over H2 two", "a over text b", "is empty", "too wide", "missing.png", "oh"):
        assert fault in found
