"""Messages to the person at the terminal: said once, by the main process."""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from data.errors import UserError


def prepare_terminal() -> None:
    """Shows \\u4e2d where the terminal has no Chinese, instead of an error."""
    hush_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def hush_libraries() -> None:
    """Keeps them quiet, from their import on, about what they could load and do without."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_main_process() -> bool:
    """Known from the launcher's variables, before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str, file=None) -> None:
    """Prints a line above the progress bar; nothing on other ranks."""
    if is_main_process():
        from tqdm import tqdm

        tqdm.write(message, file=file or sys.stdout)
        (file or sys.stdout).flush()


def warn(message: str) -> None:
    say(f"warning: {message}", file=sys.stderr)


def refuse(message: str) -> NoReturn:
    """One message for a user's mistake, and exit status 2."""
    say(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_tool(name: str, run: Callable[[], None]) -> None:
    """The main of tools/NAME.py: a mistake of its user is one message and exit status 1."""
    prepare_terminal()
    try:
        run()
    except (UserError, OSError) as error:
        raise SystemExit(f"tools.{name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
