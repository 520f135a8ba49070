"""The one exception that the command line catches."""


class UserError(ValueError):
    """Something the user can put right: the message says what is wrong, where, and the remedy.

    The command line prints it as one line without a traceback and exits with status 2.
    """
