"""The command line of train.py: a preset, a YAML file, flags.

Nothing heavy is imported here: the command line answers before torch is loaded.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import shlex
import sys
from pathlib import Path

import tyro

from data.base.console import is_main_process, refuse
from data.base.errors import one_line
from loop.config import PRESETS, TrainConfig

USAGE = """\
accelerate launch train.py [PRESET] [--config FILE.yaml] [--flag value ...]

PRESET is medical (default: the experiment), better (against overfitting), lora (with LoRA), preference (from thumbs,
corrections and votes) or tiny (embedded data and model, on a CPU).
--config FILE.yaml reads flags from a file. Later wins: preset < file < flags."""


def parse_config(args: list[str]) -> TrainConfig:
    """The configuration of a command line; a mistake in it is one message and exit status 2."""
    args = list(args)
    preset = args.pop(0) if args and not args[0].startswith("-") else "medical"
    if preset not in PRESETS:
        refuse(f"there is no preset {preset!r}; did you mean {nearest(preset, PRESETS)!r}?")
    values = {f"--{name}" for name in ("resume", "no-resume", "dry-run", "no-dry-run")}  # flags without a value
    for before, word in itertools.pairwise(args):
        if word in PRESETS and (not before.startswith("-") or "=" in before or before in values):
            rest = [other for other in args if other != word]
            refuse(f"the preset comes first: train.py {shlex.join([word, *rest])}")
    file_option = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    file_option.add_argument("--config")
    try:
        known, flags = file_option.parse_known_args(args)
    except argparse.ArgumentError:
        refuse("--config needs the name of a YAML file")
    try:
        config = PRESETS[preset]
        if known.config is not None:
            config = read_yaml(known.config, config)
        config = read_flags(flags, config, f"train.py {preset}", quiet=not is_main_process())
        config.check()
        return dataclasses.replace(config, output_dir=str(Path(config.output_dir).expanduser()))
    except ValueError as error:
        refuse(str(error))


def read_flags(flags: list[str], config: TrainConfig, prog: str, quiet: bool) -> TrainConfig:
    """config with flags applied; a wrong one is tyro's message (none if quiet) and exit status 2."""
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        return tyro.cli(
            TrainConfig, args=flags, default=config, prog=prog, description=USAGE, console_outputs=not quiet
        )


def read_yaml(path: str, config: TrainConfig) -> TrainConfig:
    """config with the settings of a YAML file; values are read as the command line would read them."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        refuse(f"cannot read {path}: {one_line(error)}")
    if not isinstance(settings, dict):
        refuse(f"{path} must hold lines of the form `setting: value`")
    fields, flags = {field.name: field.type for field in dataclasses.fields(TrainConfig)}, {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            refuse(f"{path}: there is no setting {key!r}; did you mean {nearest(name, fields)!r}?")
        if value is not None:  # a setting without a value keeps its default
            flags[key] = as_flags(name, value, fields[name])
    try:
        config = read_flags([*itertools.chain(*flags.values())], config, "train.py", quiet=True)
        config.check()
        return config
    except ValueError as error:
        refuse(f"{path}: {error}")
    except SystemExit:
        for key, flag in flags.items():
            with contextlib.suppress(SystemExit):
                read_flags(flag, config, "train.py", quiet=True)
                continue
            kind = fields[str(key).replace("-", "_")]
            expected = (
                "a list of texts" if kind == tuple[str, ...] else getattr(kind, "__args__", None) or kind.__name__
            )
            refuse(f"{path}: {key}: {settings[key]!r} will not do; expected {expected}")
        raise


def as_flags(name: str, value, kind) -> list[str]:
    """As the command line would say it; YAML reads a bare `on` or `no` as a truth value."""
    if kind == tuple[str, ...]:
        return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if not isinstance(value, bool):
        return [f"--{name}={value}"]
    if kind is bool:
        return [f"--{'' if value else 'no-'}{name}"]
    no = "no" if "no" in getattr(kind, "__args__", ()) else "off"
    return [f"--{name}={'on' if value else no}"]


def print_output_dir() -> None:
    """python -m loop.start.command_line ARGUMENTS OF train.py: the folder of their run, for scripts."""
    print(parse_config(sys.argv[1:]).output_dir)


def nearest(word: str, choices) -> str:
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.0)[0]


if __name__ == "__main__":
    print_output_dir()
