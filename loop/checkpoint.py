"""Checkpoints: found, verified, loaded; `loop/saving.py` writes them.

    checkpoints/step-00000400/state/        weights and optimizer (torch.distributed.checkpoint)
                              trainer.json  TrainState, readable
                              manifest.json size and SHA-256 of every file

A folder with that name is complete, for it is renamed into place last. Names that begin with a dot
are leftovers and never read. There is no state of random generators: each step seeds them.
"""

import hashlib
import json
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from loop.run_folder import RunError

# One process without a process group is an ordinary run, not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# What writing and reading can raise: OSError, torch's RuntimeError, safetensors' own, and that of
# torch.distributed.checkpoint, which is no Exception.
IO_ERRORS = (Exception, CheckpointException)


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under root, newest first; whether their bytes are sound only `verify` tells."""
    folders = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest_sound(root: Path) -> Path | None:
    """The newest checkpoint whose bytes are those that were written. One rank alone.

    Damaged ones are kept aside as .bad-step-<step>; what a kill left half done is removed.
    """
    for leftover in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in checkpoints(root):
        damage = verify(folder)
        if damage is None:
            return folder
        aside, number = folder.with_name(f".bad-{folder.name}"), 1
        while aside.exists():
            aside, number = folder.with_name(f".bad-{folder.name}-{number}"), number + 1
        folder.rename(aside)
        print(f"warning: {folder.name} is damaged ({damage}); kept aside as {aside}", flush=True)
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
    """name -> [size in bytes, SHA-256]; hashing leaves the interpreter free, so files go in parallel."""

    def fingerprint(path: Path) -> list:
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                sha256.update(block)
        return [path.stat().st_size, sha256.hexdigest()]

    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(fingerprint, files), strict=True))


def load_checkpoint(folder: Path, accelerator: Accelerator, model, optimizer) -> None:
    """Restores model and optimizer in place, whatever number of processes or strategy saved them. All ranks.

    Raises RunError where the checkpoint is of another model, or holds what no checkpoint of a run holds.
    """
    weights, optimizer_state = get_state_dict(model, optimizer.optimizer)
    target = plain_tensors({"model": weights, "optimizer": optimizer_state})
    reader = PlainReader(folder / "state")
    try:
        # Once more than dcp.load does, which prints a traceback where this fails.
        add_further_state(target, reader.read_metadata())
        dcp.load(
            target,
            storage_reader=reader,
            planner=PlainPlanner(),
            no_dist=accelerator.num_processes == 1,
        )
    except IO_ERRORS as error:
        while isinstance(error, CheckpointException):  # it wraps those of all ranks
            error, _ = next(iter(error.failures.values()))
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        part = "the optimizer in loop/optimizer.py" if "optimizer." in why else "--model"
        raise RunError(f"cannot go on from {folder}: {why}; is {part} the one it was made with?") from error
    set_state_dict(
        model,
        optimizer.optimizer,
        model_state_dict=target["model"],
        optim_state_dict=with_wrappers(target["optimizer"], optimizer_state),
    )


def add_further_state(target: dict, metadata: dcp.metadata.Metadata) -> None:
    """Makes room in target for what a step has put into optimizer.state[parameter] beside the optimizer's own, an
    average of the weights say: a tensor of its shape is sharded as it is."""
    for key, entry in metadata.state_dict_metadata.items():
        name, _, item = key.removeprefix("optimizer.state.").rpartition(".")
        state = target["optimizer"]["state"].get(name) if key.startswith("optimizer.state.") else None
        if state is None or item in state:
            continue
        parameter = target["model"][name]
        if not isinstance(entry, dcp.metadata.TensorStorageMetadata):
            state[item] = 0  # a number, which takes its place
        elif entry.size == parameter.shape:
            state[item] = torch.empty_like(parameter, dtype=entry.properties.dtype)
        else:
            state[item] = torch.empty(entry.size, dtype=entry.properties.dtype, device=parameter.device)


def plain_tensors(state):
    """state with each 8-bit moment as the plain tensors it is made of, which share its memory."""
    if isinstance(state, dict):
        return {key: plain_tensors(value) for key, value in state.items()}
    if is_wrapper(state):
        return {name: getattr(state, name) for name in state.__tensor_flatten__()[0]}
    return state


def with_wrappers(loaded, state):
    """What was loaded in the form of state: into the plain tensors of a wrapper it was loaded in place."""
    if isinstance(state, dict):
        return {key: with_wrappers(value, state.get(key)) for key, value in loaded.items()}
    return state if is_wrapper(state) else loaded


def is_wrapper(value) -> bool:
    return hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor)


class PlainPlanner(DefaultLoadPlanner):
    """Reads the values beside the tensors (betas, step counts) as data; torch's own planner unpickles anything."""

    def load_bytes(self, read_item, value) -> None:
        value = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


class PlainReader(dcp.FileSystemReader):
    """Reads .metadata, which is a pickle, as a description of tensors and nothing else."""

    def read_metadata(self, *args, **kwargs):
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Admits the classes that describe tensors: https://docs.python.org/3/library/pickle.html#restricting-globals"""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if (
            module == "torch.distributed.checkpoint.metadata"
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) == ("torch.serialization", "_get_layout")
            or (module.startswith("pathlib") and name == "PosixPath")
        ) and "." not in name:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint does not hold {module}.{name}")


def enum_member(kind: type[Enum], name: str) -> Enum:
    """What Python 3.11.0 to 3.11.3 writes for a member of an Enum is getattr(kind, name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"a checkpoint does not hold an attribute of {kind}")
    return kind[name]
