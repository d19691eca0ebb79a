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

    units, problems = [], []
    for unit in units_of(rows, kind, answers_alone):
        if kind == "pairs" and unit[0][0].messages == unit[1][0].messages:  # they differed in the thinking alone
            problem = "its answers are the same"
            problems.append({"location": unit[0][0].location, "problem": problem, "action": "dropped"})
        else:
            units.append(unit)
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
    training is computed once; it is never one that its own prompt got. There is none if all prompts, or all replies,
    are the same."""
    if kind == "pairs":
        units = []
        for row in rows:
            (good, _), (bad, _) = row.replies
            bad = {**good, "content": bad["content"]} if answers_alone else bad
            units.append([(with_reply(row, good, "chosen"), 1), (with_reply(row, bad, "rejected"), -1)])
        return units
    replies = [(row, number, *reply) for row in rows for number, reply in enumerate(row.replies, start=1)]
    prompts = [row.questions[-1] for row, *_ in replies]
    texts = [(reply["content"], reply.get("reasoning_content")) for _, _, reply, _ in replies]
    units, is_one = [], 1 in (len(set(prompts)), len(set(texts)))
    for place, (row, number, reply, is_good) in enumerate(replies):
        units.append([(with_reply(row, reply, f"reply {number}"), 1 if is_good else -1)])
        for other in () if is_one else (*range(place + 1, len(replies)), *range(place)):
            if prompts[other] != prompts[place] and texts[other] != texts[place]:
                units[-1].append((with_reply(row, replies[other][2], f"reply {number}, mismatched"), 0))
                break
    return units


def with_reply(row: Row, reply: dict, name: str) -> Row:
    return dataclasses.replace(row, location=f"{row.location} {name}", messages=[*row.messages[:-1], reply])
