"""The two ways in which a command ends badly."""


class UsageError(Exception):
    """What changing flags, config or paths would cure; found before the first step. Exit code 2."""


class RunError(Exception):
    """A failure after the first step, told in one line. Exit code 1."""
