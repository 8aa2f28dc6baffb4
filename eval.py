"""Evaluates a trained network; the last line on stdout is one JSON object.

python eval.py --workdir=runs/digits_condconv
"""

import json

from absl import flags

from condconv.engine import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; its config.gin says the rest.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best', a step or a path.")
_EMA = flags.DEFINE_bool("ema", None, "Use the averaged weights; by default if there are any.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over the run's own config.")


def main(_: list[str]) -> None:
    """Evaluates the checkpoint on ``Experiment.eval_split``."""
    from condconv.engine import config, evaluation, files
    from condconv.engine.errors import UsageError

    if not _WORKDIR.value:
        raise UsageError("needs --workdir=FOLDER; see --help")
    workdir = files.path(_WORKDIR.value)
    experiment = config.load_run(workdir, _GIN_PARAM.value)
    result = evaluation.evaluate_run(experiment, workdir, _CHECKPOINT.value, _EMA.value)
    print(json.dumps(result))


if __name__ == "__main__":
    command.run(main)
