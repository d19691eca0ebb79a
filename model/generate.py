"""Replies of a model, split into thinking and answer by token id."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reply(NamedTuple):
    think: str
    answer: str
    closed: bool  # one block of thinking, ended with </think>
    stopped: bool  # the reply ended with an end token, not with the token limit


def load_for_generation(folder: Path, device: torch.device):
    """(model, tokenizer) of an exported folder, in its own dtype with PyTorch's attention."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device).eval(), tokenizer


@contextmanager
def ready_to_generate(causal_lm):
    """A model that trains, as it generates: padded rows and a cache need PyTorch's attention, and one token at a
    time no compiled layers."""
    was_training, attention = causal_lm.training, causal_lm.config._attn_implementation
    causal_lm.eval().set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        causal_lm.train(was_training).set_attn_implementation(attention)


@torch.no_grad()
def reply_to(
    causal_lm, tokenizer, dialogues: list[list[dict]], max_new_tokens: int, generate: Callable | None = None
) -> list[Reply]:
    """Greedy replies to dialogues that end with a user message, in one batch.

    generate: causal_lm's own, or what calls it where the weights have to be gathered first.
    """
    prompts = [
        tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True) for dialogue in dialogues
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
        causal_lm.device
    )
    room = causal_lm.config.max_position_embeddings - inputs["input_ids"].shape[1]
    output = (generate or causal_lm.generate)(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    ends = end_tokens(causal_lm)
    return [split_reply(ids, tokenizer, ends) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


def end_tokens(causal_lm) -> list[int]:
    ends = causal_lm.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def split_reply(ids: list[int], tokenizer, ends: list[int]) -> Reply:
    """ids of a reply, perhaps followed by padding -> Reply. Without </think> all of it is thinking."""
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    start, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    ids = ids[1:] if ids[:1] == [start] else ids
    cut = ids.index(close) if close in ids else len(ids)
    think, answer = (tokenizer.decode(part).strip() for part in (ids[:cut], ids[cut + 1 :]))
    closed = ids.count(close) == 1 and start not in ids
    return Reply(think, answer, closed, stopped=end is not None)
