"""Reproduces a table of the paper: its costs, on digits in little, or on ImageNet.

python scripts/reproduce.py --table=imagenet --dataset=digits --seeds=3 --workdir=runs/study
"""

from absl import flags

from scripts import command

_TABLE = flags.DEFINE_string(
    "table", None, "imagenet, released, frontier, experts, routing, placement, or a file ….toml."
)
_DATASET = flags.DEFINE_enum(
    "dataset", "none", ["none", "digits", "imagenet2012"], "To train on; none counts costs alone."
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each row: seeds 0, 1, ….", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time; they share the cores.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder; runs go to WORKDIR/TABLE/DATASET.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding behind those of every row.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON: a list of objects, one a row.")


def main(_: list[str]) -> int:
    """Runs what is missing, then prints the table."""
    if not _TABLE.value:
        raise command.WrongCall("needs --table=NAME; see --help")
    if _DATASET.value != "none" and not _WORKDIR.value:
        raise command.WrongCall(f"--dataset={_DATASET.value} needs --workdir=FOLDER; see --help")
    command.import_backend()
    from condconv.engine import files
    from condconv.tools.studies import costs, sweep, text
    from condconv.tools.studies.study import Study
    from condconv.tools.studies.table import read_table

    table = read_table(_TABLE.value)
    if _DATASET.value == "none":
        text.show_costs(costs.cost_lines(table), _JSON.value)
        return 0
    folder = files.path(_WORKDIR.value) / table.name / _DATASET.value
    study = Study(table, _DATASET.value, tuple(_GIN_PARAM.value))
    code = sweep.run(study, folder, range(_SEEDS.value), _JOBS.value)
    if code < 128:  # not stopped by a signal
        text.show_results(folder, _JSON.value)
    return code


if __name__ == "__main__":
    command.run(main)
