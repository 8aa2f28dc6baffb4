"""Trains a network as gin files describe it.

python train.py --gin_file=configs/digits_condconv.gin --workdir=runs/digits_condconv
"""

from absl import flags

from scripts import command

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config to read; later ones win.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding, such as 'Experiment.seed = 1'.")
_TPU = flags.DEFINE_string("tpu", None, "'local', grpc://ADDRESS or the name of a TPU.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Try everything in little, without data or workdir.")
_DRY_RUN_BATCH = flags.DEFINE_integer(
    "dry_run_batch", 8, "Images on a replica in a dry run.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://…")


def main(_: list[str]) -> int:
    """Trains, or goes on where the workdir left off, and then writes what it costs and a report."""
    if not _GIN_FILE.value or not (_WORKDIR.value or _DRY_RUN.value):
        raise command.WrongCall(
            "needs --gin_file=FILE and --workdir=FOLDER (or --dry_run); see --help"
        )
    command.check_configs(_GIN_FILE.value)
    command.import_backend()
    from condconv.engine import config, files, loop
    from condconv.tools import dry_run, tables
    from condconv.tools.reports import report

    experiment = config.load(_GIN_FILE.value, _GIN_PARAM.value)
    if _DRY_RUN.value:
        facts = dry_run.dry_run(experiment, _DRY_RUN_BATCH.value, _TPU.value)
        tables.show([{"what": name, "is": value} for name, value in facts.items()], False)
        return 0
    workdir = files.path(_WORKDIR.value)
    outcome = loop.train(experiment, workdir, _TPU.value)
    if outcome.model is not None:
        report.conclude(outcome.model, workdir)
    return outcome.exit_code


if __name__ == "__main__":
    command.run(main)
