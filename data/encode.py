"""Row -> Examples: token ids, and which of them are think and answer targets."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable

import torch

from data.base.errors import UserError
from data.reading.rows import Row
from data.template import generation_prompt, whole_text


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One assistant turn with its history, ending in the end token (of Qwen3 <|im_end|>).

    Targets are the ids from prompt_length on: thinking up to answer_start (`<think>`, unless the prompt ends with it,
    through `</think>`), the answer from there through the end token. Without thinking the two are equal.
    """

    input_ids: torch.Tensor  # (T,) int32 or int64
    prompt_length: int
    answer_start: int
    location: str  # file and line of its row
    next_tokens: tuple[int, ...] = ()  # further targets: each is asked for after the last id, as an exam's letters are
    own_parts: tuple[tuple[str, int, int], ...] | None = None  # in the place of those of `parts`
    reference: torch.Tensor | None = None  # (num_targets,) fp32, the losses before training
    label: int = 1  # of replies that are compared: 1 good, -1 bad, 0 of another prompt; other rows have 1
    unit: int = 0  # the number in its batch of what is compared: a pair, or one reply

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return len(self) - self.prompt_length + len(self.next_tokens)

    @property
    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """(name, begin, end) of spans of its targets, of which none is empty."""
        if self.own_parts is not None:
            return self.own_parts
        think, end = self.num_think_targets, len(self) - self.prompt_length
        parts = ("think", 0, think), ("answer", think, end), ("close", think - 1, think), ("stop", end - 1, end)
        return tuple(part for part in parts if 0 <= part[1] < part[2])

    @property
    def num_think_targets(self) -> int:
        return self.answer_start - self.prompt_length

    @property
    def num_answer_targets(self) -> int:
        return len(self) - self.answer_start


def digest(examples: Iterable[Example]) -> str:
    """A hash of the tokens, of what is a target, and of their order: what training sees of the data."""
    sha256 = hashlib.sha256()
    for example in examples:
        sha256.update(f"{len(example)},{example.prompt_length},{example.answer_start};".encode())
        sha256.update(example.input_ids.long().numpy())
        if example.label != 1:
            sha256.update(f"label {example.label};".encode())
    return sha256.hexdigest()[:16]


def encode_rows(rows: list[Row], tokenizer, max_length: int, overlong: str) -> tuple[list[Example], list[dict]]:
    """One Example for each assistant turn of each row, and the problems found.

    The text is the chat template's own rendering, tokenised once, without the newline that follows
    the end token. Thinking-free turns have an empty block in their prompt. Raises UserError
    if overlong is `error` and a turn has more than max_length tokens.
    """
    turns, problems = without_control(turns_of(rows), tokenizer)
    examples = []
    for (location, messages), example in zip(turns, encode_turns(turns, tokenizer), strict=True):
        if len(example) > max_length:
            problem = f"has {len(example)} tokens, more than max_length {max_length}"
            shorter = (
                shorten_thinking(location, messages, example, tokenizer, max_length) if overlong == "truncate" else None
            )
            action = "thinking shortened" if shorter else "dropped"
            problems.append({"location": location, "problem": problem, "action": action})
            example = shorter
        if example:
            examples.append(example)
    too_long = [
        f"{problem['location']} {problem['problem']}" for problem in problems if "max_length" in problem["problem"]
    ]
    if too_long and overlong == "error":
        listed = "; ".join(too_long[:5])
        raise UserError(
            f"{len(too_long)} rows are too long (overlong is `error`): {listed}. "
            "Raise --max-length or choose --overlong truncate or drop"
        )
    return examples, problems


def turns_of(rows: Iterable[Row]) -> list[tuple[str, list[dict]]]:
    """(location, messages up to it) of each assistant turn that is trained."""
    return [
        (row.location, row.messages[: index + 1])
        for row in rows
        for index, message in enumerate(row.messages)
        if message["role"] == "assistant" and message.get("loss", True)
    ]


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer) -> re.Pattern:
    """Those of a tokenizer's own, such as <|im_end|>, which a text that spells one out would become."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def without_control(turns: list, tokenizer) -> tuple[list, list[dict]]:
    """(turns, problems): a turn whose text holds a control token is no turn."""
    kept, problems = [], []
    for location, messages in turns:
        texts = (text for m in messages for text in (m["content"], m.get("reasoning_content", "")))
        found = next(filter(None, map(control_tokens(tokenizer).search, texts)), None)
        if found:
            problem = f"has the control token {found.group()} inside its text"
            problems.append({"location": location, "problem": problem, "action": "dropped"})
        else:
            kept.append((location, messages))
    return kept, problems


def encode_turns(turns: list[tuple[str, list[dict]]], tokenizer) -> list[Example]:
    prompts = [render_prompt(messages, tokenizer) for _, messages in turns]
    texts = [whole_text(messages, prompt, tokenizer) for (_, messages), prompt in zip(turns, prompts, strict=True)]
    think_end = tokenizer.convert_tokens_to_ids("</think>")
    examples = []
    all_ids = zip(turns, token_ids(prompts, tokenizer), token_ids(texts, tokenizer), strict=True)
    for (location, messages), prompt, ids in all_ids:
        if ids[: len(prompt)] != prompt:
            raise UserError(f"{location}: the chat template's prompt is not the beginning of its whole dialogue")
        has_thinking = "reasoning_content" in messages[-1]
        answer_start = ids.index(think_end, len(prompt)) + 1 if has_thinking else len(prompt)
        examples.append(Example(torch.tensor(ids), len(prompt), answer_start, location))
    return examples


def token_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """As tokenizer(texts, add_special_tokens=False) gives them, without the offsets that it also computes."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def render_prompt(messages: list[dict], tokenizer) -> str:
    """What inference sends to get the last message as its reply."""
    return generation_prompt(messages[:-1], tokenizer, thinking="reasoning_content" in messages[-1])


def shorten_thinking(
    location: str, messages: list[dict], example: Example, tokenizer, max_length: int
) -> Example | None:
    """The turn with its thinking cut from the end until it fits; None if prompt and answer alone do not.

    The cut text is rendered and tokenised again, so what is trained stays what the template renders.
    """
    thinking = example.input_ids[example.prompt_length : max(example.prompt_length, example.answer_start - 1)].tolist()
    if thinking[:1] == [tokenizer.convert_tokens_to_ids("<think>")]:
        thinking = thinking[1:]
    keep = len(thinking)
    while len(example) > max_length:
        keep -= len(example) - max_length
        # The cut may fall inside a character, whose bytes then decode to U+FFFD.
        text = tokenizer.decode(thinking[: max(keep, 0)]).rstrip("\ufffd").strip()
        if not text:
            return None
        shorter = [*messages[:-1], {**messages[-1], "reasoning_content": text}]
        example = encode_turns([(location, shorter)], tokenizer)[0]
    return example
