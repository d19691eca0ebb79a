"""Replies of a model, split into thinking and answer by token id."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reply(NamedTuple):
    think: str
    answer: str
    closed: bool  # the thinking ended with </think>
    stopped: bool  # the reply ended with an end token, not with the token limit


def load_for_generation(folder: Path, device: torch.device):
    """(model, tokenizer) of an exported folder, in its own dtype with PyTorch's attention."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def reply_to(model, tokenizer, dialogues: list[list[dict]], max_new_tokens: int) -> list[Reply]:
    """Greedy replies to dialogues that end with a user message, in one batch."""
    prompts = [
        tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True) for dialogue in dialogues
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
        model.device
    )
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [split_reply(ids, tokenizer, ends) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


def split_reply(ids: list[int], tokenizer, ends: list[int]) -> Reply:
    """ids of a reply, perhaps followed by padding -> Reply. Without </think> all of it is thinking."""
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    start, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    ids = ids[1:] if ids[:1] == [start] else ids
    closed = close in ids
    cut = ids.index(close) if closed else len(ids)
    think, answer = (tokenizer.decode(part).strip() for part in (ids[:cut], ids[cut + 1 :]))
    return Reply(think, answer, closed, stopped=end is not None)
