"""Writing checkpoints behind the training, and the best model: whole or not at all."""

import dataclasses
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from loop.checkpoint import IO_ERRORS, checkpoints, fingerprints, plain_tensors
from loop.run_folder import RunError, sync_folder, write_json
from loop.state import TrainState
from model.export import export

MAX_FAILED_SAVES_IN_A_ROW = 3


class SaveError(Exception):
    """Some rank could not write; raised on every rank alike, with nothing on disk changed."""


class CheckpointWriter:
    """Writes step-<step> folders under root, one at a time, keeping the newest save_total_limit. All ranks.

    The training stands still for a copy to host memory alone, as large as weights and moments of this rank's
    shards; under DDP of the main process alone.
    """

    def __init__(self, root: Path, save_total_limit: int, device: torch.device):
        self.root, self.save_total_limit = root, save_total_limit
        on_cuda = device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=on_cuda,
            use_non_blocking_copy=on_cuda,
            use_shared_memory=False,
            use_async_staging=False,
        )
        self.stager = DefaultStager(options)
        # A group of its own: collectives of the writing thread must not meet those of the training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1)
        self.writing: tuple[int, Future] | None = None
        self.failed_in_a_row = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Finishes the write under way, whatever ends the training."""
        self.thread.shutdown()

    def save(self, model, optimizer, state: TrainState) -> None:
        """Waits for the write before, copies, and begins to write. Raises what `wait` raises."""
        self.wait()
        weights, optimizer_state = get_state_dict(model, optimizer.optimizer)
        has_shards = any(isinstance(weight, DTensor) for weight in weights.values())
        whole = {"model": weights, "optimizer": optimizer_state}
        # Under DDP every rank has all of it, and one copy in host memory is enough.
        copy = self.stager.stage(plain_tensors(whole if has_shards or rank_of() == 0 else {}))
        facts = dataclasses.asdict(state)
        write = self.thread.submit(write_checkpoint, self.root, copy, facts, self.save_total_limit, self.group)
        self.writing = state.step, write

    def wait(self, is_last: bool = False) -> None:
        """Until nothing is being written. Says that a write failed; RunError where it was the last, or the third
        in a row."""
        if self.writing is None:
            return
        (step, write), self.writing = self.writing, None
        try:
            write.result()
            self.failed_in_a_row = 0
        except SaveError as error:
            self.failed_in_a_row += 1
            if is_last or self.failed_in_a_row == MAX_FAILED_SAVES_IN_A_ROW:
                raise RunError(f"the checkpoint of step {step} could not be written: {error}") from error
            if rank_of() == 0:
                tqdm.write(f"warning: no checkpoint at step {step}, training goes on: {error}")


def write_checkpoint(root: Path, copy: dict, facts: dict, save_total_limit: int, group) -> None:
    """copy: weights and optimizer state on the CPU; facts: the TrainState. All ranks.

    Raises SaveError where any rank failed; the checkpoints there were stay as they are.
    """
    folder = root / f"step-{facts['step']:08d}"
    temporary = root / f".tmp-{folder.name}"
    is_main_process, files = rank_of() == 0, {}
    try:
        error = None
        try:
            if is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        except IO_ERRORS as failure:
            error = failure
        agree(error, group)
        try:
            dcp.save(copy, checkpoint_id=temporary / "state", process_group=group, no_dist=group is None)
            files = fingerprints(temporary, temporary.glob(f"state/__{rank_of()}_*"))
        except IO_ERRORS as failure:
            error = failure
        agree(error, group)
        parts = gather(files, group)
        try:
            if is_main_process:
                write_json(temporary / "trainer.json", facts)
                files = {name: value for part in parts for name, value in part.items()}
                files |= fingerprints(temporary, [temporary / "state/.metadata", temporary / "trainer.json"])
                write_json(temporary / "manifest.json", files)
                sync_folder(temporary / "state")
                temporary.rename(folder)
                sync_folder(root)
        except IO_ERRORS as failure:
            error = failure
        agree(error, group)
    except SaveError as error:
        if is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        # A full disk may come to light as some other error of a writer.
        free = shutil.disk_usage(root.parent).free / 1e9
        raise SaveError(f"{error}, {free:.1f} GB free in {root.parent}") from error
    if is_main_process:
        for old in checkpoints(root)[save_total_limit:]:
            trash = old.with_name(f".trash-{old.name}")
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def save_best(accelerator: Accelerator, model, tokenizer, folder: Path, texts: dict[str, str]) -> None:
    """Exports the weights of now, with further files. All ranks; raises SaveError, with the older export intact."""
    weights, error = accelerator.get_state_dict(model), None
    if accelerator.is_main_process:
        try:
            weights = {name.removeprefix("causal_lm."): weight for name, weight in weights.items()}
            export(accelerator.unwrap_model(model).causal_lm, weights, tokenizer, folder, texts)
        except Exception as failure:  # OSError, or safetensors' own
            error = failure
    agree(error)


def agree(error: BaseException | None, group=None) -> None:
    """Raises SaveError on every rank where one of them brings an error. All ranks."""
    for message in gather(None if error is None else reason(error), group):
        if message is not None:
            raise SaveError(message)


def reason(error: BaseException) -> str:
    """What went wrong, and on which rank: torch.distributed.checkpoint wraps the errors of all of them."""
    rank = rank_of()
    while isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (rank {rank})"


def gather(thing, group=None) -> list:
    """One thing of each rank. All ranks."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size(group)
    dist.all_gather_object(things, thing, group=group)
    return things


def rank_of() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
