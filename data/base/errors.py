"""UserError: what a person can put right."""


class UserError(Exception):
    """The message says what is wrong and what to do next; it is printed in place of a traceback."""

    status = "failed"  # of the run that it ends


def cannot_import(error: ImportError, package: str, extra: str) -> UserError:
    """With the remedy that fits: the package is missing, or it is there and something else fails."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return UserError(f'{package} is not installed: pip install -e ".[{extra}]"')
    return UserError(f"{package} is installed, but cannot be imported: {one_line(error)}")


def one_line(error: BaseException | str) -> str:
    """An error of a library as part of a message: at most 300 characters."""
    return " ".join(str(error).split())[:300]
