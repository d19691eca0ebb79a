"""The folder of a run: who may write to it, what it was made with, how it ended.

output_dir/run.json         what the run is; --resume refuses anything else
           run_status.json  running, completed, early_stopped, interrupted, diverged or failed
           .lock            held as long as the process lives
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from data.base.console import is_main_process, warn
from data.base.errors import UserError
from data.base.files import write_json
from loop.config import TrainConfig
from loop.distributed import gather, on_main_process
from loop.record.checkpoint import newest_sound
from loop.state import TrainState, read_state
from model.export import header_of, restore_export

# Settings that another launch may change, and what is recorded apart from them.
FREE = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("may_change")}
FREE |= {"step_files", "launches", "metric_for_best_model", "measures", "optim", "loss_chunk"}
FINISHED = ("completed", "early_stopped")
OUTPUT = ("checkpoints", "best", "metrics.jsonl")  # what a run makes once it trains


def claim(output_dir: Path, resume: bool):
    """Refuses a folder that another process writes to, or that holds a run unless --resume goes on with it.

    Returns the lock, a context; it ends with the process too.
    """
    held = [name for name in OUTPUT if (output_dir / name).exists()]
    if held and not resume:
        raise UserError(
            f"{output_dir} already holds a run ({', '.join(held)}). Go on with it: --resume. "
            "Start another one: --output-dir OTHER"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file; --output-dir names a folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".lock").touch()
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {output_dir}: {error.strerror}") from error
    try:
        return FileLock(output_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is training in {output_dir}; wait for it, or choose --output-dir") from error
    except (OSError, NotImplementedError):  # a file system without locks
        return contextlib.nullcontext()


def is_held(output_dir: Path) -> bool:
    """Whether a process is training in output_dir. False if its file system has no locks."""
    try:
        FileLock(output_dir / ".lock").acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        pass
    return False


def has_output(output_dir: Path) -> bool:
    return any((output_dir / name).exists() for name in OUTPUT)


def check_same_run(output_dir: Path, settings: dict) -> None:
    """Raises UserError with every difference from run.json, if something is trained already."""
    if not has_output(output_dir):
        return
    was = {**dataclasses.asdict(TrainConfig()), **read_run(output_dir)}  # a setting may be younger than the run
    names = [name for name in {**was, **settings} if name not in FREE and not name.endswith("_version")]
    changed = [
        f"{name}: {was.get(name)!r} -> {settings.get(name)!r}" for name in names if was.get(name) != settings.get(name)
    ]
    if changed:
        raise UserError(
            f"{output_dir} holds a run with other settings, so --resume cannot go on with it:\n  "
            + "\n  ".join(changed)
            + "\nLaunch it as it was, or start another run: --output-dir OTHER. To train its model further: "
            f"--model {shlex.quote(str(output_dir / 'best'))} --output-dir OTHER"
        )


def find_start(config: TrainConfig) -> tuple[Path | None, TrainState]:
    """The newest sound checkpoint, if the run goes on, and the state in it; else a new one. One rank alone.

    Raises UserError if a start from step 0 would replace something trained, or if a finished run lost its model.
    """
    folder, best = Path(config.output_dir), Path(config.output_dir) / "best"
    restore_export(best)
    checkpoint = newest_sound(folder / "checkpoints") if config.resume else None
    if checkpoint is None:
        return None, without_checkpoint(folder, config.save_steps)
    state = read_state(checkpoint)
    if state.best_loss is not None and not best.is_dir():
        missing = f"{best}, the model of step {state.best_step}, is missing"
        if is_over(state, config):
            raise UserError(f"this run is finished, but {missing}; put it back, or train again: --output-dir OTHER")
        warn(f"{missing}; the model of the next evaluation takes its place")
        state.best_loss = None
    return checkpoint, state


def without_checkpoint(folder: Path, save_steps: int) -> TrainState:
    """The state of a run that begins, or that was finished and has lost its checkpoints. One that was killed before its
    first checkpoint begins again, and what it made stays under other names. Raises UserError if it lost its
    checkpoints."""
    metrics, best, status = folder / "metrics.jsonl", folder / "best", read_status(folder)
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    step = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    begin = TrainState(run_id=uuid.uuid4().hex[:12])
    if not step and (metrics.exists() or not best.exists()):
        return begin  # at most the model before its first step is there
    if status.get("status") in FINISHED and best.exists():
        end = {name: status[name] for name in ("step", "best_step", "best_loss")}
        return TrainState(run_id="", **end)
    was_saved = step >= save_steps and not (folder / "checkpoints").is_dir()
    if was_saved or not step or any(folder.glob("checkpoints/.bad-*")):
        raise UserError(
            f"{folder} was trained up to step {step or 'unknown'}, but has no sound checkpoint to go on from. Put its "
            "checkpoints/ back, with the files whose names begin with a dot; or train on from its model: "
            f"--model {shlex.quote(str(best))} --output-dir OTHER"
        )
    best_step = step_of(best) or 0
    files = ("metrics", "samples", "eval_rows")
    asides = {folder / f"{name}.jsonl": f"{name}-until-step-{step}.jsonl" for name in files}
    asides |= {best: f"best-of-step-{best_step}"} if best_step else {}
    moved = [set_aside(path, name) for path, name in asides.items() if path.exists()]
    warn(
        f"this run was ended before its first checkpoint and begins again at step 0; what it had made is kept as "
        f"{', '.join(moved)}"
    )
    return begin


def set_aside(path: Path, name: str) -> str:
    """Renames a file or folder, to NAME or NAME-2 and so on if there is one already."""
    stem, dot, suffix = name.partition(".")
    names = itertools.chain([name], (f"{stem}-{number}{dot}{suffix}" for number in itertools.count(2)))
    free = next(other for other in names if not path.with_name(other).exists())
    path.rename(path.with_name(free))
    return free


def step_of(best: Path) -> int | None:
    """The step of an exported model, as its card says."""
    step = header_of(best).get("step")
    return step if isinstance(step, int) else None


def newer_best(best: Path, state: TrainState) -> tuple[int, float] | None:
    """(step, deciding loss) of a best/ that is younger than the checkpoint: it stays until a better one comes."""
    step, loss = step_of(best), header_of(best).get("deciding_loss")
    return (step, loss) if step is not None and step > state.step and isinstance(loss, float) else None


def check_shared(folder: Path) -> None:
    """Raises UserError if some process does not see the main process's folder, as on machines that share no disk. All
    ranks."""
    mark = folder / on_main_process(lambda: f".shared-{uuid.uuid4().hex}")
    if is_main_process():
        mark.touch()
    gather(None)  # it is there
    seen = gather(mark.exists())
    if is_main_process():
        mark.unlink(missing_ok=True)
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see {folder} of the main process: all machines need one "
            "--output-dir that each of them sees"
        )


def is_over(state: TrainState, config: TrainConfig) -> bool:
    """Whether all of the training is done, its last evaluation too."""
    out_of_patience = state.is_out_of_patience(config.early_stopping_patience)
    return state.last_eval == state.step and (state.step >= config.max_steps or out_of_patience)


def keep_global_batch(config: TrainConfig, num_processes: int) -> TrainConfig:
    """config with the gradient accumulation that gives this number of processes the run's global batch.

    Unchanged if there is no run yet, or if the command line asks for another micro-batch than the run had;
    `check_same_run` judges that. Raises UserError if the batch does not divide.
    """
    if not (Path(config.output_dir) / "run.json").exists():
        return config
    was = read_run(Path(config.output_dir))
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    asked_as_before = rows == was["per_device_train_batch_size"] * was["gradient_accumulation_steps"]
    if rows * num_processes == was["rows_per_step"] or not asked_as_before:
        return config
    steps, rest = divmod(was["rows_per_step"], config.per_device_train_batch_size * num_processes)
    if rest:
        raise UserError(
            f"the run has {was['rows_per_step']} rows a step, which --num_processes {num_processes} with "
            f"--per-device-train-batch-size {config.per_device_train_batch_size} cannot share out; choose them, and "
            f"--gradient-accumulation-steps, so that their product is {was['rows_per_step']}"
        )
    return dataclasses.replace(config, gradient_accumulation_steps=steps)


def launches_of(output_dir: Path, before: list[dict], command: str, step: int) -> list[dict]:
    """Those before, and the one that begins now after `step` steps: its command, when it began and when it ended, in
    UTC. A killed one ended when its last row was written."""
    rows = [*output_dir.glob("metrics*.jsonl")]
    if before and "ended" not in before[-1] and rows:
        last = max(path.stat().st_mtime for path in rows)
        before[-1]["ended"] = utc(max(seconds_of(before[-1]["began"]), last))
    return [*before, {"command": command, "from_step": step, "began": utc(time.time())}]


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def seconds_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def read_run(output_dir: Path) -> dict:
    path = output_dir / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{output_dir} is no folder of a run: cannot read {path} ({error})") from error


def write_status(output_dir: Path, status: str, **more) -> None:
    """Replaces run_status.json. A full disk must not hide how a run ended, so nothing is raised."""
    with contextlib.suppress(OSError):
        write_json(output_dir / "run_status.json", {"status": status, "pid": os.getpid(), **more})


def read_status(output_dir: Path) -> dict:
    """What write_status wrote last; empty if nothing can be read."""
    try:
        return json.loads((output_dir / "run_status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
