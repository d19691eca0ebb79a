"""Replies that a model wrote before it was trained, token for token: what it forgets is measured on them."""

import json
from pathlib import Path

import torch

from data.base.errors import UserError
from data.encode import Example, token_ids
from data.template import generation_prompt


def reply_row(dialogue: list[dict], prompt: list[int], reply: list[int], tokenizer) -> dict:
    """A line of such a file. prompt, reply: token ids; the texts are there to be read, and to tell the tokenizer."""
    said = {"role": "assistant", "content": tokenizer.decode(reply)}
    return {"messages": [*dialogue, said], "input_ids": [*prompt, *reply], "prompt_length": len(prompt)}


def read_replies(paths: tuple[str, ...], tokenizer) -> list[Example]:
    """One Example for each reply, with one part, `reply`. Raises UserError if a file has something else, or was written
    with another tokenizer."""
    rows, seen, names = [], set(), [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise UserError("--forget has two files of one name, which would be one figure")
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8").strip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --forget {path}: {error}") from None
        for number, line in enumerate(lines, start=1):
            place = f"{path.stem}:{number}"
            try:
                row = json.loads(line)
                ids, length, text = row["input_ids"], row["prompt_length"], row["messages"][-1]["content"]
                dialogue = row["messages"][:-1]
                is_whole = type(length) is int and 0 < length < len(ids)
                is_whole = is_whole and all(type(one) is int and 0 <= one < 2**31 for one in ids)
                prompt = generation_prompt(dialogue, tokenizer) if is_whole else ""
            except Exception:  # what a template says of messages that are none
                is_whole = False
            if not is_whole:
                raise UserError(f"--forget {path}, line {number}: not a reply that tools.replay --sample wrote")
            if token_ids([prompt], tokenizer)[0] != ids[:length] or tokenizer.decode(ids[length:]) != text:
                raise UserError(
                    f"--forget {path}, line {number}: its tokens are another text here, so it was written by a model "
                    "with another tokenizer; make it with tools.replay --sample and this model"
                )
            if tuple(ids) in seen:  # it would count twice, as if it were another
                continue
            seen.add(tuple(ids))
            part = ("reply", 0, len(ids) - length)
            rows.append(Example(torch.tensor(ids), length, length, place, own_parts=(part,)))
    return rows
