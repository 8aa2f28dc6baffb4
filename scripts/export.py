"""Writes a network for Keras, TensorFlow, ONNX Runtime and LiteRT, and has each run it.

python scripts/export.py --workdir=runs/digits_condconv --format=onnx --format=litert \
    --output=exported
"""

from absl import flags

from scripts import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "Of it: 'last', 'best', a step or a path.")
_SOURCE = flags.DEFINE_string("source", None, ".keras file, in place of a run.")
_FORMAT = flags.DEFINE_multi_enum(
    "format", [], ["keras", "saved_model", "onnx", "litert"], "To write; repeatable."
)
_PRECISION = flags.DEFINE_multi_enum(
    "precision", ["float32"], ["float32", "float16", "int8"], "Of numbers in LiteRT; repeatable."
)
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config of the data for int8, to --source.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over it, or the run's own.")
_IMAGES = flags.DEFINE_integer("calibration_images", 300, "To calibrate int8.", lower_bound=1)
_FOLD = flags.DEFINE_bool("fold", True, "Make batch normalisations part of the convolutions.")
_OUTPUT = flags.DEFINE_string("output", None, "New folder.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(_: list[str]) -> None:
    """Writes the folder, and prints a row for each file in it that was checked."""
    if (_WORKDIR.value is None) == (_SOURCE.value is None):
        raise command.WrongCall("needs one of --workdir=FOLDER and --source=FILE.keras; see --help")
    if not (_FORMAT.value and _OUTPUT.value):
        raise command.WrongCall(
            "needs --format=FORMAT, once or more, and --output=FOLDER; see --help"
        )
    command.check_run(_WORKDIR.value)
    command.check_keras_file(_SOURCE.value)
    command.check_configs(_GIN_FILE.value)
    command.check_new_folder("--output", _OUTPUT.value)
    command.import_backend()
    import pathlib

    from condconv.tools import tables
    from condconv.tools.exports import calibration, export, trained_network

    export.check_packages(_FORMAT.value)
    experiment = trained_network.experiment(_WORKDIR.value, _GIN_FILE.value, _GIN_PARAM.value)
    network, images = _network(experiment), None
    if "litert" in _FORMAT.value and "int8" in _PRECISION.value:
        images = calibration.draw(experiment, network.model, _IMAGES.value)
    options = {"precisions": _PRECISION.value, "fold": _FOLD.value, "calibration": images}
    output = pathlib.Path(_OUTPUT.value)
    tables.show(export.export(network, _FORMAT.value, output, **options), _JSON.value)


def _network(experiment: object) -> object:
    from condconv.engine import files
    from condconv.tools.exports.trained_network import of_file, of_run
    from data.recorded import as_of_imagenet, preprocessing_in

    if _SOURCE.value:
        return of_file(_SOURCE.value, as_of_imagenet)
    workdir = files.path(_WORKDIR.value)
    return of_run(experiment, workdir, _CHECKPOINT.value, preprocessing_in)


if __name__ == "__main__":
    command.run(main)
