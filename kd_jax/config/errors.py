"""The exception for a user's mistakes."""


class UserError(Exception):
    """A mistake of the user, printed as one message without a traceback; exit status 2."""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
