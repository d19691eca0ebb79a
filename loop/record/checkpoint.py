"""Checkpoints: found, verified, loaded.

    checkpoints/step-00000400/state/        weights and optimizer state (torch.distributed.checkpoint)
                              trainer.json  TrainState, readable
                              manifest.json size and SHA-256 of every file

Folders are renamed into place last, so a step-* folder is always complete. Names that begin with a dot
are leftovers and never read. There is no state of random generators: each step seeds them.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from data.base.console import warn
from data.base.errors import UserError, one_line
from loop.distributed import gather
from loop.record.safe_pickle import SafePlanner, SafeReader

# One process without a process group is an ordinary run, not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# What writing and reading can raise: OSError, torch's RuntimeError, safetensors' own, and that of
# torch.distributed.checkpoint, which is no Exception.
IO_ERRORS = (Exception, CheckpointException)


# --- find ---------------------------------------------------------------------------------------------


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under root, newest first; `verify` tells whether their bytes are sound."""
    folders = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest_sound(root: Path) -> Path | None:
    """The newest checkpoint whose bytes are those that were written. One rank alone.

    Damaged ones are kept aside as .bad-step-<step>; what a kill left half done is removed.
    """
    for old in root.glob(".old-step-*"):  # it was being replaced by one of the same step
        if not (folder := old.with_name(old.name.removeprefix(".old-"))).exists():
            old.rename(folder)
    for leftover in [*root.glob(".tmp-*"), *root.glob(".trash-*"), *root.glob(".old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in checkpoints(root):
        damage = verify(folder)
        if damage is None:
            return folder
        aside, number = folder.with_name(f".bad-{folder.name}"), 1
        while aside.exists():
            aside, number = folder.with_name(f".bad-{folder.name}-{number}"), number + 1
        folder.rename(aside)
        warn(f"{folder.name} is damaged ({damage}); kept aside as {aside}")
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it, about 1 GB/s for each file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
        if missing := set(manifest) ^ names:
            return f"{min(missing)} is missing or does not belong there"
        found = fingerprints(folder, [folder / name for name in manifest])
        changed = [name for name in manifest if manifest[name] != found[name]]
        return f"{changed[0]} has changed" if changed else None
    except (OSError, ValueError, TypeError) as error:
        return f"manifest.json: {error}"


def fingerprints(folder: Path, files) -> dict[str, list]:
    """name -> [size in bytes, SHA-256]; hashing releases Python's lock, so files go in parallel."""

    def fingerprint(path: Path) -> list:
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                sha256.update(block)
        return [path.stat().st_size, sha256.hexdigest()]

    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(fingerprint, files), strict=True))


# --- load ---------------------------------------------------------------------------------------------


def tensors_of(model, optimizers: list) -> dict:
    """Weights, and for each parameter what its optimizer keeps of it, by name; an 8-bit moment as the plain tensors
    it is made of. Nothing is copied. torch's `get_state_dict` would first make a step with gradients of 0."""
    model = extract_model_from_parallel(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {names[parameter]: dict(state) for optimizer in optimizers for parameter, state in optimizer.state.items()}
    return {"model": model.state_dict(), "optimizer": plain_tensors({name: states[name] for name in sorted(states)})}


def plain_tensors(state):
    if isinstance(state, dict):
        return {key: plain_tensors(value) for key, value in state.items()}
    if hasattr(state, "__tensor_flatten__") and not isinstance(state, DTensor):
        return {name: getattr(state, name) for name in state.__tensor_flatten__()[0]}
    return state


def load_checkpoint(folder: Path, accelerator: Accelerator, model, optimizers: list) -> None:
    """Restores weights and optimizer state in place, whatever number of processes or strategy saved them. All ranks.

    Without optimizers the weights alone. Rates, decay and the like are those of the step file. Raises UserError if
    the checkpoint is of another model, or holds what no checkpoint of a run holds.
    """
    groups = {}
    for name, parameter in extract_model_from_parallel(model).named_parameters():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(parameter is member for member in group["params"]):
                    groups[name] = parameter, optimizer, group
    reader = SafeReader(folder / "state")
    try:
        # Once more than dcp.load does, because that prints a traceback if it fails.
        target = {"model": tensors_of(model, [])["model"], "optimizer": {}}
        for key, entry in reader.read_metadata().state_dict_metadata.items():
            if optimizers and key.startswith("optimizer."):
                name = next((name for name in groups if key.startswith(f"optimizer.{name}.")), None)
                if name is None:  # frozen by now
                    continue
                *outer, item = key.removeprefix(f"optimizer.{name}.").split(".")
                place = target["optimizer"].setdefault(name, {})
                for part in outer:
                    place = place.setdefault(part, {})
                place[item] = room_for(entry, groups[name][0], groups[name][2])
        dcp.load(target, storage_reader=reader, planner=SafePlanner(), no_dist=accelerator.num_processes == 1)
    except IO_ERRORS as error:
        while isinstance(error, CheckpointException):  # it wraps those of all ranks
            error, _ = next(iter(error.failures.values()))
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"cannot go on from {folder}: {why}; is --model the one it was made with?") from error
    for name, state in target["optimizer"].items():
        parameter, optimizer, _ = groups[name]
        optimizer.state[parameter] = state


def room_for(entry, parameter: torch.Tensor, group: dict):
    """Where an entry of a checkpoint is read to: sharded as the parameter is, if it has the parameter's shape."""
    if not isinstance(entry, dcp.metadata.TensorStorageMetadata):
        return 0  # a number, which takes its place
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # torch.optim keeps step counts on the host, unless its kernel reads them.
    on_host = not entry.size and not (group.get("fused") or group.get("capturable"))
    return torch.empty(entry.size, dtype=dtype, device="cpu" if on_host else parameter.device)


# --- compare -----------------------------------------------------------------------------------------


@torch.no_grad()
def sums_of_bits(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Of each parameter, or of this rank's shard of it, taken as integers."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return torch.stack([p.view(integers[p.itemsize]).sum(dtype=torch.int64) for p in local]).tolist()


def check_ranks_agree(model, root: Path) -> None:
    """Raises UserError if the weights of a DDP model are not the same on every rank. All ranks.

    The sum of all bits as integers, in about the time of reading the weights once.
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return
    checksum = sums_of_bits(model.parameters())
    if any(other != checksum for other in gather(checksum)):
        raise UserError(
            "the ranks' weights have drifted apart: something in the step differs from rank to rank, such as random "
            "numbers (draw them from torch.Generator(device).manual_seed(batch.seed)). This run cannot go on; "
            f"the last sound checkpoint is {next(iter(checkpoints(root)), 'none')}"
        )
