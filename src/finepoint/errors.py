"""The one exception a user of finepoint is meant to see."""


class FinepointError(ValueError):
    """The user's mistake: the message says what was given, what was expected and the way out.

    The command line prints it as one line and leaves with exit status 2.
    """
