"""Fine-tunes Qwen3 on medical questions with reasoning: accelerate launch train.py [PRESET] [--flag value ...]

Importing this file does nothing.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from data.base.console import is_main_process, keep_going_without_output, prepare_terminal, refuse
from data.base.errors import UserError
from data.base.language import speak, tr
from loop.start.command_line import parse_config
from loop.start.environment import set_before_torch


def main(args: list[str] | None = None) -> None:
    prepare_terminal()
    keep_going_without_output()
    config = parse_config(sys.argv[1:] if args is None else args)
    set_before_torch()
    speak(config.language)
    # Heavy imports wait until the command line is known to be right.
    from loop.fit import fit
    from loop.record.run_folder import claim
    from loop.start.launcher import chat_command, end_with_launcher

    folder = Path(config.output_dir)
    try:
        end_with_launcher()
        is_writer = is_main_process() and not config.dry_run
        with claim(folder, config.resume) if is_writer else nullcontext():
            if fit(config) and is_writer and (folder / "best").exists():
                from tools.report import write_report

                print(tr("report: {}", write_report(folder, config.language)))
                print(tr("chat: {}", chat_command(folder / "best")))
    except UserError as error:
        refuse(str(error))
    except OSError as error:  # a full disk, say; what was written before is whole
        has_begun = not config.dry_run and (folder / "run.json").exists()
        refuse(f"{error}" + (f"; what is in {folder} is intact, go on with --resume" if has_begun else ""))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
