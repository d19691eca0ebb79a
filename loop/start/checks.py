"""What a step file must give, and what its step must not keep because no checkpoint holds it."""

import math
from types import ModuleType

import torch
from torch.utils._pytree import tree_leaves

from data.base.errors import UserError
from loop.start.step_file import name_of

PLAIN = (type(None), bool, int, float, complex, str)
SKIPPED = ("params", "lr", "initial_lr")  # of a group: checkpoints hold the first, the loop sets the others


FASTEST = 1e-4  # peak rate of a step that compares replies; 5e-7 to 1e-6 is usual


def check_preference(config, method: ModuleType) -> None:
    """Raises UserError if settings do not go with a step file that compares replies. config: a TrainConfig."""
    if method.PREFERENCE:
        if config.learning_rate > FASTEST:
            raise UserError(
                f"--learning-rate {config.learning_rate:g}: {name_of(method)} compares replies, and a model unlearns "
                f"to speak at such rates; at most {FASTEST:g} is taken, and 1e-6 is usual (the preset `preference`)"
            )
        for name, usual in (("think_weight", 1.0), ("answer_weight", 1.0), ("train_liked", False)):
            if getattr(config, name) != usual:
                more = "; --step-set ANSWERS_ALONE=True leaves the thinking out" if "weight" in name else ""
                raise UserError(
                    f"--{name.replace('_', '-')} does not act in {name_of(method)}, which compares replies{more}"
                )


def check_optimizers(optimizers, model, file: str) -> None:
    """Raises UserError if they are no list of optimizers whose groups hold every trained parameter exactly once."""
    where = f"make_optimizers in {file}"
    kinds = [type(one).__name__ for one in optimizers] if isinstance(optimizers, (list, tuple)) else None
    if not isinstance(optimizers, list) or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
        returned = f"({', '.join(kinds)})" if kinds else type(optimizers).__name__
        raise UserError(f"{where} returned {returned}; it returns a list of optimizers, such as [optimizer]")
    names = {p: name.removeprefix("causal_lm.") for name, p in model.named_parameters() if p.requires_grad}
    held = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "initial_lr" in group or hasattr(optimizer.step, "_wrapped_by_lr_sched"):
                raise UserError(
                    f"{where}: a scheduler of torch would begin again on --resume; write it in lr_multiplier"
                )
            if not isinstance(group.get("lr"), (int, float, torch.Tensor)) or not is_finite_rate(group["lr"]):
                raise UserError(f"{where}: the `lr` of a group of {type(optimizer).__name__} is {group.get('lr')!r}, "
                                "which is no finite number")  # fmt: skip
            for parameter in group["params"]:
                if parameter not in names:
                    raise UserError(
                        f"{where}: a group holds a parameter that is not trained; freeze it before the groups are "
                        "made, and leave it out of them"
                    )
                held[parameter] = held.get(parameter, 0) + 1
    for parameter, name in names.items():
        if held.get(parameter, 0) != 1:
            times = f"in {held[parameter]} groups" if parameter in held else "in no group, so it would never learn"
            raise UserError(f"{where}: {name} is {times}")


def is_finite_rate(rate) -> bool:
    return isinstance(rate, torch.Tensor) or math.isfinite(rate)


def others_than_states(method: ModuleType, model, optimizers: list) -> dict[str, object]:
    """What a step could change besides weights and states, by a name for a person."""
    found = {f"the global {name}": frozen(value) for name, value in vars(method).items() if not name.startswith("__")}
    for module_name, module in model.named_modules():
        found |= {f"{module_name or 'model'}.{name}": "" for name in vars(module) if not name.startswith("_")}
        found |= {f"{module_name}.{name}": "" for name in module._buffers}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        own = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
        found |= {f"{kind}.{name}": frozen(own[name]) for name in own.keys() - {"state", "param_groups", "step"}}
        for number, group in enumerate(optimizer.param_groups):
            items = {name: value for name, value in group.items() if name not in SKIPPED}
            found |= {f"{name!r} of group {number} of {kind}": frozen(value) for name, value in items.items()}
    return found


def frozen(value):
    """Equal as long as the value is; of what is no data, its type alone."""
    if isinstance(value, PLAIN):
        return value if value == value else "nan"
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, dict):
        return {str(key): frozen(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [frozen(one) for one in value]
    return type(value)


def check_what_is_kept(before: dict, after: dict, optimizers: list, model, file: str) -> None:
    """Raises UserError at the first thing that a checkpoint would not hold."""
    changed = [name for name in after if after[name] != before.get(name, "not there")]
    if changed:
        raise UserError(
            f"train_step in {file} changes {changed[0]}, which no checkpoint holds: --resume would begin with it anew. "
            "Keep it in optimizer.state[parameter], or compute it from batch.step"
        )
    parameters = set(model.parameters())
    for optimizer in optimizers:
        for key, state in optimizer.state.items():
            if key not in parameters:
                raise UserError(f"{file}: optimizer.state[{key!r}] is of no parameter, so no checkpoint holds it")
            for name, value in state.items():
                lost = [leaf for leaf in tree_leaves(value) if not isinstance(leaf, (*PLAIN, torch.Tensor))]
                if lost:
                    raise UserError(
                        f"{file}: optimizer.state[parameter][{name!r}] holds a {type(lost[0]).__name__}, which no "
                        "checkpoint can hold: tensors, numbers and texts can"
                    )


def check_loss(found, method: ModuleType) -> None:
    is_pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(one, torch.Tensor) for one in found)
    if not is_pair or found[0].ndim or not found[0].requires_grad or found[1].shape != (6,):  # targets of the row
        raise UserError(
            f"micro_batch_loss in {name_of(method)} returns (loss, losses): one number with its gradient, and the "
            "cross-entropy of each target, (n,)"
        )
