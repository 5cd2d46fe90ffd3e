"""The one exception that is the user's to mend: shown as a single line, exit code 2."""


class BadInput(ValueError):
    """A flag, file, column or model that cannot be used. The message says what is wrong and what would be right."""

    retry = None  # arguments to start the script again with, when that may help
