"""Small tar files of ILSVRC2012's official structure, real JPEGs inside, whole or with a fault."""

import io
import pathlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"  # what the official copy has them as
FAULTS = (
    *("train_missing", "train_no_tar", "train_cut", "train_cut_even"),
    *("validation_missing", "validation_no_tar", "validation_cut", "validation_cut_even"),
    *("unknown_synset", "repeated_synset", "foreign_picture", "validation_gap"),
    *("inner_empty", "inner_cut", "inner_cut_even"),
)
Members = list[tuple[str, bytes]]


class Tars(NamedTuple):
    """Where the two files are (or, with a fault, should be)."""

    train: pathlib.Path
    validation: pathlib.Path


def official(name: Literal["labels", "validation_labels"]) -> list[str]:
    """Returns synsets as TFDS ships them: the 1,000 sorted ones, or the 50,000 of validation."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}.txt").read_text().split()


def synsets(classes: int) -> list[str]:
    """Returns ``classes`` official synsets: the first ones, and those of the two odd pictures."""
    odd = [CMYK.split("_")[0], PNG.split("_")[0]]
    first = [synset for synset in official("labels")[:classes] if synset not in odd]
    return sorted([*first[: classes - 2], *odd])


def train_names(synset: str, number: int) -> list[str]:
    """Returns the names of a synset's pictures, the odd one among them."""
    odd = [name for name in (CMYK, PNG) if name.startswith(synset)]
    return [*odd, *(f"{synset}_{7 * i + 1}.JPEG" for i in range(number - len(odd)))]


def validation_name(number: int) -> str:
    """Returns the name of the validation picture ``number``, from 1."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def picture(name: str, scale: int = 1) -> Image.Image:
    """Returns the smooth random picture of a name, always the same; the "…_8.JPEG" are grey."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    width, height = (scale * draw.integers(24, 64, 2)).tolist()
    mode = "CMYK" if name == CMYK else "L" if name.endswith("_8.JPEG") else "RGB"
    noise = draw.integers(0, 256, (4, 4, len(mode)), np.uint8)
    return Image.fromarray(noise.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


def encoded(name: str, scale: int = 1) -> bytes:
    """Returns the file of a name: a JPEG, but for the one that only says so."""
    file = io.BytesIO()
    picture(name, scale).save(file, "PNG" if name == PNG else "JPEG", quality=95)
    return file.getvalue()


def tar(members: Members) -> bytes:
    """Returns a tar file of flat members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def pictures(names: Iterable[str], scale: int) -> Members:
    """Returns the files of some names."""
    return [(name, encoded(name, scale)) for name in names]


def make_tars(
    folder: pathlib.Path,
    classes: int = 5,
    train_per_class: int = 6,
    validation: int = 10,
    *,
    fault: str = "",
    scale: int = 1,
) -> Tars:
    """Writes a small copy.

    Args:
        folder: to write to; is made.
        classes: synsets, two at least.
        train_per_class: pictures in each.
        validation: pictures.
        fault: what is wrong with it, one of ``FAULTS``; nothing by default.
        scale: of the pictures; at 1 they have 24 to 63 pixels a side.

    Returns:
        The paths, of a file that is missing too.
    """
    inner = [
        (f"{synset}.tar", tar(pictures(train_names(synset, train_per_class), scale)))
        for synset in synsets(classes)
    ]
    numbers = [n + (fault == "validation_gap" and n > 3) for n in range(validation, 0, -1)]
    content = Tars(
        train=tar(_spoil_members(inner, fault)),
        validation=tar(pictures(map(validation_name, numbers), scale)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tars = Tars(folder / "train.tar", folder / "validation.tar")
    for split in Tars._fields:
        if fault != f"{split}_missing":
            getattr(tars, split).write_bytes(_spoil_file(getattr(content, split), fault, split))
    return tars


def _spoil_members(inner: Members, fault: str) -> Members:
    """Returns the synsets' tars, a faulty one at the end."""
    name, content = inner[-1]
    last: dict[str, Members] = {
        "unknown_synset": [("n99999999.tar", content)],
        "repeated_synset": [(name, content), (name, content)],
        "foreign_picture": [(name, tar([("n00000001_1.JPEG", b"?")]))],
        "inner_empty": [(name, tar([]))],
        "inner_cut": [(name, content[: _end(content) // 2])],
        "inner_cut_even": [(name, content[: _end(content)])],
    }
    return [*inner[:-1], *last.get(fault, inner[-1:])]


def _spoil_file(content: bytes, fault: str, split: str) -> bytes:
    spoilt = {
        f"{split}_cut": content[: _end(content) // 2],
        f"{split}_cut_even": content[: _end(content)],
        f"{split}_no_tar": b"<html>Please log in.</html>" * 99,
    }
    return spoilt.get(fault, content)


def _end(content: bytes) -> int:
    """Returns where the last member ends: a file cut there lacks no more than the end mark."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        *_, last = archive
    return last.offset_data + -(-last.size // 512) * 512
