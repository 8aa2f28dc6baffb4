"""Sets evaluated runs side by side: one table, and their accuracy over steps as a PNG.

python scripts/compare.py runs/quickstart/static runs/quickstart/condconv --output=accuracy.png
"""

from absl import flags

from scripts import command

_OUTPUT = flags.DEFINE_string("output", None, "PNG file to draw the accuracy over steps to.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON: a list of objects.")


def main(workdirs: list[str]) -> None:
    """Prints the table and, if asked, the path of the plot."""
    if not workdirs:
        raise command.WrongCall("needs the folder of a run at least; see --help")
    command.check_there(workdirs)
    command.check_output("--output", _OUTPUT.value)
    command.import_backend()
    from condconv.engine import files
    from condconv.tools import tables
    from condconv.tools.reports import report

    paths = [files.path(workdir) for workdir in workdirs]
    rows = report.compare(paths)
    if _OUTPUT.value:
        report.plot_accuracy(paths, files.path(_OUTPUT.value))
    tables.show(rows, _JSON.value)
    if _OUTPUT.value:
        print(f"\naccuracy over steps: {_OUTPUT.value}")


if __name__ == "__main__":
    command.run(main, arguments="WORKDIR…")
