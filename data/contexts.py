"""Rows in other contexts than their own: after another question or thinking, or without it; questions of an exam."""

from dataclasses import replace

import torch

from data.encode import Example, encode_turns, render_prompt, shorten_thinking, token_ids, turns_of
from data.reading.choices import LETTERS, Question
from data.reading.rows import Row
from data.template import generation_prompt


def change_thinking(rows: list[Row], examples: list[Example], tokenizer, max_length: int) -> dict[str, list[Example]]:
    """The examples that think: as they are (own), without their thinking (none), and with that of the next row
    (other). The part with the name of each is the answer without the blank line before it, which after no thinking is
    in the prompt. Empty if fewer than two rows think."""
    blank = len(token_ids(["\n\n"], tokenizer)[0])
    own = {(row.location, row.prompt_length): row for row in examples if row.num_think_targets}
    turns = thinking_turns(rows, own.keys(), tokenizer)
    none, other = [], []
    for index, (location, messages) in enumerate(turns):
        *before, reply = messages
        none.append((location, [*before, {"role": "assistant", "content": reply["content"]}]))
        others = (said[-1]["reasoning_content"] for place, said in turns[index + 1 :] + turns if place != location)
        thought = next((thought for thought in others if thought != reply["reasoning_content"]), None)
        if thought is None:  # one dialogue alone
            return {}
        other.append((location, [*before, {**reply, "reasoning_content": thought}]))
    if not turns:
        return {}
    found = {"own": own.values(), "none": encode_turns(none, tokenizer), "other": fitting(other, tokenizer, max_length)}
    return {name: [answer_alone(row, name, blank) for row in rows] for name, rows in found.items()}


def thinking_turns(rows: list[Row], kept, tokenizer) -> list[tuple[str, list[dict]]]:
    """(location, messages up to it) of the turns that think; one that was dropped is not in `kept`."""
    turns = [turn for turn in turns_of(rows) if "reasoning_content" in turn[1][-1]]
    prompts = token_ids([render_prompt(messages, tokenizer) for _, messages in turns], tokenizer)
    return [turn for turn, prompt in zip(turns, prompts, strict=True) if (turn[0], len(prompt)) in kept]


def fitting(turns: list[tuple[str, list[dict]]], tokenizer, max_length: int) -> list[Example]:
    """With their thinking shortened, as in training. One that is too long without it stays as it is."""
    return [
        row if len(row) <= max_length or not row.num_think_targets
        else shorten_thinking(*turn, row, tokenizer, max_length) or row
        for turn, row in zip(turns, encode_turns(turns, tokenizer), strict=True)
    ]  # fmt: skip


def answer_alone(row: Example, part: str, blank: int) -> Example:
    """The same tokens with one part, the answer. After a thinking it begins with a blank line, which is left out."""
    begin = row.answer_start + (blank if row.num_think_targets else 0)
    if part != "own":  # which is computed with the row as it is
        row = replace(row, prompt_length=begin, answer_start=begin)
    return replace(row, own_parts=((part, begin - row.prompt_length, len(row) - row.prompt_length),))


def in_context(
    rows: list[Row], tokenizer, max_length: int, questions: list[str] | None = None, thinking: bool = True
) -> list[Example]:
    """The last turn of each row, after its own question or another one, with its thinking or without. The location of
    each is the number of its row."""
    turns = []
    for number, row in enumerate(rows):
        *before, asked, reply = row.messages
        if questions:
            before, asked = before[: len(before) % 2], {**asked, "content": questions[number]}
        if not thinking:
            reply = {name: value for name, value in reply.items() if name != "reasoning_content"}
        turns.append((str(number), [*before, asked, reply]))
    return fitting(turns, tokenizer, max_length)


def exam_prompts(questions: list[Question], tokenizer, system_prompt: str, thinking: bool = False) -> list[str]:
    """As the chat template renders them; without thinking they end with a closed block."""
    opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
    dialogues = [[*opening, {"role": "user", "content": question.asked}] for question in questions]
    return [generation_prompt(dialogue, tokenizer, thinking) for dialogue in dialogues]


def exam_rows(prompts: list[str], tokenizer, tokens: tuple[str, ...] = tuple(LETTERS)) -> list[Example]:
    """Rows whose parts are the tokens, each asked for as the next one (by its first token, if it is more);
    each location is the number of its prompt."""
    next_tokens = tuple(ids[0] for ids in token_ids(list(tokens), tokenizer))
    parts = tuple((token, number, number + 1) for number, token in enumerate(tokens))
    return [
        Example(torch.tensor(ids), len(ids), len(ids), str(number), next_tokens, parts)
        for number, ids in enumerate(token_ids(prompts, tokenizer))
    ]
