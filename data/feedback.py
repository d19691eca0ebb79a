"""What people say of a model's replies, one JSON object a line, and what of it is trained.

    {"id": ..., "time": ..., "model": ..., "model_sha256": ..., "settings": {...}, "messages": [...],
     "verdict": "like" | "dislike" | "edit" | "withdrawn",
     "correction": {"content": ..., "reasoning_content": ...}, "reason": ...}

messages end with the reply; a later line with the same id takes the place of an earlier one. A correction is trained in
the place of the reply, a liked reply with --train-liked, and nothing else. Earlier replies of a dialogue are not
trained.
"""

import json
import os
from collections import Counter
from pathlib import Path

from filelock import FileLock

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
    if not isinstance(row, dict) or row.get("verdict") not in VERDICTS or not isinstance(row.get("messages"), list):
        return False
    return bool(row["messages"]) and all(isinstance(message, dict) for message in row["messages"])


def newest(lines: list) -> list:
    """Of the lines with the same id the last one; rows of other kinds as they are. lines: (location, row)."""
    last = {key_of(location, row): location for location, row in lines}
    return [(location, row) for location, row in lines if last[key_of(location, row)] == location]


def key_of(location: str, row) -> tuple[str, str]:
    """The reply that a line is about; a line without an id, or of another kind, stands for itself."""
    name = row.get("id") if is_feedback(row) else None
    return ("reply", name) if isinstance(name, str) and name else ("line", location)


def correction_of(line: dict) -> dict | None:
    """The corrected reply as an assistant message; None without one, or if it is empty."""
    given = line.get("correction") or {}
    texts = [given.get(name) for name in ("content", "reasoning_content")] if isinstance(given, dict) else []
    content, thinking = (text if isinstance(text, str) and text.strip() else None for text in (*texts, None, None)[:2])
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


def take_feedback(read: list, train_liked: bool) -> tuple[list, list[str]]:
    """(rows with the dialogues that are trained in the place of lines of feedback, notes on the lines)."""
    if not any(is_feedback(row) for _, row in read):
        return read, []
    rows, counts = [], Counter()
    for location, row in newest(read):
        if not is_feedback(row):
            rows.append((location, row))
            continue
        dialogue = trained_dialogue(row, train_liked)
        kind = "corrected" if correction_of(row) else row["verdict"]
        counts[kind] += 1
        if dialogue:
            rows.append((location, {"messages": dialogue}))
    liked = "trained" if train_liked else "not trained (--train-liked trains them)"
    texts = {
        "corrected": "{} corrected answers trained",
        "like": f"{{}} liked answers {liked}",
        "dislike": "{} disliked answers without a correction not trained",
        "edit": "{} empty corrections not trained",
        "withdrawn": "{} withdrawn",
    }
    said = [text.format(counts[kind]) for kind, text in texts.items() if counts[kind]]
    untrained = counts["dislike"] + counts["edit"] + counts["withdrawn"] + (0 if train_liked else counts["like"])
    replaced = len(read) - len(rows) - untrained
    if replaced:
        said.append(f"{replaced} lines replaced by later ones")
    return rows, [f"feedback: {', '.join(said)}"]
