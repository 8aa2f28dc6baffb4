"""The names of ImageNet's classes stand where its labels say."""

import collections
import importlib.util
import pathlib
import re

import pytest

from data import class_names
from data.class_names import imagenet_class_names, imagenet_synsets


def twice(names: tuple[str, ...]) -> dict[str, list[int]]:
    places = collections.defaultdict(list)
    for place, name in enumerate(names):
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_synsets_are_those_of_the_labels_in_tensorflow_datasets():
    synsets = imagenet_synsets()
    assert len(synsets) == len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)
    package = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations[0]
    labels = pathlib.Path(package, "datasets", "imagenet2012", "labels.txt").read_text().split()
    assert list(synsets) == labels


@pytest.mark.parametrize(
    ("label", "synset", "name"),
    [
        (0, "n01440764", "tench, Tinca tinca"),
        (134, "n02012849", "crane"),
        (207, "n02099601", "golden retriever"),
        (248, "n02109961", "Eskimo dog, husky"),
        (281, "n02123045", "tabby, tabby cat"),
        (517, "n03126707", "crane"),
        (638, "n03710637", "maillot"),
        (639, "n03710721", "maillot, tank suit"),
        (657, "n03773504", "missile"),
        (744, "n04008634", "projectile, missile"),
        (999, "n15075141", "toilet tissue, toilet paper, bathroom tissue"),
    ],
)
def test_known_classes_stand_at_their_labels(label, synset, name):
    assert imagenet_synsets()[label] == synset
    assert imagenet_class_names()[label] == name


def test_a_name_is_given_twice_where_imagenet_does_and_nowhere_else():
    assert len(imagenet_class_names()) == 1000
    assert all(name == name.strip() != "" for name in imagenet_class_names())
    assert twice(imagenet_class_names()) == {"crane": [134, 517]}


def test_the_table_carries_the_notice_that_wordnet_asks_for():
    text = pathlib.Path(class_names.__file__).with_name("imagenet_classes.tsv").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    notice = " ".join(line.lstrip("# ") for line in head)
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute this software and database" in notice
    assert 'PROVIDED "AS IS"' in notice
