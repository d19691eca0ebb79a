"""Messages to the person at the terminal: said once, by the main process."""

import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from data.base.errors import UserError


def prepare_terminal() -> None:
    """Shows \\u4e2d where the terminal has no Chinese, instead of an error."""
    hush_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Output(io.FileIO):
    """A stream of the terminal that may go away, as in `| head -1` or on a full disk: what is written is then lost,
    said once on stderr, and the process goes on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                warn(f"stdout cannot be written to ({error.strerror}); the run goes on without it")
            return len(data)


def keep_going_without_output() -> None:
    """For stdout and stderr, unless something else has taken their place."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            buffering = {"line_buffering": True, "write_through": name == "stderr"}
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **buffering))


def hush_libraries() -> None:
    """Keeps them quiet, from their import on, about what they could load and do without."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_main_process() -> bool:
    """Known from the launcher's variables, before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text of a model or a file, whose control characters would steer the terminal, with these written out."""
    return UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def say(message: str, file=None) -> None:
    """Prints a line above the progress bar; nothing on other ranks."""
    if is_main_process():
        from tqdm import tqdm

        tqdm.write(visible(message), file=file or sys.stdout)
        (file or sys.stdout).flush()


def warn(message: str) -> None:
    say(f"warning: {message}", file=sys.stderr)


def refuse(message: str) -> NoReturn:
    """One message for a user's mistake, and exit status 2."""
    say(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def tool(name: str) -> Callable:
    """Makes a function the main of tools/NAME.py: a mistake of its user is one message and exit status 1."""

    def decorate(run: Callable[[], None]) -> Callable[[], None]:
        def main() -> None:
            prepare_terminal()
            try:
                run()
            except (UserError, OSError) as error:
                raise SystemExit(f"tools.{name}: {error}") from None
            except KeyboardInterrupt:
                raise SystemExit(130) from None

        return main

    return decorate
