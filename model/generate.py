"""Replies of a model, whole or as they come, split into thinking and answer by token id."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from data.base.errors import UserError, one_line
from data.encode import control_tokens
from data.template import generation_prompt, has_block, opens_block
from model.qwen3 import find_model
from model.tiny import TINY

# Replies made at one time: 16 of Qwen3-1.7B with 2,048 tokens each keep 3.5 GiB of keys and values.
BATCH = 16


class Reply(NamedTuple):
    think: str
    answer: str
    closed: bool  # one block of thinking, ended with </think>
    stopped: bool  # the reply ended with an end token, not with the token limit


def format_rates(replies: list[Reply]) -> dict[str, float]:
    """Shares of replies: one closed block of thinking; a closed one and an answer; ended by an end token; a closed
    block with nothing in it."""
    counts = {
        "closed": sum(reply.closed for reply in replies),
        "answered": sum(reply.closed and bool(reply.answer) for reply in replies),
        "stopped": sum(reply.stopped for reply in replies),
        "empty_think": sum(reply.closed and not reply.think for reply in replies),
    }
    return {name: count / len(replies) for name, count in counts.items()}


def sampling_keywords(**given) -> dict:
    """Keywords of `generate` from temperature (0 is greedy), top_p and top_k; what is None is the model's own."""
    if given.get("temperature") == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def emulates_bf16(device: torch.device) -> bool:
    """Whether it is a CPU on which bf16 is slower than fp32 (with AVX2 6 to 12 times, on some machines 400)."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def fast_dtype(device: torch.device):
    """A model's own precision, or fp32 where bf16 is emulated."""
    return torch.float32 if emulates_bf16(device) else "auto"


def load_for_generation(model: str | Path, device: torch.device):
    """(model, tokenizer) of a local folder or a hub id, with PyTorch's attention.

    Raises UserError if that is no model, or cannot be downloaded.
    """
    tokenizer, folder = chat_tokenizer(model), find_model(str(model))
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=fast_dtype(device), attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        ).to(device)
    except Exception as error:
        raise UserError(f"cannot load {model}: {one_line(error)}") from error
    return causal_lm.eval(), tokenizer


def chat_tokenizer(model: str | Path):
    """A model's own tokenizer, without tokens that it would be trained with. Raises UserError if it cannot chat."""
    if str(model) in TINY:
        raise UserError(f"`{model}` is made when it is trained: train it, and name its outputs/tiny/best")
    folder = find_model(str(model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"cannot load {model}: {one_line(error)}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {model} has no chat template: it is no chat model")
    return tokenizer


@contextmanager
def ready_to_generate(causal_lm, in_bf16: bool = False):
    """Switches a training model to generation: PyTorch's attention (padding, a cache of keys and values), no compiled
    layers. in_bf16: with weights cast once, as they will be exported; autocast would cast them again
    for each token, 6.9 GB of Qwen3-1.7B."""
    was_training, attention = causal_lm.training, causal_lm.config._attn_implementation
    causal_lm.eval().set_attn_implementation("sdpa")
    places = [
        (module._parameters, name)
        for module in causal_lm.modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
    own = [parameters[name] for parameters, name in places]
    cast = {p: torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in own} if in_bf16 else {}
    try:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = cast.get(parameter, parameter)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = parameter
        causal_lm.train(was_training).set_attn_implementation(attention)


@torch.no_grad()
def reply_to(
    causal_lm,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    generate: Callable | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Reply]:
    """Greedy replies to prompts as the chat template renders them, some at a time with a cache of keys and values.

    A prompt that fills the model's context gets an empty reply. generate: causal_lm's own, or a function that
    gathers the weights first. should_stop: asked after each token; True cuts the replies off.
    """
    options = {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "stopping_criteria": [lambda ids, *_, **__: torch.full((len(ids),), should_stop(), device=ids.device)],
    }
    ends = end_tokens(causal_lm)
    replies = generate_ids(causal_lm, tokenizer, prompts, max_new_tokens, generate, **options)
    return [
        split_reply(ids, tokenizer, ends, prompt) if ids else Reply("", "", closed=False, stopped=False)
        for prompt, (_, ids) in zip(prompts, replies, strict=True)
    ]


@torch.no_grad()
def generate_ids(
    causal_lm, tokenizer, prompts: list[str], max_new_tokens: int, generate: Callable | None = None, **options
) -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) of each, as token ids; a reply ends with its end token, if it got so far. One whose prompt fills
    the model's context is empty. options: keywords of `generate`."""
    if len(prompts) > BATCH:
        batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        return [
            pair
            for batch in batches
            for pair in generate_ids(causal_lm, tokenizer, batch, max_new_tokens, generate, **options)
        ]
    rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    limit, ends = causal_lm.config.max_position_embeddings, end_tokens(causal_lm)
    fitting = [index for index, row in enumerate(rows) if len(row) < limit]
    found = [(row, []) for row in rows]
    if not fitting:
        return found
    # Padded by `pad`: the tokenizer itself would remember that it padded, and be exported so.
    inputs = {"input_ids": [rows[index] for index in fitting]}
    inputs = tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(causal_lm.device)
    length = inputs["input_ids"].shape[1]
    output = (generate or causal_lm.generate)(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, limit - length),
        **options,
    )
    for index, ids in zip(fitting, output[:, length:].tolist(), strict=True):
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        found[index] = rows[index], ids[: end + 1]
    return found


def end_tokens(causal_lm) -> list[int]:
    ends = causal_lm.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def split_reply(ids: list[int], tokenizer, ends: list[int], prompt: str = "") -> Reply:
    """ids of a reply, perhaps followed by padding -> Reply. A reply that opens a block of thinking and does not
    close it is all thinking, one that has no block all answer. What the prompt has of a block counts as the reply's."""
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    start, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    opened = ids[:1] == [start] or opens_block(prompt)
    ids = ids[1:] if ids[:1] == [start] else ids
    cut = ids.index(close) if close in ids else len(ids) if opened else -1
    think, answer = (tokenizer.decode(part).strip() for part in (ids[: max(cut, 0)], ids[cut + 1 :]))
    closed = ids.count(close) + has_block(prompt) == 1 and start not in ids
    return Reply(think, answer, closed, stopped=end is not None)


class ReplyError(UserError):
    """There can be no reply. kind: full (the dialogue leaves no room for one), control (it holds a control token) or
    failed (the model did)."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class ReplyStream(BaseStreamer):
    """One reply as it comes: iterate over (part, text), part being think or answer; then ask for `reply`.

    The model generates in a thread of its own. Leaving the loop early, or `stop`, ends it after the next token.
    """

    def __init__(
        self, causal_lm, tokenizer, dialogue: list[dict], thinking: bool = True, max_new_tokens: int = 2048, **sampling
    ):
        """dialogue ends with a user message; thinking False asks for an answer alone; sampling: keywords of
        `generate` that take the place of the model's generation_config. Raises ReplyError."""
        texts = (message["content"] for message in dialogue if message["role"] != "assistant")
        if found := next(filter(None, map(control_tokens(tokenizer).search, texts)), None):
            raise ReplyError(f"{found.group()} inside a text would be taken for a control token", "control")
        prompt = generation_prompt(dialogue, tokenizer, thinking)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(causal_lm.device)
        length, limit = inputs["input_ids"].shape[1], causal_lm.config.max_position_embeddings
        if length >= limit:
            raise ReplyError(f"the dialogue has {length} tokens and the model takes {limit}", "full")
        self.tokenizer, self.ends, self.prompt = tokenizer, end_tokens(causal_lm), prompt
        self.ids: list[int] = []
        self.prompt_is_past, self.stopping, self.arrived = False, threading.Event(), queue.SimpleQueue()
        self.started, self.seconds = time.perf_counter(), 0.0

        def generate() -> None:
            try:
                causal_lm.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=min(max_new_tokens, limit - length),
                    streamer=self,
                    stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), self.stopping.is_set())],
                    **sampling,
                )
            except Exception as error:
                self.arrived.put(error)
            self.arrived.put(None)

        self.thread = threading.Thread(target=generate, daemon=True)
        self.thread.start()

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: once with the prompt, then with each token."""
        if self.prompt_is_past:
            self.arrived.put(int(value))
        self.prompt_is_past = True

    def end(self) -> None:
        pass

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        start, close = self.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        part = "think" if opens_block(self.prompt) else "answer"
        decoder, begun, held = DecodeStream(), False, ""
        try:
            while (token := self.arrived.get()) is not None:
                if isinstance(token, Exception):
                    raise ReplyError(f"the model failed: {token}", "failed") from token
                self.ids.append(token)
                self.seconds = time.perf_counter() - self.started
                if token in self.ends:
                    continue
                if token == close or (token == start and len(self.ids) == 1):
                    part, decoder, begun, held = "answer" if token == close else "think", DecodeStream(), False, ""
                    continue
                # Nothing comes while a character is not whole. Whitespace around a part is left out.
                text = held + (decoder.step(self.tokenizer.backend_tokenizer, token) or "")
                text = text if begun else text.lstrip()
                held = text[len(text.rstrip()) :]
                if text := text.rstrip():
                    begun = True
                    yield part, text
        finally:
            self.stop()

    @property
    def reply(self) -> Reply:
        return split_reply(self.ids, self.tokenizer, self.ends, self.prompt)
