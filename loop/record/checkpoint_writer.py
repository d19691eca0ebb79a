"""Checkpoints, written in the background: loop/record/checkpoint.py says what one is made of."""

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from data.base.console import is_main_process, warn
from data.base.errors import UserError, one_line
from data.base.files import sync_folder, write_json
from loop.distributed import gather
from loop.record.checkpoint import IO_ERRORS, checkpoints, fingerprints, tensors_of
from loop.state import TrainState

MAX_FAILED_SAVES_IN_A_ROW = 3


class SaveError(Exception):
    """Some rank could not write; raised on every rank, with nothing on disk changed.

    is_io: it is the disk that failed, or a writer that does not say; not a mistake that the next time would repeat.
    """

    def __init__(self, message: str, is_io: bool = True):
        super().__init__(message)
        self.is_io = is_io


class CheckpointWriter:
    """Writes step-<step> folders under root, one at a time, keeping the newest save_total_limit. All ranks.

    Training pauses only for a copy to host memory, as large as weights and moments of this rank's shards;
    under DDP the main process alone copies. (torch's async_save has no step after its write, for manifest and rename.)
    """

    def __init__(self, root: Path, save_total_limit: int, device: torch.device):
        self.root, self.save_total_limit = root, save_total_limit
        on_cuda = device.type == "cuda"
        self.options = StagingOptions(
            use_pinned_memory=on_cuda, use_non_blocking_copy=on_cuda, use_shared_memory=False, use_async_staging=False
        )
        self.stager = DefaultStager(self.options)
        # A group of its own: collectives of the writing thread must not meet those of the training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1)
        self.writing: tuple[int, Future] | None = None
        self.failed_in_a_row = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Finishes the write in progress, however the training ended."""
        self.thread.shutdown()

    def save(self, model, optimizers: list, state: TrainState) -> None:
        """Waits for the write before, copies, and begins to write. Raises what `wait` raises."""
        self.wait()
        tensors = tensors_of(model, optimizers)
        has_shards = any(isinstance(weight, DTensor) for weight in tensors["model"].values())
        # Under DDP every rank has all of it, and one copy in host memory is enough.
        if torch.__version__ < "2.13":  # before, a stager is closed by its first copy
            self.stager = DefaultStager(self.options)
        copy = self.stager.stage(tensors if has_shards or is_main_process() else {})
        trainer = dataclasses.asdict(state)
        write = self.thread.submit(write_checkpoint, self.root, copy, trainer, self.save_total_limit, self.group)
        self.writing = state.step, write

    def wait(self, is_last: bool = False) -> None:
        """Until nothing is being written. Says if a write failed; UserError if it was the last, or the third
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
                raise UserError(f"the checkpoint of step {step} could not be written: {error}") from error
            warn(f"no checkpoint at step {step}, training goes on: {error}")


def write_checkpoint(root: Path, copy: dict, trainer: dict, save_total_limit: int, group) -> None:
    """copy: weights and optimizer state on the CPU; trainer: the TrainState. All ranks.

    Raises SaveError if any rank failed; older checkpoints stay as they are.
    """
    folder = root / f"step-{trainer['step']:08d}"
    temporary, rank = root / f".tmp-{folder.name}", dist.get_rank(group) if group else 0

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_shards() -> dict:
        dcp.save(copy, checkpoint_id=temporary / "state", process_group=group, no_dist=group is None)
        return fingerprints(temporary, temporary.glob(f"state/__{rank}_*"))

    def complete() -> None:
        write_json(temporary / "trainer.json", trainer)
        files = {name: value for part in parts for name, value in part.items()}
        files |= fingerprints(temporary, [temporary / "state/.metadata", temporary / "trainer.json"])
        if missing := [name for name in files if not (temporary / name).is_file()]:
            raise OSError(
                f"{missing[0]} is not in {temporary}: all machines need one output_dir that each of them sees"
            )
        write_json(temporary / "manifest.json", files)
        sync_folder(temporary / "state")
        old = root / f".old-{folder.name}"
        if folder.exists():  # saved before its evaluation, which was interrupted
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(root)
        shutil.rmtree(old, ignore_errors=True)

    try:
        together(begin, group, on_main=True)
        parts = gather(together(write_shards, group), group)
        together(complete, group, on_main=True)
    except SaveError as error:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        # A full disk may come to light as some other error of a writer.
        free = shutil.disk_usage(root.parent).free / 1e9
        raise SaveError(f"{error}, {free:.1f} GB free in {root.parent}", error.is_io) from error
    if is_main_process():
        for old in checkpoints(root)[save_total_limit:]:
            trash = old.with_name(f".trash-{old.name}")
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def together(write: Callable, group=None, on_main: bool = False):
    """write() on each rank, or on the main process alone, and its value. Raises SaveError on all ranks if it fails on
    one. All ranks."""
    value = failed = None
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    try:
        if rank == 0 or not on_main:
            value = write()
    except IO_ERRORS as error:
        while isinstance(error, CheckpointException):  # it wraps those of all ranks
            rank, (error, _) = next(iter(error.failures.items()))
        is_io = isinstance(error, (OSError, RuntimeError, SafetensorError))
        failed = f"{type(error).__name__}: {one_line(error)} (rank {rank})", is_io
    for failure in gather(failed, group):
        if failure is not None:
            raise SaveError(*failure)
    return value
