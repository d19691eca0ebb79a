"""runs.tsv beside the runs: a line for each run that ended and each candidate of a race. Lines are only ever added."""

import dataclasses
import math
import time
from pathlib import Path

from data.base.console import warn
from loop.config import PRESETS, TrainConfig

COLUMNS = ("date", "command", "step_file", "settings", "n", "mean", "sd", "verdict")
# What does not belong to the method, or is not known before the run: the name, the place, what `auto` became.
LEFT_OUT = {"output_dir", "run_name", "resume", "dry_run", "language", "step_file", "max_steps"}
LEFT_OUT |= {field.name for field in dataclasses.fields(TrainConfig) if field.default in ("auto", -1)}


def add_lines(folder: Path, *lines: dict, once: bool = False) -> None:
    """Appends to folder/runs.tsv; what a full disk or a folder of others refuses is a warning. Keys: COLUMNS, without
    the date; mean and sd in nats: of a run the loss that chose its best model, of a candidate eval/loss. once: not if
    the line is there."""
    path = folder / "runs.tsv"
    date = time.strftime("%Y-%m-%d")
    texts = ["\t".join(clean(line.get(name, "")) for name in COLUMNS[1:]) for line in lines]
    try:
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        texts = [text for text in texts if not once or f"\t{text}\n" not in before]
        head = "" if before else "\t".join(COLUMNS) + "\n"
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(head + "".join(f"{date}\t{text}\n" for text in texts))  # one write, beside other runs' own
    except OSError as error:
        warn(f"{path}: {error}")


def add_run(folder: Path, config: TrainConfig, info: dict, ended: dict) -> None:
    """The line of a run that ended. info: as in run.json; ended: as in run_status.json."""
    line = {"command": info["launches"][-1]["command"], "step_file": step_file_of(info)}
    loss = ended["best_loss"]
    line |= {"settings": settings_of(config), "n": 1, "mean": math.nan if loss is None else loss}
    verdict = f"{ended['status']} at step {ended['step']}, best at {ended['best_step']}"
    add_lines(folder.parent, line | {"verdict": verdict})


def step_file_of(info: dict) -> str:
    return f"{info['step_files'][-1]['file']} {info['step_files'][-1]['sha256'][:12]}"


def clean(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return " ".join(str(value).split())


def settings_of(config: TrainConfig, with_seed: bool = True) -> str:
    """The preset that a configuration is nearest to, and where it differs."""
    left_out = LEFT_OUT if with_seed else LEFT_OUT | {"seed", "split_seed"}
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in left_out]
    differing = {
        preset: [
            f"{name}={show(getattr(config, name))}" for name in names if getattr(config, name) != getattr(own, name)
        ]
        for preset, own in PRESETS.items()
    }  # fmt: skip
    nearest = min(differing, key=lambda preset: len(differing[preset]))
    return " ".join([nearest, *differing[nearest]])


def show(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
