"""ImageNet's tar files become TFDS' records, or an error of one line and nothing else."""

import collections
import fcntl
import importlib.util
import io
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys

import imagenet_tars
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from tensorflow_datasets.core.file_adapters import TfRecordFileAdapter
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from data import ilsvrc2012, prepare, progress
from scripts import command

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_imagenet.py"
Done = collections.namedtuple("Done", "code out err")

PHASES = (
    "checking train  5/5 synsets",
    "reading train  30/30 images",
    "writing train  30/30 images",
    "reading validation  10/10 images",
    "writing validation  10/10 images",
)
WRONG = {
    "train_missing": "train.tar is not there: give the path of ILSVRC2012_img_train.tar",
    "train_no_tar": "train.tar is no tar file",
    "train_cut": "train.tar is cut short or damaged at n0",
    "train_cut_even": "train.tar is cut short or damaged at n02105855.tar",
    "validation_missing": "validation.tar is not there: give the path of ILSVRC2012_img_val.tar",
    "validation_no_tar": "validation.tar is no tar file",
    "validation_cut": "validation.tar is cut short or damaged at ILSVRC2012_val_",
    "validation_cut_even": "validation.tar is cut short or damaged at ILSVRC2012_val_00000001.JPEG",
    "validation_gap": "ILSVRC2012_val_00000004.JPEG is not among them",
    "unknown_synset": "holds 'n99999999.tar', which does not belong there",
    "repeated_synset": "holds 'n02105855.tar', which is there twice",
    "foreign_picture": "holds 'n00000001_1.JPEG', which does not belong there",
    "inner_empty": "n02105855.tar in train_tar=",
    "inner_cut": "train.tar is cut short or damaged at n02105855_",
    "inner_cut_even": "train.tar is cut short or damaged at n02105855_29.JPEG",
}


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> imagenet_tars.Tars:
    return imagenet_tars.make_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_imagenet_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, capfd, monkeypatch):
    """The command, in this process: the same from the flags to the exit code, in no time."""
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)  # other tests follow

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            command.run(script.main)
        flags.FLAGS.unparse_flags()
        return Done(stopped.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def official(monkeypatch):
    """Makes the small copy the complete one."""
    monkeypatch.setattr(ilsvrc2012, "_missing_synsets", lambda tars: [])
    monkeypatch.setitem(ilsvrc2012.IMAGES, "train", 30)
    monkeypatch.setitem(ilsvrc2012.IMAGES, "validation", 10)


def arguments(tars: imagenet_tars.Tars, data_dir: pathlib.Path) -> list[str]:
    return [f"--train_tar={tars.train}", f"--val_tar={tars.validation}", f"--data_dir={data_dir}"]


def call(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(done: Done, code: int, said: str) -> None:
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1, done.err


def records(data_dir: pathlib.Path, split: str) -> dict[str, dict]:
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    undecoded = {"image": tfds.decode.SkipDecoding()}
    found = tfds.as_numpy(builder.as_dataset(split=split, decoders=undecoded))
    synsets = builder.info.features["label"].names
    return {
        each["file_name"].decode(): {"file": each["image"], "synset": synsets[each["label"]]}
        for each in found
    }


# --- What comes out ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tars, tmp_path_factory) -> tuple[pathlib.Path, subprocess.CompletedProcess]:
    data_dir = tmp_path_factory.mktemp("made") / "data"
    return data_dir, call(str(SCRIPT), *arguments(tars, data_dir), "--allow_incomplete")


def test_the_command_says_what_there_is_and_what_to_do_with_it(made):
    data_dir, done = made
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0] == f"imagenet2012 is ready in {data_dir}/imagenet2012/5.1.0"
    assert [line.split() for line in out[1:4]] == [
        ["train", "30"],
        ["validation", "10"],
        ["classes", "1,000"],
    ]
    assert out[4].startswith("  without 995 of 1,000 synsets (n01491361, n01494475, n01496331, …)")
    assert out[-2:] == [
        "  pipeline.source = @imagenet2012",
        f"  imagenet2012.data_dir = '{data_dir}'",
    ]


def test_nothing_else_is_said_or_left(made):
    data_dir, done = made
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["missing"] * 3
    assert os.listdir(data_dir) == ["imagenet2012"]
    assert os.listdir(data_dir / "imagenet2012") == ["5.1.0"]


def test_every_picture_is_there_under_its_synset(made):
    names = [n for s in imagenet_tars.synsets(5) for n in imagenet_tars.train_names(s, 6)]
    train = records(made[0], "train")
    assert sorted(train) == sorted(names)
    assert all(name.startswith(f"{record['synset']}_") for name, record in train.items())
    validation = records(made[0], "validation")
    labels = imagenet_tars.official("validation_labels")
    assert {name: record["synset"] for name, record in validation.items()} == {
        imagenet_tars.validation_name(n + 1): labels[n] for n in range(10)
    }
    odd = {imagenet_tars.CMYK, imagenet_tars.PNG}
    for name, record in (train | validation).items():
        assert (record["file"] == imagenet_tars.encoded(name)) == (name not in odd)


@pytest.mark.parametrize("name", [imagenet_tars.CMYK, imagenet_tars.PNG, "n01440764_8.JPEG"])
def test_every_picture_is_a_jpeg_in_colour_or_grey(made, name):
    before = imagenet_tars.picture(name)
    after = Image.open(io.BytesIO(records(made[0], "train")[name]["file"]))
    assert after.format == "JPEG"
    assert after.mode == ("L" if name.endswith("_8.JPEG") else "RGB")
    difference = np.asarray(after, float) - np.asarray(before.convert(after.mode), float)
    assert np.abs(difference).mean() < 5


def test_a_complete_copy_needs_no_permission_and_is_made_once(run, tars, official, tmp_path):
    done = run(*arguments(tars, tmp_path))
    assert (done.code, done.err) == (0, "")
    assert "without" not in done.out
    again = run(*arguments(tars, tmp_path))
    assert again == Done(0, done.out.replace("is ready", "was there already"), "")


def test_progress_is_told_of_every_phase(run, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    done = run(*arguments(tars, tmp_path), "--allow_incomplete")
    for phase in PHASES:
        assert re.search(rf"^{phase}  [\d,]+/s  0:00 left$", done.err, re.MULTILINE), phase
        assert re.search(rf"^{phase}  done in 0:0\d$", done.err, re.MULTILINE), phase
    assert re.search(r"^reading train  7/30 images  [\d,]+/s", done.err, re.MULTILINE)


# --- What is wrong with the files -------------------------------------------------------------


def test_no_fault_is_forgotten():
    assert WRONG.keys() == set(imagenet_tars.FAULTS)


@pytest.mark.parametrize("fault", WRONG)
def test_a_faulty_file_is_refused_before_anything_is_written(run, tmp_path, fault):
    tars = imagenet_tars.make_tars(tmp_path / "tars", fault=fault)
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, WRONG[fault])
    assert done.err.startswith("prepare_imagenet.py: ")
    assert not (tmp_path / "data").exists()


def test_a_partial_copy_is_refused_and_what_is_missing_named(run, tars, tmp_path, monkeypatch):
    done = run(*arguments(tars, tmp_path / "data"))
    synsets = "lack 995 of 1,000 synsets (n01491361, n01494475, n01496331, …)"
    images = "49,990 of 50,000 validation images (ILSVRC2012_val_00000011.JPEG …)"
    assert_refused(done, 2, f"{synsets} and {images}: get the complete ones")
    monkeypatch.setattr(ilsvrc2012, "_missing_synsets", lambda tars: [])
    monkeypatch.setitem(ilsvrc2012.IMAGES, "validation", 10)
    done = run(*arguments(tars, tmp_path / "data"))
    assert_refused(done, 2, "lack 1,281,137 of 1,281,167 training images: get")
    assert not (tmp_path / "data").exists()


def test_more_images_than_there_are_is_no_copy_at_all(run, tars, official, tmp_path, monkeypatch):
    monkeypatch.setitem(ilsvrc2012.IMAGES, "train", 29)
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "holds 30 images, and there are 29: give ILSVRC2012_img_train.tar")
    monkeypatch.setitem(ilsvrc2012.IMAGES, "validation", 9)
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "'ILSVRC2012_val_00000010.JPEG', which does not belong there")


# --- What is wrong with the place -------------------------------------------------------------


def test_flags_are_needed_and_folders_are_local(run, tars):
    assert_refused(run(), 2, "needs --train_tar=FILE, --val_tar=FILE and --data_dir=FOLDER")
    done = run(*arguments(tars, "gs://bucket/data"))
    assert_refused(done, 2, "data_dir=gs://bucket/data is no local folder")


def test_a_file_in_place_of_the_folder_is_refused(run, tars, tmp_path):
    (tmp_path / "data").write_text("")
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "data cannot be written to: name another folder")


def test_too_little_room_is_told_beforehand(run, tars, tmp_path, monkeypatch):
    size = tars.train.stat().st_size + tars.validation.stat().st_size
    usage = type(shutil.disk_usage("/"))(10**9, 0, int(1.04 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "GB: make room or name another folder")
    assert not (tmp_path / "data").exists()


def test_too_few_open_files_are_told_beforehand(run, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "1024 files may be open at once and 1200 have to be")


def test_two_at_once_do_not_meet(run, tars, tmp_path):
    folder = tmp_path / "imagenet2012"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    done = run(*arguments(tars, tmp_path), "--allow_incomplete")
    os.close(other)
    assert done.code == 2
    assert "another run is at work" in done.err.splitlines()[-1]
    assert os.listdir(folder) == []


def test_what_is_there_already_must_be_whole(run, tars, made, tmp_path):
    shutil.copytree(made[0], tmp_path / "data")
    done = run(*arguments(tars, tmp_path / "data"))
    assert_refused(done, 2, "is there but lacks 1,281,137 of 1,281,167 training images and 49,990")
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert (done.code, "was there already" in done.out) == (0, True)
    shard = next((tmp_path / "data/imagenet2012/5.1.0").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "cannot be used (the shards of train have")
    shard.unlink()
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "cannot be used (no such file or directory): remove it")
    shutil.rmtree(tmp_path / "data/imagenet2012/5.1.0")
    (tmp_path / "data/imagenet2012/5.1.0").mkdir()
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_refused(done, 2, "cannot be used (")


# --- What goes wrong on the way ---------------------------------------------------------------


def interrupting(number: int, after: int = 7):
    """Returns what writes shards, but sends a signal to its own process before it is done."""
    write = TfRecordFileAdapter.write_examples

    def examples(all_of_them):
        for count, example in enumerate(all_of_them):
            if count == after:
                os.kill(os.getpid(), number)
            yield example

    return lambda path, iterator: write(path, examples(iterator))


def assert_nothing_kept(done: Done, code: int, said: str, tmp_path: pathlib.Path) -> None:
    assert (done.code, done.out) == (code, "")
    *before, last = done.err.splitlines()
    assert all(line.startswith("missing: ") for line in before), done.err
    assert said in last
    assert "nothing was kept" in last
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_it_keeps_nothing(run, tars, tmp_path, monkeypatch, number, code):
    monkeypatch.setattr(TfRecordFileAdapter, "write_examples", interrupting(number))
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_nothing_kept(done, code, "stopped", tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_killed_in_the_middle_it_leaves_nothing_that_looks_complete(run, tars, tmp_path):
    kill = (
        "import os, runpy, signal, sys, test_prepare as t; sys.argv = sys.argv[1:]; "
        "t.TfRecordFileAdapter.write_examples = t.interrupting(signal.SIGKILL); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [*arguments(tars, tmp_path), "--allow_incomplete"]
    done = call("-c", f"import sys; sys.path.append('tests'); {kill}", str(SCRIPT), *flags)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (tmp_path / "imagenet2012").iterdir()
    assert list(left.rglob("*.tfrecord*"))
    assert not tfds.builder("imagenet2012", data_dir=tmp_path).info.splits
    assert run(*flags).code == 0
    assert os.listdir(tmp_path / "imagenet2012") == ["5.1.0"]
    assert len(records(tmp_path, "train")) == 30


def test_what_a_killed_run_left_goes_whatever_else_is_to_do(run, tars, made, tmp_path):
    shutil.copytree(made[0], tmp_path / "data")
    (tmp_path / "data/imagenet2012/incomplete.prepare_imagenet/tars").mkdir(parents=True)
    assert run(*arguments(tars, tmp_path / "data"), "--allow_incomplete").code == 0
    assert os.listdir(tmp_path / "data/imagenet2012") == ["5.1.0"]


def test_a_full_disk_is_told_in_one_line_and_nothing_kept(run, tars, tmp_path):
    """No file may grow beyond 20 kB: the shard of 42 kB fails as on a full disk, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_kept(done, 1, "5.1.0 could not be made (file too large)", tmp_path)


def test_a_full_disk_is_called_so(run, tars, tmp_path, monkeypatch):
    def write(path, iterator) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")

    monkeypatch.setattr(TfRecordFileAdapter, "write_examples", write)
    done = run(*arguments(tars, tmp_path / "data"), "--allow_incomplete")
    assert_nothing_kept(done, 1, "5.1.0 could not be made (no space left on device)", tmp_path)


def test_records_are_counted_afterwards(run, tars, official, tmp_path, monkeypatch):
    def skipping(file, method):
        _, *rest = [(name, io.BytesIO(f.read())) for name, f in iter_archive(file, method)]
        return rest

    iter_archive = tfds.download.iter_archive
    monkeypatch.setattr(tfds.download, "iter_archive", skipping)
    done = run(*arguments(tars, tmp_path / "data"))
    assert_nothing_kept(done, 1, "25 train images and not 30", tmp_path)


def test_labels_are_compared_with_names_afterwards(run, tars, official, tmp_path, monkeypatch):
    def shifted(path):
        labels = get_labels(path)
        return dict(zip(labels, [*labels.values()][1:] + ["n01440764"], strict=True))

    get_labels = imagenet_common.get_validation_labels
    monkeypatch.setattr(imagenet_common, "get_validation_labels", shifted)
    done = run(*arguments(tars, tmp_path / "data"))
    assert_nothing_kept(done, 1, "has the label", tmp_path)
