"""The step file: found, checked, and recorded, so that a run's folder says which code trained it."""

import hashlib
import importlib.util
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.errors import UserError, one_line
from loop.console import say
from model.loss import SFTModel

DEFAULT = Path(__file__).with_name("step.py")
FUNCTIONS = ("make_optimizers", "lr_multiplier", "forward_backward", "train_step", "evaluated_weights")


def load_step_file(path: str) -> ModuleType:
    """The module of a step file; recipes/ are found from any folder. Raises UserError if it cannot be read or lacks
    one of the five functions."""
    given, own = Path(path).expanduser(), DEFAULT.parent.parent / path
    file = own if own == DEFAULT or (own.is_file() and not given.is_file()) else given
    if not file.is_file():
        raise UserError(f"there is no step file {path}; --step-file names a Python file such as loop/step.py")
    spec = importlib.util.spec_from_file_location("step_file", file)
    if spec is None:
        raise UserError(f"--step-file {path}: a step file ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--step-file {path}, line {error.lineno}: {error.msg}") from None
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise UserError(f"--step-file {path} has no function {', '.join(missing)}; loop/step.py shows all five")
    return module


def check_groups(step_file: ModuleType, outline: torch.nn.Module, config, device: torch.device) -> list[str]:
    """The class names of the optimizers. Raises UserError if their groups do not hold every trained parameter
    exactly once. outline: the model on the meta device; no weight is loaded."""
    file = Path(step_file.__file__).name
    with FakeTensorMode():  # tensors that say where they are, and hold nothing
        model = SFTModel(outline, loss_chunk=1)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        outline.tie_weights()
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen, add = Counter(), torch.optim.Optimizer.add_param_group

        def count_and_add(optimizer, group: dict) -> None:
            params = group["params"]
            group["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
            seen.update(group["params"])
            add(optimizer, group)

        try:
            with mock.patch.object(torch.optim.Optimizer, "add_param_group", count_and_add):
                optimizers = step_file.make_optimizers(model, config)
        except ValueError as error:  # torch.optim's own; of a parameter in two of its groups it does not say which
            twice = [name.removeprefix("causal_lm.") for parameter, name in names.items() if seen[parameter] > 1]
            which = f" ({twice[0]})" if twice else ""
            raise UserError(f"make_optimizers in {file}: {one_line(error)}{which}") from error
        held = Counter(p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    for parameter, name in names.items():
        if held[parameter] != 1:
            times = f"in {held[parameter]} groups" if held[parameter] else "in no group, so it would never learn"
            raise UserError(f"make_optimizers in {file}: {name.removeprefix('causal_lm.')} is {times}")
    if held.keys() - names.keys():
        raise UserError(f"make_optimizers in {file}: a group holds a parameter that is not trained")
    return [type(optimizer).__name__ for optimizer in optimizers]


def record(folder: Path, step_file: ModuleType, optimizers: list[str], before: list[dict], start: int) -> list[dict]:
    """The step files of a run, each with the step from which it trained; this one, from step `start` on, is copied to
    folder/code/. before: those in run.json. Raises UserError if the same file makes other optimizers than before."""
    source = Path(step_file.__file__)
    now = {"sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "optimizers": optimizers}
    entries = [entry for entry in before if entry["from_step"] < start]
    was = entries[-1] if entries else {}
    if was.items() >= now.items():
        return entries
    copy = folder / "code" / (source.name if not start else f"{source.stem}-from-step-{start}.py")
    if was:
        changed = f"{was['optimizers']} -> {optimizers}"
        if was["sha256"] == now["sha256"]:
            raise UserError(f"{folder} was trained with other optimizers: {changed}; give --memory as it was")
        say(f"another step file from step {start} on: {was['file']} -> {source.name}, see {copy.parent}")
        if was["optimizers"] != optimizers:
            say(f"optimizers {changed}: their state begins anew, weights go on")
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, copy)
    return [*entries, {"file": copy.name, "from_step": start, **now}]
