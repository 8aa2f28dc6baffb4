"""An experiment as text: what a run's config files say, and how they may differ."""

import dataclasses
import logging
import tokenize
from typing import Any

import gin
from etils import epath

from condconv.engine import files
from condconv.engine.errors import UsageError
from condconv.engine.experiment import Experiment
from condconv.engine.schedules import check_duration

CONFIG, OPERATIVE = "config.gin", "operative_config.gin"

# What may change between two parts of a run, since nothing that it computes depends on them.
_FREE = {
    "Experiment.checkpoint_every",
    "Experiment.keep_checkpoints",
    "Experiment.keep_every",
    "Experiment.log_every",
    "Experiment.max_rollbacks",
    "Experiment.stall_seconds",
    "Experiment.steps_per_call",
    "pipeline.broken_are_wrong",
    "pipeline.max_broken",
}
_DURATION = "Experiment.duration"
CHANGEABLE = f"{', '.join(sorted(_FREE))} and {_DURATION} upwards"
"""Names what may change between two parts of a run, for people."""

_RENAMED = {"Experiment.label_smoothing": "classification.label_smoothing"}


def save(experiment: Experiment, directory: epath.Path) -> None:
    """Writes ``config.gin``, which parses to the same experiment, and ``operative_config.gin``.

    Of an experiment that was made or changed in Python, what cannot be written is named in the
    files and in a line of the log.
    """
    changed, unwritable = _changed(experiment)
    if unwritable:
        logging.warning(
            "%s is of Python and not in %s: whoever goes on from it has to give it anew",
            " and ".join(unwritable),
            directory / CONFIG,
        )
    for name, text in zip((CONFIG, OPERATIVE), _texts(experiment), strict=True):
        files.write_text(directory / name, text + changed)


def differences(experiment: Experiment, text: str) -> list[str]:
    """Returns what another config binds differently from an experiment, a line each.

    What a run's outcome does not depend on may differ, and the training may get longer (see
    ``CHANGEABLE``), of which a line in the log warns.
    """
    ours = _statements(_texts(experiment)[0] + _changed(experiment)[0])
    try:
        theirs = _statements(text)
    except (ValueError, SyntaxError, tokenize.TokenError):
        return ["its config.gin cannot be read"]
    differing = {k for k in {*theirs, *ours} - _FREE if theirs.get(k) != ours.get(k)}
    if differing == {_DURATION} and _is_longer(ours.get(_DURATION, ""), theirs.get(_DURATION, "")):
        logging.warning(
            "%s grows from %s to %s: a schedule that ends with the run is stretched from here on",
            _DURATION,
            theirs[_DURATION],
            ours[_DURATION],
        )
        return []
    return [
        f"{key}: {theirs.get(key, 'not bound')} there, {ours.get(key, 'not bound')} here"
        for key in sorted(differing)
    ]


def _texts(experiment: Experiment) -> tuple[str, str]:
    written = experiment.written
    return (written.config, written.operative) if written else ("", "")


def _changed(experiment: Experiment) -> tuple[str, list[str]]:
    """Returns what the texts of an experiment do not say of it, and what cannot be said."""
    known = experiment.written.values if experiment.written else {}
    lines, unwritable = [], []
    for field in dataclasses.fields(experiment):
        name, value = field.name, getattr(experiment, field.name)
        if name == "written" or value == known.get(name, field.default):
            continue
        if value is None or isinstance(value, bool | int | float | str):
            lines.append(f"Experiment.{name} = {value!r}\n")
        else:
            lines.append(f"# Experiment.{name}: {getattr(value, '__name__', value)}, of Python\n")
            unwritable.append(f"Experiment.{name}")
    return "".join(lines), unwritable


def _is_longer(duration: str, than: str) -> bool:
    """Whether a duration is the longer one, as far as that can be seen without the data."""
    try:
        (amount, unit), (other_amount, other_unit) = (
            check_duration(each, _DURATION) for each in (duration, than)
        )
    except UsageError:
        return False
    return unit == other_unit and amount > other_amount


class _AsText(gin.config_parser.ParserDelegate):
    """Reads references as the text they are, so that configs compare without being run."""

    def configurable_reference(self, name: str, evaluate: bool) -> str:
        return f"@{name}{'()' if evaluate else ''}"

    def macro(self, name: str) -> str:
        return f"%{name}"


def _statements(text: str) -> dict[str, str]:
    """Returns the values of a config by name; a later one wins."""
    statements: Any = gin.config_parser.ConfigParser(text, _AsText())
    found = {}
    for statement in statements:
        if isinstance(statement, gin.config_parser.BindingStatement):
            name = ".".join(filter(None, (statement.selector, statement.arg_name)))
            name = "/".join(filter(None, (statement.scope, name)))
            found[_RENAMED.get(name, name)] = str(statement.value)
    return found
