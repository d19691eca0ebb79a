"""Reading a checkpoint without executing anything in it: torch's own readers unpickle whatever stands there."""

import pickle
from enum import Enum
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner


class SafePlanner(DefaultLoadPlanner):
    """Reads the values that are no tensors (betas, step counts) as data; torch's own planner unpickles anything."""

    def load_bytes(self, read_item, value) -> None:
        value = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


class SafeReader(dcp.FileSystemReader):
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
