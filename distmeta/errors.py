"""The two errors that a person sees as one sentence instead of a traceback."""


class UserError(Exception):
    """Bad input or usage: names the file and row, or the key, and the mend. Exit status 2."""


class Unreachable(UserError):
    """Storage that does not answer: a wrong address, or an outage that passes."""


class RunError(Exception):
    """A run that was started properly and failed (full disk, diverged loss, lost worker). Exit status 1."""


class Diverged(RunError):
    """Training came to a number that is not finite: with the same settings it always will."""
