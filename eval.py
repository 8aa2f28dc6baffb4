"""Evaluates a trained network; the last line on stdout is one JSON object.

python eval.py --workdir=runs/digits_condconv
python eval.py --source=exported/model_int8.tflite --gin_file=configs/digits.gin
"""

import json

from absl import flags

from scripts import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; its config.gin says the rest.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best', a step or a path.")
_EMA = flags.DEFINE_bool("ema", None, "Use the averaged weights; by default if there are any.")
_SOURCE = flags.DEFINE_string(
    "source", None, ".keras, .onnx or .tflite file, or folder of a SavedModel, in place of a run."
)
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "With --source: config that has the data.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over the config.")


def main(_: list[str]) -> None:
    """Evaluates the checkpoint, or the file, on ``Experiment.eval_split``."""
    if (_WORKDIR.value is None) == (_SOURCE.value is None):
        raise command.WrongCall("needs one of --workdir=FOLDER and --source=FILE; see --help")
    if bool(_GIN_FILE.value) != bool(_SOURCE.value):
        raise command.WrongCall(
            "--source needs --gin_file=FILE, which has the data, and nothing else does"
        )
    command.check_run(_WORKDIR.value)
    command.check_there([_SOURCE.value], "--source=")
    command.check_configs(_GIN_FILE.value)
    command.import_backend()
    print(json.dumps(_of_file() if _SOURCE.value else _of_run()))


def _of_run() -> dict[str, object]:
    from condconv.engine import config, evaluation, files

    workdir = files.path(_WORKDIR.value)
    experiment = config.load_run(workdir, _GIN_PARAM.value)
    return evaluation.evaluate_run(experiment, workdir, _CHECKPOINT.value, _EMA.value)


def _of_file() -> dict[str, object]:
    from condconv.engine import config, evaluation
    from condconv.tools import network_file

    experiment = config.load(_GIN_FILE.value, _GIN_PARAM.value, **evaluation.WITHOUT_TRAINING)
    return evaluation.evaluate_file(network_file.open_file(_SOURCE.value), experiment)


if __name__ == "__main__":
    command.run(main)
