"""Trains a network as gin files describe it.

python train.py --gin_file=configs/digits_condconv.gin --workdir=runs/digits_condconv
"""

from absl import flags

from condconv.engine import command

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config to read; later ones win.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding, such as 'Experiment.seed = 1'.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://…")


def main(_: list[str]) -> int:
    """Trains, or goes on where the workdir left off."""
    from etils import epath

    from condconv.engine import config, training
    from condconv.engine.errors import UsageError

    if not _GIN_FILE.value or not _WORKDIR.value:
        raise UsageError("needs --gin_file=FILE and --workdir=FOLDER; see --help")
    experiment = config.load(_GIN_FILE.value, _GIN_PARAM.value)
    return training.train(experiment, epath.Path(_WORKDIR.value))


if __name__ == "__main__":
    command.run(main)
