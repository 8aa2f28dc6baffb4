"""Writes a network for Keras, TensorFlow, ONNX Runtime and LiteRT, and has each run it.

python scripts/export.py --workdir=runs/digits_condconv --format=onnx --format=litert \
    --output=exported
"""

from absl import flags

from condconv.engine import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "Of it: 'last', 'best', a step or a path.")
_SOURCE = flags.DEFINE_string("source", None, ".keras file, in place of a run.")
_FORMAT = flags.DEFINE_multi_enum(
    "format", [], ["keras", "saved_model", "onnx", "litert"], "To write; repeatable."
)
_PRECISION = flags.DEFINE_multi_enum(
    "precision", ["float32"], ["float32", "float16"], "Of the weights for LiteRT; repeatable."
)
_FOLD = flags.DEFINE_bool("fold", True, "Make batch normalisations part of the convolutions.")
_OUTPUT = flags.DEFINE_string("output", None, "New folder.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(_: list[str]) -> None:
    """Writes the folder, and prints a row for each file in it that was checked."""
    from condconv.engine import export, tables
    from condconv.engine.errors import UsageError

    if (_WORKDIR.value is None) == (_SOURCE.value is None):
        raise UsageError("needs one of --workdir=FOLDER and --source=FILE.keras; see --help")
    if not (_FORMAT.value and _OUTPUT.value):
        raise UsageError("needs --format=FORMAT, once or more, and --output=FOLDER; see --help")
    export.check_packages(_FORMAT.value)
    output = export.check_output(_OUTPUT.value)
    rows = export.export(
        _source(), _FORMAT.value, output, precisions=_PRECISION.value, fold=_FOLD.value
    )
    tables.show(rows, _JSON.value)


def _source() -> object:
    from condconv.engine import config, export_source, files

    if _SOURCE.value:
        return export_source.of_file(_SOURCE.value, _as_of_imagenet)
    workdir = files.path(_WORKDIR.value)
    return export_source.of_run(config.load_run(workdir), workdir, _CHECKPOINT.value)


def _as_of_imagenet(size: int, num_classes: int) -> dict[str, object]:
    """Returns how a network of 1,000 classes is evaluated; of others nobody knows."""
    from data.class_names import imagenet_class_names
    from data.preprocess import crops

    if num_classes != 1000:
        return {}
    return {
        "evaluate": crops(size).evaluate,
        "preprocessing": ["pipeline.preprocessing = @crops", f"crops.image_size = {size}"],
        "class_names": imagenet_class_names(),
    }


if __name__ == "__main__":
    command.run(main)
