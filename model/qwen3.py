"""The model: find it, load it."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.base.console import say
from data.base.errors import UserError, one_line
from data.reading.hub import download, hub_id
from model.attention import PACKED
from model.tiny import (
    CHATML_TEMPLATE,
    OPENING_TEMPLATE,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    TINY,
    tiny_config,
    tiny_qwen3_5_config,
    tiny_tokenizer,
)

ENDS = ["<|im_end|>", "<|endoftext|>"]  # of a reply in ChatML; other templates end it with the tokenizer's own
# transformers' warnings that Qwen3.5 has no kernels here; the start of a run says so.
logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
# Dense decoders whose layers take packed rows: Qwen3; Qwen2.5 and DeepSeek-R1-Distill-Qwen; the text part of Qwen3.5;
# llama is the small pretrained model that the tests train.
ARCHITECTURES = ("qwen3", "qwen2", "qwen3_5_text", "llama")


def find_model(model: str, weights: bool = True) -> Path:
    """The local folder of a model: a path, or a download from a hub (without weights: the small files)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model} has no config.json: it is no Hugging Face model folder")
        return folder
    if folder.exists() or not hub_id(model):
        raise UserError(
            f"there is no model folder {model!r}; name a local Hugging Face folder, "
            "a ModelScope model id (owner/name, owner/name@REVISION), one of Hugging Face (hf:owner/name), or `tiny`"
        )
    files = ["*.json", "*.txt", "*.jinja", "README.md"]
    return download("model", model, [*files, "*.safetensors"] if weights else files)


def load_tokenizer(model: str, tiny_texts: Iterable[str] = (), weights: bool = True):
    """The tokenizer of a model; for a tiny one it is made from tiny_texts. Nothing of the folder is executed."""
    if model in TINY:
        return tiny_tokenizer(tiny_texts, CHATML_TEMPLATE if model == "tiny" else OPENING_TEMPLATE)
    folder = find_model(model, weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer of {model}: {one_line(error)}") from error
    return with_thinking(tokenizer, model)


def with_thinking(tokenizer, model: str):
    """The tokenizer, able to render and to read thinking. One that speaks ChatML and knows no thinking, as that of
    Qwen2.5, learns Qwen3's form. Raises UserError if there is no way."""
    template, vocabulary = tokenizer.chat_template, tokenizer.get_vocab()
    if template is None:
        raise UserError(f"the tokenizer of {model} has no chat template; a chat model is needed, such as Qwen3")
    if all(token in vocabulary for token in SPECIAL_TOKENS) and "<|im_start|>" in template:
        if missing := [token for token in THINK_TOKENS if token not in vocabulary]:
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in missing])
        if "reasoning_content" not in template:
            say(f"the chat template of {model} leaves thinking out: trained and exported with Qwen3's form")
            tokenizer.chat_template = CHATML_TEMPLATE
    elif missing := [token for token in THINK_TOKENS if token not in vocabulary]:
        raise UserError(f"the tokenizer of {model} has no token {', '.join(missing)}; a Qwen3 model is needed")
    elif "reasoning_content" not in template and "</think>" not in template:
        raise UserError(f"the chat template of {model} has no place for thinking; a Qwen3 model is needed")
    return tokenizer


def model_config(model: str, tokenizer, weights: bool = True):
    if model in TINY:
        config = tiny_config(tokenizer) if model == "tiny" else tiny_qwen3_5_config(tokenizer)
    else:
        config = config_of_folder(model, weights)
    if is_recurrent(config):
        from model.recurrent import replace_recurrent_layers  # its import takes 0.3 s

        replace_recurrent_layers()
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{model}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    return config


def config_of_folder(model: str, weights: bool):
    """Of a Qwen3.5 with pictures the part for text; other models with pictures are refused."""
    try:
        config = AutoConfig.from_pretrained(find_model(model, weights), local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load {model}: {one_line(error)}") from error
    if config.model_type == "qwen3_5":
        config = config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"{model} is a {config.model_type} model; a (dense) qwen3, qwen3.5 or qwen2 model is needed")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(f"{model} has layers with sliding-window attention, which this loop has not")
    return config


def is_recurrent(config) -> bool:
    """Whether some layers are Gated DeltaNet."""
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def meta_model(model: str, tokenizer, weights: bool = True):
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(model, tokenizer, weights))


def load_model(
    model: str, tokenizer, gradient_checkpointing: bool, dtype: torch.dtype = torch.float32, compile: bool = False
):
    """The causal language model with packed attention, ready to train."""
    config = model_config(model, tokenizer)
    try:
        if model in TINY:
            causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype)
        else:
            causal_lm = AutoModelForCausalLM.from_pretrained(
                find_model(model),
                config=config,
                dtype=dtype,
                attn_implementation=PACKED,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        causal_lm.generation_config = generation_config(causal_lm, tokenizer)
        causal_lm.generation_config.validate(strict=True)  # or no export could be written
    except Exception as error:
        raise UserError(f"cannot load {model}: {one_line(error)}") from error
    if gradient_checkpointing:
        # transformers renamed it after 5.17; both are non-reentrant by default.
        getattr(causal_lm, "activation_checkpointing_enable", causal_lm.gradient_checkpointing_enable)()
    if compile:
        # In place, so the names of weights stay; one graph serves all layers and, being dynamic, all lengths.
        for layer in causal_lm.model.layers:
            layer.compile(dynamic=True)
    return causal_lm.train()  # from_pretrained leaves it without dropout


def generation_config(causal_lm, tokenizer) -> GenerationConfig:
    """Both end tokens, and Qwen3's sampling if the source model has none of its own, as a base model has."""
    own = causal_lm.generation_config.to_dict() if causal_lm.generation_config else {}
    own = {name: value for name, value in own.items() if own.get("do_sample") and value is not None}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = ENDS if "<|im_start|>" in tokenizer.chat_template else [tokenizer.eos_token]
    end = tokenizer.convert_tokens_to_ids(ends)
    known = {name: own.get(name, value) for name, value in sampling.items()}
    return GenerationConfig(**known, eos_token_id=end, pad_token_id=end[-1], bos_token_id=end[-1])
