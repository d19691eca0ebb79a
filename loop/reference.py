"""The model before training, for a step file with REFERENCE = "logits" or "losses".

logits: a frozen copy of the weights, whose logits a function of logits gets beside the model's own; under LoRA the
weights themselves, with the updates off. losses: `micro_batch.reference`, the loss of each target before training, made
once and kept in data/reference.npy; no copy stays in memory. Both are of config.model, after a resume too.
"""

import dataclasses
import json
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from data.base.console import say
from data.base.errors import UserError
from data.base.files import sync_folder, write_json
from data.base.language import tr
from data.encoded import Encoded
from loop.config import Resolved
from loop.distributed import gather, on_main_process
from loop.record.checkpoint import sums_of_bits
from loop.score import score
from model.attention import PACKED
from model.loss import Reference
from model.nf4 import layers_in_4_bits

ROWS = 512  # whose losses are gathered at a time


def add_reference(kind: str, model, rows: Encoded, config: Resolved, accelerator: Accelerator, is_new: bool) -> None:
    """Gives the model, or the training rows, what REFERENCE asks for. All ranks, with the weights of config.model.
    is_new: the run begins, so what another one left in its folder is not its own. Weights in 4 bits, which are in no
    checkpoint, are checked here, too.

    Raises UserError if the weights are not those that the run began with.
    """
    if not kind and config.frozen == "full":
        return
    folder, sft_model = Path(config.output_dir) / "data", accelerator.unwrap_model(model)
    bits = sum(sums_of_bits(p for name, p in sft_model.named_parameters() if ".lora_" not in name))
    bits = sum(gather(bits)) if accelerator.is_fsdp2 else bits
    if config.frozen == "nf4":  # whole on each rank
        in_4_bits, *others = gather(sum(int(layer.bits) for layer in layers_in_4_bits(sft_model)))
        if any(other != in_4_bits for other in others):
            raise UserError(f"the weights of {config.model} are not the same on every rank")
        bits += in_4_bits
    on_main_process(lambda: check_same_model(folder, bits, config, is_new))
    if not kind:
        return
    if kind == "logits":
        causal_lm = sft_model.causal_lm
        sft_model.reference = (Reference(causal_lm) if config.lora_rank else copy_of(causal_lm, config),)
    else:
        path = folder / "reference.npy"
        if not on_main_process(path.is_file):
            say(tr("reference: the losses of {:,} rows before training", len(rows)))
            write_losses(path, model, rows, accelerator)
        rows.reference = numpy.load(path, mmap_mode="r")


def check_same_model(folder: Path, bits: int, config: Resolved, is_new: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reference.json"
    for old in (path, folder / "reference.npy") if is_new else ():
        old.unlink(missing_ok=True)
    now = {"sum_of_bits": bits, "weights": config.weights}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise UserError(
            f"{config.model} does not have the weights that this run began with, of which "
            f"{'those in 4 bits are' if config.frozen == 'nf4' else f'the REFERENCE of {config.step_file} is'} made; "
            "--model names the model as it was"
        )
    write_json(path, now)


@torch.no_grad()
def copy_of(causal_lm, config: Resolved) -> Reference:
    """On the same device, and sharded if the model is; in bf16 if products are, which would round it anyway."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else getattr(torch, config.weights)
    first, made = next(causal_lm.parameters()), {}
    is_sharded = isinstance(first, DTensor)
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(causal_lm.config, attn_implementation=PACKED, dtype=dtype).eval()
    for name, module in copy.named_modules():
        own = causal_lm.get_submodule(name)
        for key, p in own._parameters.items():
            if p is not None and p not in made:  # a tied one is made once
                empty = torch.empty(p.shape, dtype=dtype, device="cpu" if is_sharded else p.device)
                made[p] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[key] = made.get(p)
        module._buffers |= {key: buffer.clone() for key, buffer in own._buffers.items() if buffer is not None}
    reference = Reference(copy)
    for layer in copy.model.layers if config.compile == "on" else ():
        layer.compile(dynamic=True)
    for part in [*copy.model.layers, reference] if is_sharded else ():
        fully_shard(part, mesh=first.device_mesh)
    weights = dict(causal_lm.named_parameters())
    for name, p in copy.named_parameters():
        p.copy_(weights[name])
    return reference


def write_losses(path: Path, model, rows: Encoded, accelerator: Accelerator) -> None:
    """One number a target, in fp32 and in the order of the rows. All ranks; the main process writes."""
    temporary = path.with_name(f".tmp-{path.name}")
    file = None
    if accelerator.is_main_process:
        file = numpy.lib.format.open_memmap(temporary, "w+", numpy.float32, (int(rows.ends[-1]),))
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        parts = [tuple(("", n, n + 1) for n in range(row.num_targets)) for row in some]
        some = [dataclasses.replace(row, own_parts=part) for row, part in zip(some, parts, strict=True)]
        losses = [line.loss_sum for line in score(model, some, accelerator)]
        if file is not None:
            end = rows.ends[start + len(some) - 1]
            file[end - len(losses) : end] = losses

    def finish() -> None:
        file.flush()
        temporary.replace(path)
        sync_folder(path.parent)

    on_main_process(finish)
