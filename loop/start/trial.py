"""The step file's own step, tried on fake tensors before a weight is loaded: what it keeps, and what would be lost.

Fake tensors have a shape and a type, and no bytes; they count as the host's, whatever the run computes on. The model
is the real one with its forward left out; its gradients are there, so the optimizers make their states and the step its
copies, and their bytes can be counted.
"""

import dataclasses
import logging
import weakref
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.base.console import warn
from data.base.errors import UserError, one_line
from data.batches import make_batch
from data.encode import Example
from loop.config import Resolved
from loop.distributed import note_peaks
from loop.start.checks import check_loss, check_optimizers, check_what_is_kept, others_than_states
from loop.start.step_file import finite, load_step_file, name_of, run_own
from loop.state import StepMetrics
from model.head import gradient_of, results
from model.loss import SFTModel

# It logs a traceback of each error; the message about it is ours.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
# What a code that is right may raise on tensors without values.
NOT_FAKE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
            NotImplementedError, RuntimeError)  # fmt: skip


class Tried(NamedTuple):
    optimizers: list[str]  # class names
    states: int  # bytes that the optimizers keep
    kept: int  # of copies that are there while a forward or a backward runs
    update: int  # of what is made besides gradients and states when the weights are updated
    function: float  # that a function of logits needs, for each logit
    reference: str  # what of the reference it asks for: logits, losses or nothing


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class WithoutForward(SFTModel):
    """Losses from which each trained parameter gets a gradient."""

    def attach(self, live: LiveBytes, reference: str) -> None:
        self.live, self.has_logits = live, reference == "logits"
        self.kept, self.function = 0, 0.0

    def forward(self, input_ids, target_ids, of_logits=None, **_) -> torch.Tensor | tuple[torch.Tensor, ...]:
        gradients = sum(p.grad.nbytes for p in self.parameters() if p.grad is not None)
        self.kept = max(self.kept, self.live.now - gradients)  # states too, of which the first step has none yet
        number = self.try_function(of_logits) if of_logits else 0
        losses, *own = Gradients.apply(1 + number, len(target_ids), *trained_of(self))
        return (losses, *own) if of_logits else losses

    def try_function(self, of_logits) -> int:
        """Notes the bytes that it needs for each logit; returns the number of its results."""
        before, self.live.peak = (self.live.now, self.live.peak), self.live.now
        with unset_fake_temporarily():  # small enough to have values
            logits = torch.zeros(4, self.causal_lm.config.vocab_size)
            arguments = [torch.zeros(4, dtype=torch.int64), *([torch.zeros_like(logits)] if self.has_logits else [])]
            try:
                number = len(results(of_logits, logits, *arguments)) - 1
                gradient_of(of_logits, logits, arguments, [torch.ones(4)] * (1 + number))
            except RuntimeError as error:
                raise ValueError(f"of_logits: {error}") from error
        self.function = max(self.function, (self.live.peak - before[0]) / logits.numel())
        self.live.peak = before[1]
        return number


class Gradients(torch.autograd.Function):
    """Results (n,) from which each parameter gets a gradient."""

    @staticmethod
    def forward(ctx, number: int, n: int, *parameters) -> tuple[torch.Tensor, ...]:
        ctx.parameters = parameters
        return tuple(parameters[0].new_zeros(n, dtype=torch.float32) for _ in range(number))

    @staticmethod
    def backward(ctx, *_):
        return None, None, *map(torch.empty_like, ctx.parameters)


def try_step(meta_lm: torch.nn.Module, config: Resolved, dtype: torch.dtype) -> Tried:
    """meta_lm: the model, on the meta device will do. dtype: of the weights.

    Raises UserError with file and line if the step cannot be made, or keeps what no checkpoint holds.
    """
    method = load_step_file(config.step_file, config.step_set)  # a copy of its own, which the run does not see
    file = name_of(method)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_parameters(meta_lm, dtype) as model:
        optimizers = run_own(method, "make_optimizers", model, config)
        check_optimizers(optimizers, model, file)
        names = [type(optimizer).__name__ for optimizer in optimizers]
        note_peaks(optimizers)
        model.attach(live, method.REFERENCE)
        live.seen |= {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        gradients = sum(p.nbytes for p in trained_of(model))
        before = others_than_states(method, model, optimizers)
        try:
            with live:
                for step in (0, 1):
                    live.peak = live.now
                    one_step(method, model, optimizers, step, config)
        except NOT_FAKE as error:
            warn(
                f"the step of {file} cannot be tried without values ({one_line(error)[:100]}); its memory is planned "
                "as that of AdamW, and more that it keeps is not"
            )
            states, update = max(2 * gradients, bytes_of_states(optimizers)), 0
        else:
            check_what_is_kept(before, others_than_states(method, model, optimizers), optimizers, model, file)
            states = bytes_of_states(optimizers)
            update = max(0, live.peak - states - gradients)
    return Tried(names, states, max(0, model.kept - states), update, model.function, method.REFERENCE)


@contextmanager
def fake_parameters(meta_lm: torch.nn.Module, dtype: torch.dtype):
    """The model with fake parameters; afterwards it has its own again, frozen if the step froze them."""
    places = [(module, name) for module in meta_lm.modules() for name in list(module._parameters)]
    own = [module._parameters[name] for module, name in places]
    fakes = {p: torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
             for p in own if p is not None}  # fmt: skip
    try:
        for (module, name), parameter in zip(places, own, strict=True):
            module._parameters[name] = fakes.get(parameter)
        yield WithoutForward(meta_lm, loss_chunk=1)
    finally:
        for (module, name), parameter in zip(places, own, strict=True):
            module._parameters[name] = parameter
            if parameter is not None:
                parameter.requires_grad_(fakes[parameter].requires_grad)


def trained_of(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def one_step(method: ModuleType, model, optimizers: list, step: int, config) -> None:
    reference = torch.zeros(6) if method.REFERENCE == "losses" else None
    row = Example(torch.zeros(8, dtype=torch.int64), 2, 5, "trial", reference=reference)
    labels = {"": (1, 1), "pairs": (1, -1, 1, -1), "thumbs": (1, 0, -1, 0)}[method.PREFERENCE]
    rows = [dataclasses.replace(row, label=label, unit=2 * place // len(labels)) for place, label in enumerate(labels)]
    batch = make_batch(rows, 2, batch_size=1, step=step)
    finite(run_own(method, "lr_multiplier", step, max(1, config.max_steps), config), method)
    arguments = model, batch.micro_batches[0], batch, config
    check_loss(run_own(method, "micro_batch_loss", *arguments, passes=NOT_FAKE), method)
    alone = Alone(model.live)
    metrics = run_own(method, "train_step", model, optimizers, batch, alone, 1.0, config, passes=NOT_FAKE)
    if not isinstance(metrics, StepMetrics):
        raise UserError(f"train_step in {name_of(method)} returned {type(metrics).__name__}; it returns StepMetrics")
    with run_own(method, "evaluated_weights", model, optimizers):
        pass


class Alone:
    """An accelerator of one process, for tensors without values."""

    num_processes, process_index, is_main_process, is_fsdp2, mixed_precision = 1, 0, True, False, "no"

    device = torch.device("cpu")

    def __init__(self, live: LiveBytes):
        self.live = live

    def backward(self, loss, **_) -> None:
        """What a real one needs meanwhile is in the phases of memory.py; here all gradients come at one time."""
        peak = self.live.peak
        loss.backward()
        self.live.peak = max(peak, self.live.now)

    def gather(self, tensor, *_, **__):
        return tensor

    reduce = gather_for_metrics = gather

    def unwrap_model(self, model, **_):
        return model

    def __getattr__(self, name: str):
        if hasattr(Accelerator, name):
            raise NotImplementedError(f"accelerator.{name}")
        raise AttributeError(f"an Accelerator has no {name!r}")

    def no_sync(self, model):
        return torch.enable_grad()

    autocast = no_sync


def bytes_of_states(optimizers: list) -> int:
    tensors = [leaf for optimizer in optimizers for leaf in tree_leaves([*optimizer.state.values()])]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
    return sum(sizes.values())
