"""The one error that a user's mistake raises."""


class UserError(ValueError):
    """Bad input: names the field, the value and the way out. The command line prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
