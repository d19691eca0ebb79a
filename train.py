"""Fine-tunes Qwen3 on medical questions with reasoning: accelerate launch train.py [PRESET] [--flag value ...]

Importing this file does nothing.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

from data.errors import UserError
from loop.command_line import parse_config
from loop.console import is_main_process, prepare_terminal, refuse
from loop.environment import set_before_torch


def main(args: list[str] | None = None) -> None:
    prepare_terminal()
    config = parse_config(sys.argv[1:] if args is None else args)
    set_before_torch()
    # Heavy imports wait until the command line is known to be right.
    from loop.fit import fit
    from loop.launcher import chat_command, end_with_launcher
    from loop.run_folder import claim

    folder = Path(config.output_dir)
    try:
        end_with_launcher()
        is_writer = is_main_process() and not config.dry_run
        with claim(folder, config.resume) if is_writer else nullcontext():
            if fit(config) and is_writer and (folder / "best").exists():
                from tools.report import write_report

                print(f"report: {write_report(folder, config.language)}\nchat: {chat_command(folder / 'best')}")
    except UserError as error:
        refuse(str(error))
    except BrokenPipeError:  # the reader of what is printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, say; what was written before is whole
        refuse(f"{error}; what is in {folder} is intact, go on with --resume")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
