"""Writes one HTML page about runs side by side, or a study; it needs no network to be read.

python scripts/report.py runs/quickstart/static runs/quickstart/condconv --output=report.html
python scripts/report.py runs/study
"""

from absl import flags

from scripts import command

_OUTPUT = flags.DEFINE_string(
    "output", None, "HTML file to write; WORKDIR/report.html by default, where there is one."
)


def main(workdirs: list[str]) -> None:
    """Writes the page, prints its path, and names on stderr what was left out."""
    if not workdirs or (len(workdirs) > 1 and not _OUTPUT.value):
        raise command.WrongCall("needs one folder, or several and --output=FILE; see --help")
    command.check_there(workdirs)
    command.check_output("--output", _OUTPUT.value)
    command.import_backend()
    from condconv.engine import files
    from condconv.tools.reports import report

    paths = [files.path(workdir) for workdir in workdirs]
    output = files.path(_OUTPUT.value) if _OUTPUT.value else paths[0] / "report.html"
    for problem in report.write(paths, output):
        command.tell(f"left out: {problem}")
    print(output)


if __name__ == "__main__":
    command.run(main, arguments="WORKDIR…")
