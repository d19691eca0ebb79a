"""What people say of a model's replies, one JSON object a line, and what of it is trained.

    {"id": ..., "time": ..., "model": ..., "model_sha256": ..., "settings": {...}, "messages": [...],
     "verdict": "like" | "dislike" | "edit" | "withdrawn",
     "correction": {"content": ..., "reasoning_content": ...}, "reason": ...}

messages end with the reply; a later line with the same id takes the place of an earlier one. A correction is trained in
the place of the reply, and of other answers to the same question; a liked reply with --train-liked, and nothing else.
Earlier replies of a dialogue are not trained.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from data.reading.texts import is_blank

VERDICTS = ("like", "dislike", "edit", "withdrawn")


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


def problem_of(row: dict) -> str | None:
    """Why a line of feedback cannot be understood, and must neither be trained nor counted."""
    messages, correction = row["messages"], row.get("correction")
    if row.get("verdict") not in VERDICTS:
        return f"has the verdict {row.get('verdict')!r}; known are {', '.join(VERDICTS)}"
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return "has no list of messages"
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
    *before, reply = line["messages"]
    reply = correction_of(line) or (reply if line["verdict"] == "like" and train_liked else None)
    if reply is None:
        return None
    return [{**message, "loss": False} if message.get("role") == "assistant" else message for message in before] + [
        reply
    ]


class Feedback(NamedTuple):
    """What became of the lines of feedback in a file."""

    trained: dict[str, str]  # location -> corrected or like, of the lines that can be trained on
    others: Counter  # kind -> lines that cannot
    replaced: int  # lines replaced by later ones

    def said(self, sides: dict[str, str]) -> list[str]:
        """sides: location -> train, test or val; rows that were left out are in none."""
        texts = []
        for kind, name in (("corrected", "corrected"), ("like", "liked")):
            places = Counter(sides.get(place, "left out") for place, is_kind in self.trained.items() if is_kind == kind)
            more = [f"{count} {PLACES[side]}" for side, count in places.items() if side != "train"]
            if places:
                texts.append(f"{places['train']} {name} answers trained" + (f" ({', '.join(more)})" if more else ""))
        texts += [text.format(self.others[kind]) for kind, text in OTHERS.items() if self.others[kind]]
        texts += [f"{self.replaced} lines replaced by later ones"] if self.replaced else []
        return [f"feedback: {', '.join(texts)}"] if texts else []


PLACES = {"val": "held out for validation", "test": "held out for the test", "left out": "left out, see below"}
OTHERS = {
    "like": "{} liked answers not trained (--train-liked trains them)",
    "dislike": "{} disliked answers without a correction not trained",
    "edit": "{} empty corrections not trained",
    "withdrawn": "{} withdrawn",
}


def take_feedback(read: list, train_liked: bool) -> tuple[list, Feedback]:
    """(rows with the dialogues that are trained in the place of lines of feedback, what became of the lines). A line
    that cannot be understood becomes its reason."""
    rows, said = [], Feedback({}, Counter(), 0)
    lines = newest(read)
    for location, row in lines:
        if is_feedback(row):
            kind = problem_of(row)
            row, kind = (kind, None) if kind else (row, "corrected" if correction_of(row) else row["verdict"])
            dialogue = trained_dialogue(row, train_liked) if kind else None
            if dialogue:
                said.trained[location] = kind
            elif kind:
                said.others[kind] += 1
                continue
            row = {"messages": dialogue} if dialogue else row
        rows.append((location, row))
    return rows, said._replace(replaced=len(read) - len(lines))
