"""LoRA: the weights stay as they are, and low-rank updates beside them are trained (arXiv:2106.09685).

peft puts the updates into the linear layers in place, so the model stays the same model to the loop.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.base.errors import cannot_import
from data.reading.hub import hub_id
from model.nf4 import quantise_frozen

NAME = "default"  # peft's own, for the one adapter of a model


def add_lora(causal_lm, rank: int, base_model: str, frozen: str = "full") -> None:
    """Freezes causal_lm and adds updates of this rank, scaled by 2, to every linear layer but the head. frozen: nf4
    keeps the weights of these layers in 4 bits."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise cannot_import(error, "peft", "lora") from error
    found = None if Path(base_model).expanduser().exists() else hub_id(base_model)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=found.name if found else base_model,
        revision=found.revision if found else None,
    )
    inject_adapter_in_model(config, causal_lm)
    if frozen == "nf4":
        quantise_frozen(causal_lm)


@contextmanager
def updates_off(causal_lm):
    """Within it the model is the one before training."""
    layers = [module for module in causal_lm.modules() if hasattr(module, "lora_A")]
    try:
        for layer in layers:  # peft's own enable_adapters also freezes, and thaws what a step file froze
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(state_dict: dict[str, torch.Tensor], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The items of the state dict without updates: each weight is W + scale * B A in fp32, with the name of W.

    One at a time, so that a card need not hold a second model.
    """
    for name, weight in state_dict.items():
        if name.endswith(".base_layer.bias"):  # Qwen2 has some
            yield name.replace(".base_layer.", "."), weight
        elif name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            a, b = (state_dict[f"{layer}.lora_{part}.{NAME}.weight"].float() for part in "AB")
            yield f"{layer}.weight", weight.float() + scale * (b @ a)
        elif ".lora_" not in name:
            yield name, weight


def merged_into(base, state_dict: dict[str, torch.Tensor], scale: float) -> Iterable[tuple[str, torch.Tensor]]:
    """The same of a model whose frozen weights are in 4 bits: all else is merged into base, the model as it was, in
    place, so that the host need not hold it twice."""
    weights = base.state_dict()
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if (a := state_dict.get(f"{layer}.lora_A.{NAME}.weight")) is not None and kind == "weight":
            b = state_dict[f"{layer}.lora_B.{NAME}.weight"]
            weight.copy_(weight.float() + scale * (b.float() @ a.float()).to(weight.device))
        else:  # a step file may train it, too
            weight.copy_(state_dict.get(name, state_dict.get(f"{layer}.base_layer.{kind}")))
    return weights.items()


def save_adapter(causal_lm, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """The updates alone, as peft.PeftModel.from_pretrained takes them."""
    config = causal_lm.peft_config[NAME]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.save_pretrained(folder)
    weights = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": weight.to("cpu").contiguous()
        for name, weight in state_dict.items()
        if ".lora_" in name
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
