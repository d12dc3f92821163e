"""The one error that a user's mistake raises."""


class UserError(ValueError):
    """Bad input: names the field, the value and the way out. The command line prints it and exits with 2."""
