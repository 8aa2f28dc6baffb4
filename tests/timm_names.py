"""The names and shapes of timm's state dicts, as version 1.0.31 has them."""

import gzip
import json
import pathlib

import keras

from models import released, released_timm

GOLDEN = pathlib.Path(__file__).parent / "golden" / "timm_shapes.json.gz"
SHAPES = json.loads(gzip.decompress(GOLDEN.read_bytes()))


def assert_names_and_shapes_are_timms(model: keras.Model, num_experts: int) -> None:
    name = released_timm.architecture(model.name, num_experts).name
    variables = released.variables_of(model)
    places = {
        timm: list(released_timm.timm_layout(path, tuple(variables[path].shape))[0])
        for path, timm in released_timm.timm_names(model).items()
    }
    assert places == SHAPES[name]
