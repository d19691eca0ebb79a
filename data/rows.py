"""Rows: check each one, split them, count what was left out."""

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from data.errors import UserError
from data.source import find_source, read_source

MAX_UNUSABLE = 0.1

# Text that a chat template or a tokenizer would take for structure.
MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|tool_call|tool_response)>")
INLINE_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row: its file and line, its columns as read, and the dialogue they mean.

    messages alternate user and assistant after an optional system message; an assistant message
    has `content` and, if it thinks, `reasoning_content`, both without surrounding whitespace.
    """

    location: str  # file and line
    columns: dict
    messages: list[dict]

    @property
    def question(self) -> str:
        """The user's side, by which two rows count as the same question: whitespace ignored."""
        text = "\n".join(message["content"] for message in self.messages if message["role"] == "user")
        return "".join(text.split())


@dataclasses.dataclass
class Split:
    train: list[Row]
    val: list[Row]
    report: dict

    def texts(self) -> Iterator[str]:
        """Of every training row, from which a tokenizer can be made."""
        for row in self.train:
            for message in row.messages:
                yield message["content"] + message.get("reasoning_content", "")


def to_messages(columns: dict, system_prompt: str) -> list[dict]:
    """The dialogue of a row. Raises ValueError with the reason if the row is unusable."""
    if not isinstance(columns, dict):
        raise ValueError(f"is not an object but {type(columns).__name__}" if not isinstance(columns, str) else columns)
    if columns.get("messages") is not None:
        given = columns["messages"]
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given) or not given:
            raise ValueError("`messages` is not a list of messages")
    else:
        for field in ("question", "think", "answer"):
            if field not in columns:
                raise ValueError(f"has no `{field}`")
        given = [
            {"role": "user", "content": columns["question"], "field": "question"},
            # A row whose think is empty is a row without thinking: it trains the answer alone.
            {
                "role": "assistant",
                "content": columns["answer"],
                "reasoning_content": columns["think"],
                "field": "answer",
            },
        ]
    if given[0].get("role") != "system" and system_prompt:
        given = [{"role": "system", "content": system_prompt}, *given]
    roles = [message.get("role") for message in given]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles must be user, assistant in turn (after an optional system), not {turns}")
    return [clean_message(message) for message in given]


def clean_message(message: dict) -> dict:
    field = message.get("field", f"{message['role']} content")
    content, think = message.get("content"), message.get("reasoning_content")
    if not isinstance(content, str):
        raise ValueError(f"`{field}` is not text but {type(content).__name__}")
    if message["role"] == "assistant" and think is None and (inline := INLINE_THINK.fullmatch(content)):
        think, content = inline.groups()
    think = "" if think is None else think
    if not isinstance(think, str):
        raise ValueError(f"the thinking is not text but {type(think).__name__}")
    clean = {"role": message["role"], "content": content.strip()}
    if message["role"] == "assistant" and think.strip():
        clean["reasoning_content"] = think.strip()
    if not clean["content"]:
        raise ValueError(f"`{field}` is empty")
    for text in (clean["content"], clean.get("reasoning_content", "")):
        if marker := MARKER.search(text):
            raise ValueError(f"has the chat marker {marker.group()} inside its text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone surrogate)") from None
    return clean


def load_split(dataset: str, system_prompt: str, val_fraction: float, seed: int) -> Split:
    """The dataset's usable rows, split as the original experiment split them, and the report.

    All rows as read are shuffled by `random.seed(seed)` and cut at int(n * (1 - val_fraction)); only
    then are rows left out, so a bad row never moves another one to the other side.
    """
    path = find_source(dataset)
    read = list(read_source(path))
    random.Random(seed).shuffle(read)
    cut = int(len(read) * (1 - val_fraction))

    problems, unusable = [], Counter()
    parts: tuple[list[Row], list[Row]] = ([], [])
    for index, (location, columns) in enumerate(read):
        try:
            messages = to_messages(columns, system_prompt)
        except ValueError as reason:
            problems.append({"location": location, "problem": str(reason), "action": "skipped"})
            unusable[str(reason)] += 1
            continue
        parts[index >= cut].append(Row(location, columns, messages))

    # The held-out side keeps a shared question: the evaluation stays what the split says it is.
    val = without_repeats(parts[1], problems)
    held_out = {row.question: row.location for row in val}
    train = []
    for row in without_repeats(parts[0], problems):
        if row.question in held_out:
            problem = f"its question is also a validation question ({held_out[row.question]})"
            problems.append({"location": row.location, "problem": problem, "action": "removed from train"})
        else:
            train.append(row)

    report = {
        "dataset": dataset,
        "file": path.name,
        "rows": len(read),
        "unusable": sum(unusable.values()),
        "without_thinking": sum(
            "reasoning_content" not in message
            for row in train + val
            for message in row.messages
            if message["role"] == "assistant"
        ),
        "duplicates": sum(problem["action"] == "duplicate, removed" for problem in problems),
        "train_val_overlap": sum(problem["action"] == "removed from train" for problem in problems),
        "train_rows": len(train),
        "val_rows": len(val),
        "problems": problems,
    }
    if sum(unusable.values()) > MAX_UNUSABLE * len(read):
        examples = "; ".join(f"{p['location']} {p['problem']}" for p in problems if p["action"] == "skipped")
        raise UserError(
            f"{path}: {sum(unusable.values())} of {len(read)} rows are unusable (at most "
            f"{MAX_UNUSABLE:.0%} may be): {examples[:600]}"
        )
    for name, rows in (("train", train), ("evaluate", val)):
        if not rows:
            raise UserError(f"{path}: nothing left to {name} on: {len(read)} rows read, val_fraction {val_fraction}")
    return Split(train, val, report)


def without_repeats(rows: list[Row], problems: list[dict]) -> list[Row]:
    seen: dict[str, str] = {}
    kept = []
    for row in rows:
        key = json.dumps(row.messages, sort_keys=True)
        if key in seen:
            problem = f"is the same as {seen[key]}"
            problems.append({"location": row.location, "problem": problem, "action": "duplicate, removed"})
        else:
            seen[key] = row.location
            kept.append(row)
    return kept


def split_files(split: Split) -> dict[str, str]:
    """Name -> text: train.jsonl and val.jsonl (columns as read), *_format.jsonl, data_report.json."""
    files = {"data_report.json": json.dumps(split.report, ensure_ascii=False, indent=2) + "\n"}
    for name, rows in (("train", split.train), ("val", split.val)):
        files[f"{name}.jsonl"] = to_jsonl(row.columns for row in rows)
        files[f"{name}_format.jsonl"] = to_jsonl(line for row in rows for line in to_format(row))
    return files


def to_jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def to_format(row: Row) -> list[dict]:
    """instruction / input / output for each assistant turn; earlier turns of a dialogue as `history`."""
    system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
    turns = row.messages[1:] if system else row.messages
    lines, history = [], []
    for user, reply in zip(turns[::2], turns[1::2], strict=True):
        output = f"<think>\n{reply.get('reasoning_content', '')}\n</think>\n\n{reply['content']}"
        line = {"instruction": system, "input": user["content"], "output": output}
        lines.append({**line, "history": list(history)} if history else line)
        history.append([user["content"], reply["content"]])
    return lines
