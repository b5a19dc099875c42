"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input. The message names the file, line or key and the way out; no traceback is shown."""
