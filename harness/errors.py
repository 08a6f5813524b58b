"""Errors that end a command with one line and exit code 2."""


class HarnessError(ValueError):
    """Bad input or an unusable environment; the message says what is wrong, the value seen and what to do."""
