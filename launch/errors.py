"""The one error that bad input raises, so that the command line can print it without a traceback."""


class LaunchError(ValueError):
    """Bad input, in three parts: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, action: str):
        super().__init__(f"Found {found}. Expected {expected}. {action}.")
