"""The error a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file or argument, the key, and the remedy; the command line prints it alone, without a traceback.
    """


class EvaluationError(InputError):
    """Images or labels that cannot be evaluated, whatever the model."""
