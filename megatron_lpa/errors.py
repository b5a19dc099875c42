"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input. The message names the file, line or key and the way out; no traceback is shown."""


class RankError(UserError):
    """Bad input that one rank found while it could not yet tell the others: it prints the message itself."""
