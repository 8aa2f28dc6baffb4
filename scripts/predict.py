"""Says what is on images: the best classes of each, with their probabilities.

python scripts/predict.py --workdir=runs/efficientnet photo.jpg folder
python scripts/predict.py --source=exported/model.onnx --png=predictions.png photo.jpg
"""

from absl import flags

from scripts import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "Of it: 'last', 'best', a step or a path.")
_EMA = flags.DEFINE_bool("ema", None, "Use the averaged weights; by default if there are any.")
_SOURCE = flags.DEFINE_string(
    "source", None, ".keras, .onnx or .tflite file, or folder of a SavedModel, in place of a run."
)
_TOP = flags.DEFINE_integer("top", 5, "Classes to name.", lower_bound=1)
_PNG = flags.DEFINE_string("png", None, "PNG file: the images, with bars beside them.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(images: list[str]) -> int:
    """Prints a row for each class; returns 1 if an image could not be read."""
    if not images or (_WORKDIR.value is None) == (_SOURCE.value is None):
        raise command.WrongCall(
            "needs IMAGE… and one of --workdir=FOLDER and --source=FILE; see --help"
        )
    command.check_run(_WORKDIR.value)
    command.check_there([_SOURCE.value], "--source=")
    command.check_there(images)
    command.check_output("--png", _PNG.value, ".png")
    command.import_backend()
    from condconv.engine import files
    from condconv.tools import pictures, prediction, tables

    paths = prediction.find_images(images)
    classifier = _of_file() if _SOURCE.value else _of_run()
    found = list(prediction.predict(classifier, paths, _TOP.value))
    if found or _JSON.value:
        tables.show([row for each in found for row in each.rows(_JSON.value)], _JSON.value)
    if found and _PNG.value:
        pictures.draw_predictions(found, classifier.image, files.path(_PNG.value))
    return int(len(found) < len(paths))


def _of_run() -> object:
    from condconv.engine import config, files
    from condconv.tools import prediction

    workdir = files.path(_WORKDIR.value)
    run = config.load_run(workdir)
    return prediction.of_run(run, workdir, _CHECKPOINT.value, _EMA.value)


def _of_file() -> object:
    from condconv.engine.errors import UsageError, in_one_line
    from condconv.tools import network_file
    from condconv.tools.prediction import Classifier
    from data.class_names import imagenet_class_names
    from data.recorded import recorded

    network = network_file.open_file(_SOURCE.value)
    size = network.input_shape[1] or 224
    if not network.preprocessing:
        command.tell(f"{network.name} does not say how images are cut: ImageNet's way")
    with in_one_line(UsageError, errors=(ValueError, TypeError)):
        evaluate = recorded(network.preprocessing, size).evaluate
    names = network.labels or (imagenet_class_names() if network.num_classes == 1000 else ())
    return Classifier(network.name, network, network.input_shape, evaluate, names)


if __name__ == "__main__":
    command.run(main, "IMAGE…")
