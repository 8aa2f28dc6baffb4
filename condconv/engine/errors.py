"""The two ways in which a command ends badly, each with its exit code."""


class UsageError(Exception):
    """What changing flags, config or paths would cure; found before the first step."""

    exit_code = 2


class RunError(Exception):
    """A failure after the first step, told in one line."""

    exit_code = 1
