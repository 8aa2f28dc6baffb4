"""The two official tar files of ILSVRC2012: what is in them, and whether it is all there."""

import contextlib
import functools
import pathlib
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

ARGUMENTS = {"train": "train_tar", "validation": "val_tar"}
CLASSES = 1000
IMAGES = {"train": 1_281_167, "validation": 50_000}
OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}


def check_tars(
    tars: Mapping[str, pathlib.Path],
    allow_incomplete: bool,
    track: Callable[[Iterable[tarfile.TarInfo], str, int, str], Iterable[tarfile.TarInfo]],
) -> tuple[dict[str, int], list[str]]:
    """Reads every header in both files: the small file first, then each synset.

    Args:
        tars: by split.
        allow_incomplete: whether fewer synsets and images than the official ones will do.
        track: passes members through and tells how many are done: gets what is being done, how
            many there should be, and what they are.

    Returns:
        The number of images by split, and what is missing, in words.

    Raises:
        ValueError: if a file is cut short or not of the official structure, or if anything is
            missing and nothing may be.
    """
    images = {**IMAGES, "validation": _count_validation(tars["validation"], track)}
    named = f"train_tar={tars['train']}"
    with _opened(tars["train"], named) as train:
        synset_tars = _synset_tars(train, named)
        missing = _missing_synsets({member.name for member in synset_tars})
        _refuse([*missing, *missing_images(images)], allow_incomplete)
        walk = track(synset_tars, "checking train", len(synset_tars), "synsets")
        images["train"] = sum(_count_images(train, member) for member in walk)
    if images["train"] > IMAGES["train"]:
        raise ValueError(
            f"{named} holds {images['train']:,} images, and there are {IMAGES['train']:,}: "
            f"give {OFFICIAL['train']}"
        )
    missing += missing_images(images)
    _refuse(missing, allow_incomplete)
    return images, missing


def _count_validation(path: pathlib.Path, track: Callable[..., Iterable[tarfile.TarInfo]]) -> int:
    """Returns the number of validation images, numbered from 1 without a gap.

    TFDS takes their labels by position: after a gap, each would be another picture's.
    """
    named = f"val_tar={path}"
    with _opened(path, named) as validation:
        walk = track(validation, "checking validation", IMAGES["validation"], "images")
        members = _members(validation, named, walk)
    names = [_validation_name(n) for n in range(1, len(members) + 1)]
    lacks = sorted({*names} - {member.name for member in members})
    if lacks:
        raise ValueError(
            f"{named} holds {len(members):,} members, but {lacks[0]} is not among them: "
            f"give {OFFICIAL['validation']}, which is numbered without a gap"
        )
    official = {*names[: IMAGES["validation"]]}
    _check_members(members, official.__contains__, named, f"give {OFFICIAL['validation']}")
    return len(members)


def _synset_tars(train: tarfile.TarFile, named: str) -> list[tarfile.TarInfo]:
    """Returns the members of the training file, each the tar file of a synset of its own."""
    members = _members(train, named, train)
    known = {f"{synset}.tar" for synset in tfds_list("labels")}
    hint = f"give {OFFICIAL['train']}, with n01440764.tar and so on, {CLASSES:,} synsets"
    _check_members(members, known.__contains__, named, hint)
    return members


def _count_images(train: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """Returns the number of images in one synset's tar file."""
    named = f"{member.name} in train_tar={train.name}"
    with _opened(train.extractfile(member), named) as synset_tar:
        members = _members(synset_tar, named, synset_tar)
    synset = member.name.removesuffix(".tar")
    own = re.compile(rf"{synset}_\d+\.JPEG")
    hint = f"give {OFFICIAL['train']}, where these are pictures named {synset}_NUMBER.JPEG"
    _check_members(members, own.fullmatch, named, hint)
    return len(members)


def _check_members(
    members: Sequence[tarfile.TarInfo], fits: Callable[[str], Any], named: str, hint: str
) -> None:
    seen: set[str] = set()
    for member in members:
        faults = {
            "does not belong there": not fits(member.name),
            "is there twice": member.name in seen,
            "is empty or no file": not (member.isreg() and member.size),
        }
        if any(faults.values()):
            fault = next(fault for fault, applies in faults.items() if applies)
            raise ValueError(f"{named} holds {member.name!r}, which {fault}: {hint}")
        seen.add(member.name)
    if not members:
        raise ValueError(f"{named} holds nothing: {hint}")


def _members(
    tar: tarfile.TarFile, named: str, walk: Iterable[tarfile.TarInfo]
) -> list[tarfile.TarInfo]:
    """Returns the members of a tar file; ``walk`` goes over them.

    Raises:
        ValueError: if it is cut short. To tarfile, and so to TFDS, what is cut between two
            members just ends there; but a whole file ends with blocks of zeros.
    """
    members = []
    with contextlib.suppress(tarfile.ReadError):
        for member in walk:
            members.append(member)
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        last = members[-1].name if members else "its start"
        raise ValueError(f"{named} is cut short or damaged at {last}: download it again")
    return members


@contextlib.contextmanager
def _opened(file: pathlib.Path | IO[bytes], named: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar file, compressed ones not: TFDS does not either."""
    where = {"name": file} if isinstance(file, pathlib.Path) else {"fileobj": file}
    try:
        with tarfile.open(**where, mode="r:") as tar:
            yield tar
    except tarfile.ReadError as error:
        raise ValueError(f"{named} is no tar file ({error}): download it again") from error


def _missing_synsets(tars: Collection[str]) -> list[str]:
    missing = [synset for synset in tfds_list("labels") if f"{synset}.tar" not in tars]
    first = ", ".join([*missing[:3], *["…"] * (len(missing) > 3)])
    return [f"{len(missing):,} of {CLASSES:,} synsets ({first})"] if missing else []


def missing_images(images: Mapping[str, int]) -> list[str]:
    """Returns how many images there should be besides, in words; empty if they are all there."""
    train, validation = (IMAGES[split] - images[split] for split in IMAGES)
    from_here = _validation_name(images["validation"] + 1)
    lines = {
        f"{train:,} of {IMAGES['train']:,} training images": train,
        f"{validation:,} of {IMAGES['validation']:,} validation images ({from_here} …)": validation,
    }
    return [line for line, missing in lines.items() if missing]


def _refuse(missing: Sequence[str], allow_incomplete: bool) -> None:
    if missing and not allow_incomplete:
        raise ValueError(
            f"the tar files lack {' and '.join(missing)}: "
            "get the complete ones, or pass allow_incomplete to go without"
        )


def _validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@functools.cache
def tfds_list(name: str) -> list[str]:
    """Returns a list that TFDS ships: "labels", sorted, or "validation_labels", by image."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}.txt").read_text().split()
