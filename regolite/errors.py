"""The one error for wrong input."""


class UserError(ValueError):
    """Wrong input: its message is one line that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """
