"""Rows that compare replies -> Examples, and which of them belong together: the units of a step."""

import dataclasses
from collections.abc import Sequence

from data.encoded import Encoded, encode_all
from data.reading.rows import Row

Unit = list[tuple[Row, int]]  # rows with the label of their last reply, see data.encode.Example


def encode_compared(
    rows: Sequence[Row], tokenizer, max_length: int, overlong: str, kind: str, answers_alone: bool
) -> tuple[Encoded, list[dict]]:
    """(Examples, problems); see `encode_rows`. Their labels and units are those of `units_of`; a unit of which a reply
    does not fit into max_length is left out. answers_alone: the targets are those of the answers."""
    from datasets import concatenate_datasets

    units, problems = units_of(rows, kind, answers_alone), []
    if answers_alone and kind == "pairs":
        same = [unit for unit in units if unit[0][0].messages == unit[1][0].messages]
        units = [unit for unit in units if unit not in same]
        problems = [{"location": unit[0][0].location, "problem": "its answers are the same", "action": "dropped"}
                    for unit in same]  # fmt: skip
    flat = [[row for unit in units for row, label in unit if bool(label) is is_own] for is_own in (True, False)]
    own, own_problems = encode_all(flat[0], tokenizer, max_length, overlong)
    problems += own_problems
    measured, _ = encode_all(flat[1], tokenizer, max_length, "truncate")
    dataset = concatenate_datasets([own.dataset, measured.dataset])
    found = {one.location: index for index, one in enumerate([*own, *measured])}
    indices, labels, places = [], [], []
    for unit in units:
        kept = [(found[row.location], label) for row, label in unit if row.location in found]
        if all(row.location in found for row, label in unit if label):
            places.append(tuple(range(len(indices), len(indices) + len(kept))))
            indices += [index for index, _ in kept]
            labels += [label for _, label in kept]
        elif any(label for _, label in kept):
            problems.append({"location": unit[0][0].location, "problem": "half of its pair is too long",
                             "action": "dropped"})  # fmt: skip
    dataset = dataset.with_format(None).select(indices)
    if answers_alone:
        starts = dataset["answer_start"][:]
        dataset = dataset.remove_columns("prompt_length").add_column("prompt_length", starts)
    return Encoded(dataset, labels, places), problems


def units_of(rows: Sequence[Row], kind: str, answers_alone: bool = False) -> list[Unit]:
    """pairs: the good and the bad reply to a prompt; if the answers alone are compared, both after the thinking of the
    good one. thumbs: each reply, and beside it that of another prompt put after its own (label 0), on which KTO
    measures the divergence from the model before training. That one is the same in each epoch, so its loss before
    training is computed once, and it is never a reply to its prompt. There is none if all prompts are one."""
    if kind == "pairs":
        units = []
        for row in rows:
            (good, _), (bad, _) = row.replies
            bad = {**good, "content": bad["content"]} if answers_alone else bad
            units.append([(with_reply(row, good, "chosen"), 1), (with_reply(row, bad, "rejected"), -1)])
        return units
    replies = [(row, number, *reply) for row in rows for number, reply in enumerate(row.replies, start=1)]
    prompts = [row.questions[-1] for row, *_ in replies]
    units, is_one = [], len(set(prompts)) == 1
    for place, (row, number, reply, is_good) in enumerate(replies):
        units.append([(with_reply(row, reply, f"reply {number}"), 1 if is_good else -1)])
        for n in () if is_one else range(place + 1, place + len(replies)):
            if prompts[n % len(replies)] != prompts[place]:
                other = replies[n % len(replies)][2]
                units[-1].append((with_reply(row, other, f"reply {number}, mismatched"), 0))
                break
    return units


def with_reply(row: Row, reply: dict, name: str) -> Row:
    return dataclasses.replace(row, location=f"{row.location} {name}", messages=[*row.messages[:-1], reply])
