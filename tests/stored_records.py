"""Small data sets of photographs, written as TFDS writes its own."""

import pathlib

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from data.class_names import imagenet_synsets


def picture(number: int) -> np.ndarray:
    """An image of few colours, which compression hardly changes; its number can be read."""
    image = np.full((20, 24, 3), 40, np.uint8)
    image[:, :, number % 3] = 90 + 10 * (number % 16)
    return image


def store(folder: pathlib.Path, name: str, config: str, features: dict, **splits: list) -> str:
    """Writes a data set as TFDS does; a split is a list of records."""

    def examples(records: list) -> tf.data.Dataset:
        spec = tfds.features.FeaturesDict(features).get_tensor_spec()
        return tf.data.Dataset.from_generator(lambda: iter(records), output_signature=spec)

    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=tfds.builder_cls(name).VERSION if name.startswith("imagenet") else "1.0.0",
        config=config or None,
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: examples(records) for split, records in splits.items()},
        data_dir=str(folder),
    )
    return str(folder)


def labelled(count: int, classes: int = 1000) -> list[dict]:
    return [
        {"image": picture(i), "label": i % classes, "file_name": f"{i}.JPEG"} for i in range(count)
    ]


def features(names: list[str], **more) -> dict:
    return {
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=names),
        "file_name": tfds.features.Text(),
        **more,
    }


SYNSETS = list(imagenet_synsets())
