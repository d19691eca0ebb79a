"""UserError: what a person can put right."""


class UserError(Exception):
    """The message says what is wrong and what to do next; it is printed in place of a traceback."""

    status = "failed"  # of the run that it ends


def one_line(error: BaseException | str) -> str:
    """An error of a library as part of a message: at most 300 characters."""
    return " ".join(str(error).split())[:300]
