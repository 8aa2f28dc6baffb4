"""Networks as the authors' TensorFlow 1 graphs computed them, on random weights.

Each golden file holds every variable of a graph, four images and the logits they gave. Kernels of
more than 20,000 elements are not stored but drawn again, by network and name.
"""

import dataclasses
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class AuthorsGraph:
    variables: dict[str, np.ndarray]
    images: np.ndarray
    logits: np.ndarray
    routing: dict[int, np.ndarray]

    @property
    def scope(self) -> str:
        return next(iter(self.variables)).split("/")[0]


def load(name: str) -> AuthorsGraph:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        model = str(stored["model"])
        variables = {
            str(variable): _value(stored, model, str(variable), str(shape))
            for variable, shape in zip(stored["names"], stored["shapes"], strict=True)
        }
        routing = {
            int(key.removeprefix("route/")): stored[key]
            for key in stored.files
            if key.startswith("route/")
        }
        return AuthorsGraph(variables, stored["images"], stored["logits"], routing)


def _value(stored: np.lib.npyio.NpzFile, model: str, variable: str, shape: str) -> np.ndarray:
    if f"value/{variable}" in stored.files:
        return stored[f"value/{variable}"]
    draw = np.random.RandomState(zlib.crc32(f"{model}/{variable}".encode()))
    values = draw.randn(*map(int, shape.split(","))) * float(stored[f"generated/{variable}"])
    return values.astype(np.float32)
