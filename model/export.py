"""The trained model as a folder that stands alone: weights, tokenizer, configuration, model card, Modelfile."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from data.base.console import visible
from data.base.files import write_json
from data.reading.hub import page_of
from data.reading.source import public_name
from data.template import opens_block
from model.lora import NAME, merged, merged_into, save_adapter
from model.nf4 import check_same_weights
from model.qwen3 import generation_config

os.umask(UMASK := os.umask(0))  # read once: for an instant it is 0 for every thread

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


MARKS = re.compile(r"([\\`*_~<>&\[\]|$^=#!{}])")


def inline(text: str) -> str:
    """Markdown that shows a text character by character inside of a line."""
    return MARKS.sub(r"\\\1", " ".join(visible(str(text)).split()))


def plain(text: str) -> str:
    """The same of a line by itself, whose beginning could make it a list or a rule."""
    text = MARKS.sub(r"\\\1", visible(str(text)))
    text = re.sub(r"^(\s*)([-+])|^(\s*\d+)([.)])(?=\s|$)", r"\1\3\\\2\4", text)
    return re.sub(r"^ +", lambda blanks: "&#32;" * len(blanks.group()), text)


def code(text: str) -> str:
    """The same in the type of code, also inside of a table."""
    text = " ".join(visible(str(text)).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return f"{ticks}{blank}{text}{blank}{ticks}".replace("|", "\\|")


TEMPLATES.filters["cell"] = inline  # of a table
TEMPLATES.filters["code"] = code


def export(
    causal_lm,
    state_dict: dict[str, torch.Tensor],
    tokenizer,
    folder: Path,
    texts: dict[str, str] | None = None,
    base: torch.nn.Module | None = None,
) -> None:
    """Writes a complete Hugging Face folder in bf16: the new one whole, or the old one stays. If the model
    trains with LoRA its updates are merged into the weights, and stand alone in adapter/.

    state_dict has causal_lm's own keys; texts: further files, name -> content; base: the model as it was, if
    causal_lm's frozen weights are in 4 bits, whose weights take the updates. A kill between the two renames leaves
    `.old-NAME`, which `restore_export` puts back.
    """
    temporary, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    restore_export(folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    items = state_dict.items()
    if peft_config := getattr(causal_lm, "peft_config", None):
        (temporary / "adapter").mkdir(parents=True)
        save_adapter(causal_lm, state_dict, temporary / "adapter")
        scale = peft_config[NAME].lora_alpha / peft_config[NAME].r
        if base:
            check_same_weights(causal_lm, base)
        items = merged_into(base, state_dict, scale) if base else merged(state_dict, scale)
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in items}
    if causal_lm.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    # Not under the names that a checkpoint with pictures has for its part for text.
    causal_lm.save_pretrained(temporary, state_dict=weights, save_original_format=False)
    config = copy.deepcopy(causal_lm.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(temporary)
    generation_config(causal_lm, tokenizer).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    speak_to_version_4(temporary)
    check_weights(temporary, config)
    for name, text in (texts or {}).items():
        (temporary / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    for path in [path for path in temporary.rglob("*") if path.is_file()]:
        # safetensors creates files that only their owner can read.
        path.chmod(0o666 & ~UMASK)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def speak_to_version_4(folder: Path) -> None:
    """What transformers 4 reads under other names, and would replace by a default without a word."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # 4 would take 10,000
    write_json(folder / "config.json", config)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer_config.json", tokenizer)


def check_weights(folder: Path, config) -> None:
    """Raises ValueError if the weights in a folder have not the names and shapes that a model of config reads."""
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
    wanted = {name: list(weight.shape) for name, weight in fresh.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if found != wanted:
        name = min(name for name in found | wanted if found.get(name) != wanted.get(name))
        raise ValueError(f"{name} was written as {found.get(name)}, and a fresh model has {wanted.get(name)}")


def restore_export(folder: Path) -> None:
    """Puts the last export back if a kill struck between the two renames."""
    old = folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        old.rename(folder)


def header_of(folder: Path) -> dict:
    """The head of an exported model's card; empty without one."""
    try:
        header, _, _ = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
        return dict(yaml.safe_load(header))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def card(run: dict, language: str, sampling: GenerationConfig, prompt: str = "<|im_start|>") -> dict[str, str]:
    """README.md, the model card, and a Modelfile for Ollama if the chat template is Qwen3's form. run: its settings and
    figures; prompt: what the template makes of a question.

    The card's header keeps the system prompt that the model was trained with, for everyone who talks to it.
    """
    header = {
        "language": ["zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen3", "medical", "reasoning", "sft"],
        "system_prompt": run["system_prompt"],
        "step": run["step"],
        "deciding_loss": run["deciding_loss"],
    }
    # If a model or dataset is a path, the name is enough; the folders above it are private.
    model = Path(run["model"])
    run = run | {
        "model": model.name if model.expanduser().exists() else run["model"],
        "model_page": "" if model.expanduser().exists() else page_of(run["model"]),
        "dataset": ", ".join(map(public_name, run["dataset"])),
    }
    run |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    run |= {"is_chatml": "<|im_start|>" in prompt, "opens_block": opens_block(prompt)}
    text = TEMPLATES.get_template(f"card.{language}.md").render(run)
    files = {"README.md": f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False)}---\n\n{text}"}
    if run["is_chatml"]:
        files["Modelfile"] = TEMPLATES.get_template("Modelfile").render(run)
    return files


def system_prompt_of(folder: Path) -> str:
    """The system prompt that an exported model was trained with; empty where its card names none."""
    return str(header_of(folder).get("system_prompt") or "")
