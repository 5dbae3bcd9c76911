"""The errors that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file or argument, the key, and the remedy; the command line prints it alone, without a traceback.

    Args:
        message: the text. With ``of``, arguments stand in it in backticks by the names that Python uses: ``"`scale` is inf"``.
        of: whose arguments these are, ``"model"``, ``"data"``, ``"trainer"`` or ``"command"``, so that the command line can show
            each as the option that was typed, such as ``--scale``.
    """

    def __init__(self, message: str, of: str | None = None) -> None:
        super().__init__(message)
        self.of = of


class EvaluationError(InputError):
    """Images or labels that cannot be evaluated, whatever the model."""


class FailedElsewhereError(InputError):
    """Another process of the run has failed and says why; this one ends in silence."""

    def __init__(self) -> None:
        super().__init__("another process failed; its message says why")


class ProcessLostError(InputError):
    """Another process of the run was ended from outside; the message names it."""
