"""What people say of a model's replies, one JSON object a line, and what of it is trained.

    {"id": ..., "time": ..., "model": ..., "model_sha256": ..., "settings": {...}, "messages": [...],
     "verdict": "like" | "dislike" | "edit" | "withdrawn",
     "correction": {"content": ..., "reasoning_content": ...}, "reason": ...}

messages end with the reply; a later line with the same id takes the place of an earlier one. A correction is trained in
the place of the reply, and of other answers to the same question; a liked reply with --train-liked, and nothing else.
Earlier replies of a dialogue are not trained. A vote has two replies, and messages that end with the question:

    {"id": ..., "messages": [...], "replies": [{"content": ..., "model": ...}, {...}],
     "verdict": "a" | "b" | "both_good" | "both_bad" | "withdrawn"}

A method that compares replies (PREFERENCE in its step file) takes the pairs or the thumbs that the lines hold.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from data.reading.texts import is_blank

VERDICTS = ("like", "dislike", "edit", "withdrawn")
VOTES = {"a": (True, False), "b": (False, True), "both_good": (True, True), "both_bad": (False, False)}


def append_feedback(path: Path, line: dict) -> None:
    """Adds a line that only its owner can read, and waits until the disk has it. Several processes may do so."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # A write that was cut off must not swallow this line.
            end = os.lseek(descriptor, 0, os.SEEK_END)
            text = b"" if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n" else b"\n"
            text += json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            while text:
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_feedback(row) -> bool:
    """Whether a line says something of a reply; `problem_of` tells whether it can be understood."""
    return isinstance(row, dict) and "messages" in row and ("verdict" in row or isinstance(row.get("correction"), dict))


def is_vote(row: dict) -> bool:
    return isinstance(row.get("replies"), list)


def problem_of(row: dict) -> str | None:
    """Why a line of feedback cannot be understood, and must neither be trained nor counted."""
    messages, correction = row["messages"], row.get("correction")
    known = (*VOTES, "withdrawn") if is_vote(row) else VERDICTS
    if row.get("verdict") not in known:
        return f"has the verdict {row.get('verdict')!r}; known are {', '.join(known)}"
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return "has no list of messages"
    if is_vote(row):
        replies = row["replies"]
        is_whole = len(replies) == 2 and all(isinstance(r, dict) and isinstance(r.get("content"), str) for r in replies)
        return None if is_whole and messages[-1].get("role") == "user" else "is no vote on two replies to a question"
    if messages[-1].get("role") != "assistant":
        return "its messages do not end with a reply"
    if not is_blank(correction) and not (isinstance(correction, dict) and isinstance(correction.get("content"), str)):
        return "its correction is not an object with a text `content`"
    return None


def newest(lines: list) -> list:
    """Of the lines with the same id the last one; rows of other kinds as they are. lines: (location, row)."""
    last = {key_of(location, row): location for location, row in lines}
    return [(location, row) for location, row in lines if last[key_of(location, row)] == location]


def key_of(location: str, row) -> tuple[str, str]:
    """The reply that a line is about; a line without an id, or of another kind, stands for itself."""
    name = row.get("id") if is_feedback(row) and problem_of(row) is None else None
    return ("reply", str(name)) if isinstance(name, (str, int)) and name != "" else ("line", location)


def correction_of(line: dict) -> dict | None:
    """The corrected reply as an assistant message; None without one, or if it is empty."""
    given = line.get("correction")
    texts = [given.get(name) for name in ("content", "reasoning_content")] if isinstance(given, dict) else [None, None]
    content, thinking = (text if isinstance(text, str) and not is_blank(text) else None for text in texts)
    if content is None:
        return None
    return {"role": "assistant", "content": content} | ({"reasoning_content": thinking} if thinking else {})


def trained_dialogue(line: dict, train_liked: bool) -> list[dict] | None:
    """The messages that a line teaches; None if it teaches nothing."""
    if is_vote(line):
        return None
    *before, reply = line["messages"]
    reply = correction_of(line) or (reply if line["verdict"] == "like" and train_liked else None)
    if reply is None:
        return None
    return [{**message, "loss": False} if message.get("role") == "assistant" else message for message in before] + [
        reply
    ]


def rated_replies(line: dict, kind: str) -> list[tuple[dict, bool]]:
    """The replies of a line, each with whether it is good. kind: pairs, of a good and a bad one, or thumbs.

    A correction without thinking is one of the answer: it is compared after the thinking of the reply.
    """
    if line["verdict"] == "withdrawn":
        return []
    if is_vote(line):
        replies = [{"role": "assistant"} | {k: r[k] for k in ("content", "reasoning_content") if r.get(k)}
                   for r in line["replies"]]  # fmt: skip
        rated = list(zip(replies, VOTES[line["verdict"]], strict=True))
        return rated if kind == "thumbs" or line["verdict"] in ("a", "b") else []
    reply, correction = line["messages"][-1], correction_of(line)
    if correction and reply.get("reasoning_content"):
        correction = {"reasoning_content": reply["reasoning_content"]} | correction
    if correction and all(correction.get(k, "") == reply.get(k, "") for k in ("content", "reasoning_content")):
        correction = None
    if kind == "pairs":
        return [(correction, True), (reply, False)] if correction else []
    thumb = {"like": True, "dislike": False, "edit": False if correction else None}[line["verdict"]]
    return [(correction, True)] * bool(correction) + [(reply, thumb)] * (thumb is not None)


class Feedback(NamedTuple):
    """What became of the lines of feedback in a file."""

    trained: dict[str, str]  # location -> what it teaches, one of TRAINED
    others: Counter  # kind -> lines that cannot
    replaced: int  # lines replaced by later ones

    def said(self, sides: dict[str, str]) -> list[str]:
        """sides: location -> train, test or val; rows that were left out are in none."""
        texts = []
        for kind, name in TRAINED.items():
            places = Counter(sides.get(place, "left out") for place, is_kind in self.trained.items() if is_kind == kind)
            more = [f"{count} {PLACES[side]}" for side, count in places.items() if side != "train"]
            if places:
                texts.append(f"{places['train']} {name} trained" + (f" ({', '.join(more)})" if more else ""))
        texts += [text.format(self.others[kind]) for kind, text in OTHERS.items() if self.others[kind]]
        texts += [f"{self.replaced} lines replaced by later ones"] if self.replaced else []
        return [f"feedback: {', '.join(texts)}"] if texts else []


PLACES = {"val": "held out for validation", "test": "held out for the test", "left out": "left out, see below"}
TRAINED = {"corrected": "corrected answers", "like": "liked answers", "pairs": "pairs", "thumbs": "lines with thumbs"}
OTHERS = {
    "like": "{} liked answers not trained (--train-liked trains them)",
    "dislike": "{} disliked answers without a correction not trained (recipes/kto.py learns from them)",
    "edit": "{} empty corrections not trained",
    "vote": "{} votes not trained (recipes/dpo.py learns from them)",
    "no pair": "{} without a better and a worse reply not trained (recipes/kto.py learns from thumbs)",
    "withdrawn": "{} withdrawn",
}


def what_is_trained(line: dict, train_liked: bool, preference: str) -> tuple[dict | None, str]:
    """(columns of a row, one of TRAINED); (None, one of OTHERS) if the line teaches nothing."""
    verdict = line["verdict"]
    if preference:
        replies = [reply | {"label": is_good} for reply, is_good in rated_replies(line, preference)]
        prompt = line["messages"] if is_vote(line) else line["messages"][:-1]
        nothing = verdict if verdict in ("edit", "withdrawn") else "no pair"
        return ({"prompt": prompt, "replies": replies}, preference) if replies else (None, nothing)
    dialogue = trained_dialogue(line, train_liked)
    kind = "corrected" if not is_vote(line) and correction_of(line) else verdict
    if dialogue is None and is_vote(line) and verdict != "withdrawn":
        kind = "vote"
    return ({"messages": dialogue} if dialogue else None), kind


def take_feedback(read: list, train_liked: bool, preference: str = "") -> tuple[list, Feedback]:
    """(rows with what is trained in the place of lines of feedback, what became of the lines): dialogues, or if the
    method compares replies prompts with their replies. A line that cannot be understood becomes its reason."""
    rows, said = [], Feedback({}, Counter(), 0)
    lines = newest(read)
    for location, row in lines:
        if is_feedback(row):
            if problem := problem_of(row):
                rows.append((location, problem))
                continue
            row, kind = what_is_trained(row, train_liked, preference)
            if row is None:
                said.others[kind] += 1
                continue
            said.trained[location] = kind
        rows.append((location, row))
    return rows, said._replace(replaced=len(read) - len(lines))
