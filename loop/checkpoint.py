"""Checkpoints: saved whole or not at all, found, verified, loaded, pruned.

    checkpoints/step-00000400/state/        weights and optimizer (torch.distributed.checkpoint)
                              rng-<rank>.pt random number generators of each process
                              trainer.json  TrainState, readable
                              manifest.json size of every file

A folder with that name is complete, for it is renamed into place last. Names that begin with a dot
are leftovers and never read.
"""

import dataclasses
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from loop.early_stopping import EarlyStopping

# One process without a process group is an ordinary run, not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class RunError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclasses.dataclass
class TrainState:
    """Everything the loop knows beside weights, optimizer and random generators."""

    early_stopping: EarlyStopping
    run_id: str  # of SwanLab
    step: int = 0  # completed optimizer steps, skipped ones among them
    tokens_seen: int = 0  # target tokens
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    # Since the last row of train metrics, for its means; think and answer.
    loss_sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    num_targets: list[int] = dataclasses.field(default_factory=lambda: [0, 0])

    def record(self, metrics) -> None:
        """Adds a `loop.step.StepMetrics`."""
        self.loss_sums[0] += metrics.think_loss_sum
        self.loss_sums[1] += metrics.answer_loss_sum
        self.num_targets[0] += metrics.num_think_tokens
        self.num_targets[1] += metrics.num_answer_tokens
        self.tokens_seen += metrics.num_think_tokens + metrics.num_answer_tokens


def check_output_dir(output_dir: Path, resume: bool) -> None:
    """Refuses a folder that holds a run, unless that run is to go on: nothing is ever overwritten."""
    held = [name for name in ("checkpoints", "best", "metrics.jsonl") if (output_dir / name).exists()]
    if held and not resume:
        raise RunError(
            f"{output_dir} already holds a run ({', '.join(held)}). Go on with it: --resume. "
            "Start another one: --output-dir OTHER"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise RunError(f"{output_dir} is a file; --output-dir names a folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to --output-dir {output_dir}: {error.strerror}") from error


def save_checkpoint(
    root: Path, accelerator: Accelerator, model, optimizer, state: TrainState, save_total_limit: int
) -> Path:
    """Writes step-<step> under root, then removes the oldest beyond save_total_limit. All ranks."""
    folder = root / f"step-{state.step:08d}"
    temporary = root / f".tmp-{folder.name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()

    weights, optimizer_state = get_state_dict(model, optimizer.optimizer)
    dcp.save(
        {"model": weights, "optimizer": optimizer_state},
        checkpoint_id=temporary / "state",
        no_dist=accelerator.num_processes == 1,
    )
    with (temporary / f"rng-{accelerator.process_index}.pt").open("wb") as file:
        torch.save(rng_state(accelerator), file)
        sync(file)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        write_json(temporary / "trainer.json", dataclasses.asdict(state))
        write_json(temporary / "manifest.json", file_sizes(temporary))
        if folder.exists():  # only one that failed verification can stand here
            folder.rename(root / f".bad-{folder.name}-{os.urandom(4).hex()}")
        temporary.rename(folder)
        sync_folder(root)
        for old in complete_checkpoints(root)[save_total_limit:]:
            trash = old.with_name(f".trash-{old.name}")
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
    accelerator.wait_for_everyone()
    return folder


def complete_checkpoints(root: Path) -> list[Path]:
    """Verified checkpoints under root, newest first."""
    folders = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return [path for path in sorted(folders, key=lambda path: int(path.name[5:]), reverse=True) if is_complete(path)]


def is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest == {name: size for name, size in file_sizes(folder).items() if name != "manifest.json"}
    except (OSError, ValueError):
        return False


def load_checkpoint(folder: Path, accelerator: Accelerator, model, optimizer) -> TrainState:
    """Restores model, optimizer and random generators in place and returns the state. All ranks."""
    weights, optimizer_state = get_state_dict(model, optimizer.optimizer)
    target = {"model": weights, "optimizer": optimizer_state}
    dcp.load(target, checkpoint_id=folder / "state", no_dist=accelerator.num_processes == 1)
    set_state_dict(
        model,
        optimizer.optimizer,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
    )
    restore_rng(folder / f"rng-{accelerator.process_index}.pt", accelerator)
    return read_state(folder)


def read_state(folder: Path) -> TrainState:
    fields = json.loads((folder / "trainer.json").read_text())
    return TrainState(**{**fields, "early_stopping": EarlyStopping(**fields["early_stopping"])})


def rng_state(accelerator: Accelerator) -> dict:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if accelerator.device.type != "cpu":
        state["device"] = torch.get_device_module(accelerator.device).get_rng_state()
    return state


def restore_rng(path: Path, accelerator: Accelerator) -> None:
    """A rank that the saved run did not have keeps the generators it was seeded with."""
    if path.exists():
        state = torch.load(path, weights_only=True)
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "device" in state and accelerator.device.type != "cpu":
            torch.get_device_module(accelerator.device).set_rng_state(state["device"])


def file_sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def write_json(path: Path, content: dict) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        sync(file)


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power cut, as fsync does for a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
