"""ImageNet: from ILSVRC2012's two official tar files to the records of TFDS' ``imagenet2012``.

Whatever a caller can mend is found before anything is written. TFDS' own builder then works in a
folder beside the final place. What it made is checked there, and moved last: whatever has the
final name is complete.
"""

import contextlib
import dataclasses
import fcntl
import io
import os
import pathlib
import resource
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data.ilsvrc2012 import (
    ARGUMENTS,
    CLASSES,
    IMAGES,
    OFFICIAL,
    check_tars,
    missing_images,
    tfds_list,
)
from data.progress import Progress

T = TypeVar("T")

VERSION = "5.1.0"
_WORK = "incomplete.prepare_imagenet"

# Free space as a multiple of the tar files. TFDS writes a split to 1,000 buckets, then reads one
# after the other into memory, deletes it and appends its records to the shards: a split is there
# once, not twice, next to the one before it. A record adds less to a picture than a tar does. The
# rest is for the last blocks of 1,000 buckets and 1,088 shards, and for what TFDS recodes.
_ROOM = 1.05

# All the buckets are open at once. A split below 1,000 MiB has none: it fits into TFDS' memory.
_OPEN_FILES, _BYTES_IN_MEMORY = 1200, 1000 << 20

_RECORD_OVERHEAD = 16  # bytes that TFRecord adds to each: its length and two checksums
_PHASES = ("reading", "writing")  # of a split, in TFDS' order
_SAMPLE = 1000  # records of each split whose labels are checked


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set that is complete, or as complete as was asked for.

    Attributes:
        data_dir: folder of data sets, what TFDS is to be given.
        folder: of the records.
        images: by split.
        missing: what it lacks of the official copy, in words; empty if nothing.
        already_there: whether there was nothing to do.
    """

    data_dir: pathlib.Path
    folder: pathlib.Path
    images: Mapping[str, int]
    missing: Sequence[str]
    already_there: bool


def prepare(
    train_tar: str | os.PathLike,
    val_tar: str | os.PathLike,
    data_dir: str | os.PathLike,
    allow_incomplete: bool = False,
) -> Prepared:
    """Makes the records, or finds them made. Tells on stderr how far it is.

    Args:
        train_tar: the training images: a tar file of one tar file for each synset.
        val_tar: the validation images: a flat tar file.
        data_dir: local folder; the records go to ``imagenet2012/5.1.0`` in it.
        allow_incomplete: whether fewer synsets and images than the official ones will do.

    Raises:
        ValueError: for what the caller can mend; nothing has been written.
        OSError, RuntimeError: for a failure later; nothing has been kept.
    """
    root = _local(data_dir)
    folder = root / "imagenet2012"
    place = folder / VERSION
    _remove_leftovers(folder)
    if place.exists():
        images = _usable(place, allow_incomplete)
        return Prepared(root, place, images, missing_images(images), already_there=True)
    tars = {"train": _file("train", train_tar), "validation": _file("validation", val_tar)}
    size = sum(tar.stat().st_size for tar in tars.values())
    _check_room(root, size)
    _check_open_files(size)
    with Progress() as progress:
        images, missing = check_tars(tars, allow_incomplete, progress.track)
        for line in missing:
            progress.say(f"missing: {line}")
        with _stop_on_signals(), _work_folder(folder) as work, _in_one_line(place):
            _build(tars, images, work, progress).rename(place)
    return Prepared(root, place, images, missing, already_there=False)


# --- Before: the places -----------------------------------------------------------------------


def _local(data_dir: str | os.PathLike) -> pathlib.Path:
    if "://" in str(data_dir):
        raise ValueError(
            f"data_dir={data_dir} is no local folder: name one, and copy it there afterwards"
        )
    return pathlib.Path(data_dir).expanduser().absolute()


def _file(split: str, path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).expanduser().absolute()
    named = f"{ARGUMENTS[split]}={path}"
    official = f"give the path of {OFFICIAL[split]}, from image-net.org"
    if not path.is_file():
        raise ValueError(f"{named} {'is no file' if path.exists() else 'is not there'}: {official}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{named} may not be read: change its permissions")
    return path


def _check_room(root: pathlib.Path, size: int) -> None:
    """Checks that tar files of ``size`` bytes in all can become records in ``root``."""
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"data_dir={root} cannot be written to: name another folder")
    free, needed = shutil.disk_usage(there).free, size * _ROOM
    if free < needed:
        raise ValueError(
            f"data_dir={root} has {free / 1e9:.4g} GB free and needs {needed / 1e9:.4g} GB: "
            "make room or name another folder"
        )


def _check_open_files(size: int) -> None:
    """Raises the limit of open files, which is usually below what TFDS needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if allowed < _OPEN_FILES and size > _BYTES_IN_MEMORY:
        raise ValueError(
            f"{hard} files may be open at once and {_OPEN_FILES} have to be: "
            f"raise the hard limit (ulimit -Hn {_OPEN_FILES}, or /etc/security/limits.conf)"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


# --- The work ---------------------------------------------------------------------------------


def _build(
    tars: Mapping[str, pathlib.Path],
    images: Mapping[str, int],
    work: pathlib.Path,
    progress: Progress,
) -> pathlib.Path:
    """Lets TFDS make the records below ``work``.

    Returns:
        The folder of the records, which are as many as ``images`` says.

    Raises:
        RuntimeError: if they are not, or not what they should be.
    """
    import tensorflow_datasets as tfds

    manual = work / "tars"
    manual.mkdir()
    for split, tar in tars.items():
        (manual / OFFICIAL[split]).symlink_to(tar)
    builder = tfds.builder(f"imagenet2012:{VERSION}", data_dir=work)
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    built = pathlib.Path(builder.data_dir)
    with _silence(), _shown(progress, images):
        builder.download_and_prepare(download_dir=work / "downloads", download_config=config)
        counts = _verify(built)
    if counts != images:
        found = ", ".join(f"{counts[s]:,} {s} images and not {images[s]:,}" for s in images)
        raise RuntimeError(f"the records hold {found}")
    return built


@contextlib.contextmanager
def _work_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a folder to work in inside ``folder``, and leaves nothing of it behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    work = folder / _WORK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # there is something in it: the records
                path.rmdir()


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a killed run left, so that its room counts as free."""
    if (folder / _WORK).exists():
        with _locked(folder):
            shutil.rmtree(folder / _WORK)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends.

    Raises:
        ValueError: if another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(f"another run is at work in {folder}: wait for it or stop it") from error
    except OSError:
        pass  # a file system without locks on folders, NFS for one
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Makes a lost terminal and SIGTERM act like Ctrl-C, so that leftovers go at once."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _in_one_line(place: pathlib.Path) -> Iterator[None]:
    """Turns a failure of the work into a RuntimeError that says what became of it."""
    import tensorflow as tf

    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError, tf.errors.OpError) as error:
        raise RuntimeError(
            f"{place} could not be made ({_reason(error)}); nothing was kept: "
            "see to that and start again"
        ) from error


def _reason(error: BaseException) -> str:
    """Returns why, in one line: the innermost cause, without what TFDS wraps around it."""
    while error.__cause__:
        error = error.__cause__
    of_tensorflow = getattr(error, "message", "").rpartition("; ")[2]  # after the path
    text = getattr(error, "strerror", None) or of_tensorflow or str(error).strip()
    line = (text or type(error).__name__).splitlines()[0]
    return line[0].lower() + line[1:]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps off what TFDS prints and logs: each failure comes as an exception too."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _shown(progress: Progress, images: Mapping[str, int]) -> Iterator[None]:
    """Puts ``progress`` in place of TFDS' bars, which know no totals without a network."""
    from tensorflow_datasets.core import utils

    phases = iter([(f"{doing} {split}", images[split]) for split in images for doing in _PHASES])

    def track(items: Iterable[T], *_: Any, unit: str = "", **__: Any) -> Iterable[T]:
        return progress.track(items, *next(phases)) if unit == " examples" else items

    bars = utils.tqdm
    utils.tqdm = track
    try:
        yield
    finally:
        utils.tqdm = bars


# --- After ------------------------------------------------------------------------------------


def _usable(place: pathlib.Path, allow_incomplete: bool) -> dict[str, int]:
    """Returns the images by split of records that are already there.

    Raises:
        ValueError: if they are not whole, or fewer than they have to be.
    """
    try:
        with _silence():
            images = _verify(place)
    except Exception as error:  # a folder of unknown origin: anything may be wrong with it
        raise ValueError(
            f"{place} is there but cannot be used ({_reason(error)}): remove it and start again"
        ) from error
    missing = missing_images(images)
    if missing and not allow_incomplete:
        raise ValueError(
            f"{place} is there but lacks {' and '.join(missing)}: "
            "remove it and start again, or pass allow_incomplete to use it as it is"
        )
    return images


def _verify(place: pathlib.Path) -> dict[str, int]:
    """Returns the images by split, as many as the shards have bytes for.

    Raises:
        RuntimeError: if shards are cut short, or a label is not that of the image's name.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(place)
    if not IMAGES.keys() <= builder.info.splits.keys():
        raise RuntimeError(f"it has {', '.join(builder.info.splits)}, not {', '.join(IMAGES)}")
    if builder.info.features["label"].names != tfds_list("labels"):
        raise RuntimeError(f"the labels are not ImageNet's {CLASSES:,} synsets")
    for split in IMAGES:
        _check_size(builder.info.splits[split])
        _check_labels(builder, split)
    return {split: builder.info.splits[split].num_examples for split in IMAGES}


def _check_size(split: Any) -> None:
    size = sum(os.path.getsize(path) for path in split.filepaths)
    told = split.num_bytes + split.num_examples * _RECORD_OVERHEAD
    if size != told:
        raise RuntimeError(f"the shards of {split.name} have {size:,} bytes and not {told:,}")


def _check_labels(builder: Any, split: str) -> None:
    """Compares labels with names in the first shards, where TFDS' shuffling put a fair sample."""
    import tensorflow_datasets as tfds

    synsets = builder.info.features["label"].names
    undecoded = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_dataset(split=split, decoders=undecoded, shuffle_files=False)
    for record in tfds.as_numpy(records.take(_SAMPLE)):
        name = record["file_name"].decode()
        if synsets[record["label"]] != _synset(name):
            raise RuntimeError(f"{name} has the label {synsets[record['label']]}")


def _synset(name: str) -> str:
    """Returns the synset of an image: by its name, or by its number in the validation images."""
    stem, number = name.removesuffix(".JPEG").rsplit("_", 1)
    in_validation = stem == "ILSVRC2012_val"
    return tfds_list("validation_labels")[int(number) - 1] if in_validation else stem
