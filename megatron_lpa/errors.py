"""Exceptions that mean "the user can mend this", and the exit codes that a launcher reads."""

EXIT_FAILED = 1
"""An error that may be gone at the next attempt, or that nobody foresaw."""

EXIT_HANG = 75
"""``EX_TEMPFAIL`` of sysexits.h: some process did not answer; trying again may help."""

EXIT_REFUSED = 78
"""``EX_CONFIG`` of sysexits.h: until somebody changes something, the same command ends the same way."""


class UserError(ValueError):
    """Bad input. The message names the file, line or key and the way out; no traceback is shown."""

    exit_code = EXIT_REFUSED

    known_to_all = False
    """Whether all ranks end with it, so that one may tell for all."""


class TryAgain(UserError):
    """Trouble from outside that may be gone at the next attempt: a disk, the network, another process."""

    exit_code = EXIT_FAILED


class AgreedProblem(UserError):
    """What all ranks know of between two steps: their state is whole, and can still be saved.

    Args:
        message: of all ranks that have a problem.
        exit_code: that of the worst one.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankError(TryAgain):
    """What one rank found and the others do not know: it prints the message itself.

    Args:
        message: names the rank.
        exit_code: None for that of the class.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class RankHang(RankError):
    """Another process did not answer in time."""

    exit_code = EXIT_HANG
