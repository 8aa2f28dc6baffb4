"""Networks of one's own with conditional convolutions: train, save, load, export.

python examples/own_network.py --output=own

All it needs is ``pip install condconv tensorflow``, and for ONNX ``'condconv[export]'``.
"""

import argparse
import pathlib

import keras
import numpy as np

import condconv

CLASSES, SIZE = 3, 16


def functional() -> keras.Model:
    """Returns a network with two conditional convolutions that share their routing weights."""
    images = keras.Input((SIZE, SIZE, 3), name="images")
    x = keras.layers.Rescaling(1 / 127.5, -1)(images)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    routing_weights = condconv.Routing(num_experts=4)(x)
    x = condconv.DepthwiseCondConv2D(3, num_experts=4, padding="same")(x, routing_weights)
    x = condconv.CondConv2D(16, 1, num_experts=4, activation="relu")(x, routing_weights)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(CLASSES, name="logits")(x))


@keras.saving.register_keras_serializable("own")
class Subclassed(keras.Model):
    """The same idea as a class; a layer that gets no routing weights makes its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = condconv.CondConv2D(16, 3, num_experts=4, strides=2, activation="relu")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.classifier = condconv.CondDense(CLASSES, num_experts=4)

    def call(self, images):
        """Maps images (N, H, W, 3), 0–255, to logits (N, classes)."""
        return self.classifier(self.pool(self.conv(images / 255)))


def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise with a bright bar, and where it is: left, middle or right."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    images = rng.uniform(0, 150, (count, SIZE, SIZE, 3)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        image[:, label * SIZE // CLASSES :][:, : SIZE // CLASSES, label] = 255
    return images, labels


def train(model: keras.Model, epochs: int = 8) -> float:
    """Trains a network, and returns its accuracy on what it was trained on."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    images, labels = examples(240)
    model.fit(images, labels, batch_size=24, epochs=epochs, verbose=0)
    return model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]


def keep(model: keras.Model, path: str) -> float:
    """Saves, loads and exports a network; returns by how much the loaded one differs."""
    model.save(f"{path}.keras")
    loaded = keras.saving.load_model(f"{path}.keras")  # `import condconv` is all it takes
    images, _ = examples(5)
    difference = model.predict(images, verbose=0) - loaded.predict(images, verbose=0)
    loaded.export(f"{path}_saved_model", verbose=False)
    return float(np.max(np.abs(difference)))


def main() -> None:
    """Trains both networks and keeps them; with ``--onnx``, the functional one in ONNX too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="Folder.")
    parser.add_argument("--onnx", action="store_true", help="Needs the extra 'export'.")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    models = {"functional": functional(), "subclassed": Subclassed()}
    for name, model in models.items():
        accuracy, difference = train(model), keep(model, str(arguments.output / name))
        print(f"{name}: accuracy {accuracy:.2f}, loaded it differs by {difference:.1g}")
    print(f"functional: {condconv.count_cost(models['functional']).multiply_adds:,} multiply-adds")
    if arguments.onnx:
        condconv.write_onnx(models["functional"], arguments.output / "functional.onnx")


if __name__ == "__main__":
    main()
