"""Replies that are good or bad, in the forms that people keep.

Pairs: prompt, chosen, rejected (TRL), also as whole dialogues without a prompt; conversations, chosen, rejected
(LLaMA-Factory); messages, rejected_response (ms-swift); input, preferred_output, non_preferred_output (OpenAI).
Single replies with a label: prompt, completion, label (TRL's KTO); messages or instruction and output, with label or
kto_tag. And prompt, replies: what data/reading/feedback.py makes of feedback and votes.
"""

import re
from contextlib import suppress

from data.reading.formats import COLUMNS, Columns, Dialogue, Given, as_columns, is_dialogue, read_row
from data.reading.messages import ROLES
from data.reading.texts import from_text, is_blank, normal

KINDS = ("pairs", "thumbs")  # what a step file can compare: two replies to one prompt, or replies each with a thumb
GOOD = {
    "true", "1", "1.0", "good", "like", "yes", "desirable", "thumbs_up", "👍", "好", "好评", "赞", "点赞", "是", "满意",
}  # fmt: skip
BAD = {
    "false", "0", "0.0", "-1", "bad", "dislike", "no", "undesirable", "thumbs_down", "👎", "坏", "差", "差评", "踩",
    "点踩", "否", "不满意",
}  # fmt: skip
SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # in texts as those of HH-RLHF

Rated = list[tuple[dict, bool]]  # assistant messages, each with whether it is good


def read_rated(columns, kind: str, system_prompt: str = "", given: Given = ()) -> tuple[Dialogue, Rated]:
    """(prompt and first reply, all replies to it) of a row; of a pair the good one is the first. kind: one of KINDS.

    Thinking is part of a reply. Raises ValueError with the reason if the row compares nothing; Ambiguous if --columns
    must decide.
    """
    columns = as_columns(columns)
    if not isinstance(columns, dict):
        return read_row(columns), []  # which says what it is
    columns = with_messages(columns)
    row = Columns(columns, given)
    chosen, rejected, label = (row.take(name) for name in ("chosen", "rejected", "label"))
    rest = {name: value for name, value in columns.items() if row.used.get(name) not in ("chosen", "rejected")}
    replies = columns.get("replies")
    if isinstance(replies, list) and replies and all(isinstance(reply, dict) for reply in replies):
        sides = [(side_of(columns, reply), truth(reply.get("label"))) for reply in replies]
    elif chosen is not None and rejected is not None:
        answers = {name for role in ("answer", "think") for names in row.candidates[role] for name in names}
        rest = {name: value for name, value in rest.items() if name not in answers}
        sides = [(side_of(rest, chosen), True), (side_of(rest, rejected), False)]
    elif rejected is not None:  # the good reply is that of the dialogue
        sides = [(rest, True), (side_of(rest, rejected), False)]
    elif chosen is not None:
        raise row.missing("rejected")
    elif label is not None:
        sides = [({name: value for name, value in rest.items() if row.used.get(name) != "label"}, truth(label))]
    else:
        raise ValueError(
            "compares no replies: it has neither chosen and rejected nor a label (--columns can name them)"
        )
    return put_together(row, sides, kind, system_prompt, given)


def put_together(row: Columns, sides: list[tuple[dict, bool]], kind: str, system_prompt: str, given: Given):
    """What `read_rated` returns. sides: the columns of a row for each reply, and whether it is good."""
    read = []
    for columns, is_good in sides:
        try:
            read.append((read_row(columns, system_prompt, given), is_good))
        except ValueError as reason:
            name = "the reply" if len(sides) == 1 else "chosen" if is_good else "rejected"
            raise type(reason)(f"{name}: {reason}") from None
    first, _ = read[0]
    prompt = [{**m, "loss": False} if m["role"] == "assistant" else m for m in first.messages[:-1]]
    texts = [[(m["role"], m["content"]) for m in dialogue.messages[:-1]] for dialogue, _ in read]
    asked = [row.all[name] for names in row.candidates["question"] for name in names]
    asked = [text.strip() for text in asked if isinstance(text, str) and not is_dialogue(text)]
    is_asked = all(any(text in content for _, content in texts[0]) for text in asked)
    if not is_asked or any(text != texts[0] for text in texts):
        raise ValueError("chosen and rejected answer different prompts")
    replies = [({k: v for k, v in d.messages[-1].items() if k != "loss"}, is_good) for d, is_good in read]
    if len(replies) > 1 and replies[0][0] == replies[1][0]:
        raise ValueError("its two replies are the same")
    if kind == "pairs":
        replies.sort(key=lambda one: not one[1])
        if [is_good for _, is_good in replies] != [True, False]:
            raise ValueError("is no pair of a good and a bad reply; recipes/kto.py takes single replies")
    used = row.used | {name: role for name, role in first.used.items() if name in row.filled and name not in row.used}
    unused = [name for name in row.filled if name not in used and name not in ("prompt", "replies")]
    notes = [note for dialogue, _ in read for note in dialogue.notes]
    return Dialogue([*prompt, replies[0][0]], used, unused, notes), replies


def with_messages(columns: dict) -> dict:
    """With messages in the place of OpenAI's `input`, of texts that name their speakers, and of a list of contexts."""
    found = {}
    for name, value in columns.items():
        if name == "input" and isinstance(value, dict):
            found |= value
        elif isinstance(value, str) and SPEAKER.match(value):
            _, *parts = SPEAKER.split(value)
            said = [{"role": role, "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]
            found[name] = said if not is_blank(said[-1]["content"]) else said[:-1]
        elif normal(name) == "context" and isinstance(value, list):
            found["messages"] = value
        else:
            found[name] = value
    return found


def role_of(message: dict) -> str | None:
    return ROLES.get(str(message.get("role", message.get("from"))).strip().lower())


def side_of(rest: dict, reply) -> dict:
    """The columns of a row whose reply is this one. rest: those of the prompt."""
    said = as_messages(reply)
    if not said or role_of(said[-1]) == "user":
        raise ValueError("does not end with a reply")
    if role_of(said[0]) != "assistant":  # a whole dialogue
        return {**{n: v for n, v in rest.items() if normal(n) in set().union(*COLUMNS["system"])}, "messages": said}
    rest = {name: value for name, value in rest.items() if name != "replies"}
    dialogue = next((name for name in rest if normal(name) in set().union(*COLUMNS["dialogue"])), None)
    if dialogue is None or is_blank(rest[dialogue]):
        return {**rest, "answer": said}
    before = from_text(rest[dialogue], dialogue) if isinstance(rest[dialogue], str) else rest[dialogue]
    if not isinstance(before, list):
        raise ValueError(f"`{dialogue}` is not a list of messages but {type(before).__name__}")
    is_answered = before and isinstance(before[-1], dict) and role_of(before[-1]) == "assistant"
    return {**rest, dialogue: [*(before[:-1] if is_answered else before), *said]}


def as_messages(reply) -> list[dict]:
    """A reply, or a whole dialogue, as messages of any form."""
    if isinstance(reply, str) and reply.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            read = from_text(reply.strip(), "")
            parts = read if isinstance(read, list) else [read]
            if parts and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in parts):
                reply = read  # otherwise the answer is JSON itself
    if isinstance(reply, dict):
        reply = {name: value for name, value in reply.items() if name != "label"}
        reply = [reply if reply.keys() & {"role", "from"} else {"role": "assistant", **reply}]
    if isinstance(reply, list) and all(isinstance(message, dict) for message in reply):
        return reply
    return [{"role": "assistant", "content": reply}]


def truth(label) -> bool:
    text = str(label).strip().lower()
    if text not in GOOD | BAD:
        raise ValueError(f"its label is {label!r}; true and false, 1 and 0, good and bad are understood")
    return text in GOOD
