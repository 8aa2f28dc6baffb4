"""Data sets that tensorflow-datasets has prepared, read from their files; never downloaded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gin
import tensorflow as tf

from data.source import Example, Source, Split, record_files

_NAMES = ("file_name", "filename")  # features that say what file an image came from


@gin.register
def tfds_dataset(
    name: str,
    data_dir: str | None = None,
    minival_percent: int = 0,
    image: str = "image",
    label: str = "label",
) -> Source:
    """Any data set for classification that tensorflow-datasets has prepared, with its own splits.

    Args:
        name: such as "cifar10" or "imagenet_v2/matched-frequency".
        data_dir: where it was prepared; TFDS' own default if None.
        minival_percent: share of "train" to hold out: its last records become the split
            "minival", and "train" is without them.
        image, label: names of the features.

    Raises:
        ValueError: if there is no such data set, or it is not one of images with a class each.
    """
    builder = prepared(name, data_dir)
    features = builder.info.features
    if label not in features or not hasattr(features[label], "num_classes"):
        raise ValueError(
            f"{name} has no feature {label!r} of classes; it has {', '.join(sorted(features))}"
        )
    parse = parser(builder, image, lambda record: tf.cast(record[label], tf.int64))
    return Source(
        name=builder.info.name,
        num_classes=features[label].num_classes,
        splits=splits(builder, parse, minival_percent),
        class_names=features[label].names,
    )


def prepared(name: str, data_dir: str | None) -> Any:
    """Returns TFDS' builder of a data set that is there.

    Raises:
        ValueError: if it is not.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        first, *_ = str(error).strip().split("\n")
        raise ValueError(f"tensorflow-datasets has no data set {name!r}: {first}") from error
    if not builder.info.splits:
        raise ValueError(
            f"{name} is not prepared in {data_dir or builder.data_dir.split(name)[0]}: name the "
            "folder it is in as data_dir, or prepare it (imagenet2012: "
            "scripts/prepare_imagenet.py; others: tfds build)"
        )
    return builder


def parser(
    builder: Any, image: str, label: Callable[[dict[str, tf.Tensor]], tf.Tensor]
) -> Callable[[tf.Tensor], Example]:
    """Returns what turns a record into an example, the image still encoded.

    Args:
        builder: of the data set.
        image: name of the feature.
        label: the features of a record to its label.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    if image not in features or not isinstance(features[image], tfds.features.Image):
        raise ValueError(
            f"{builder.name} has no image {image!r}; it has {', '.join(sorted(features))}"
        )
    name = next((name for name in _NAMES if name in features), None)

    def parse(serialized: tf.Tensor) -> Example:
        record = features.deserialize_example(
            serialized, decoders={image: tfds.decode.SkipDecoding()}
        )
        known = record[name] if name else tf.constant("")
        return {"image": record[image], "label": label(record), "id": known}

    return parse


def splits(
    builder: Any, parse: Callable[[tf.Tensor], Example], minival_percent: int = 0
) -> dict[str, Split]:
    """Returns the splits of a prepared data set; "train" in two if some is held out.

    Raises:
        ValueError: if the share is no percentage, or there is no "train" to take it from.
    """
    names = {name: name for name in builder.info.splits}
    if minival_percent:
        _check_minival(minival_percent, names)
        names |= {
            "train": f"train[:{100 - minival_percent}%]",
            "minival": f"train[{100 - minival_percent}%:]",
        }
    return {name: _split(builder.info.splits[part], parse) for name, part in names.items()}


def sizes(examples: Mapping[str, int], minival_percent: int = 0) -> dict[str, int]:
    """Returns how many examples ``splits`` gives each split, by how many are prepared.

    Raises:
        ValueError: as ``splits`` does.
    """
    if not minival_percent:
        return dict(examples)
    _check_minival(minival_percent, examples)
    whole = examples["train"]
    kept = round((100 - minival_percent) * whole / 100)  # as TFDS cuts its percentages
    return {**examples, "train": kept, "minival": whole - kept}


def _check_minival(percent: int, names: Collection[str]) -> None:
    if not 0 < percent < 100 or "train" not in names:
        raise ValueError(
            f"minival_percent takes 0 to 99 of a split 'train', not {percent} of {', '.join(names)}"
        )


def _split(info: Any, parse: Callable[[tf.Tensor], Example]) -> Split:
    files: Sequence[Any] = [part for part in info.file_instructions if part.take]
    return record_files(
        [part.filename for part in files],
        [part.skip for part in files],
        [part.take for part in files],
        parse,
    )
