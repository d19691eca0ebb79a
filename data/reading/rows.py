"""Rows of one --dataset: read, made a dialogue each, and a report of what each column became."""

import dataclasses
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data.base.errors import UserError
from data.leaks import question_key
from data.reading.feedback import FEEDBACK_ID, take_feedback
from data.reading.formats import COLUMNS, NAMES, Ambiguous, Dialogue, Given, as_columns, candidates, read_row
from data.reading.preference import Rated, read_rated
from data.reading.read import read_file
from data.reading.source import find_source
from data.reading.texts import normal

MAX_UNUSABLE = 0.1
NO_TEXT = re.compile(
    r"(?:^|_)(?:id|uid|uuid|guid|no|nr|index|idx|date|time|url)(?:_|$)|编号|序号|号码|病历号|流水号|日期|时间|链接"
)
MEDIA = re.compile(
    r"(?:image|img|picture|pic|photo|figure|video|audio|frame)s?(?:_?(?:path|file|filename|url|list|base64|bytes)s?)?"
    r"|pixel_values|(?:图片|图像|照片|视频|音频|语音|录音)(?:_?(?:路径|文件|链接|地址|url))?"
)
NOTHING = {"", "none", "null", "nan", "n/a", "[]", "{}", "无"}
MANY = 20_000  # rows from which on it takes a while


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row."""

    location: str  # file and line
    columns: dict  # as read
    messages: list[dict]  # of a data.reading.formats.Dialogue
    dataset: str = ""  # the label of its --dataset
    is_correction: bool = False  # of a model's reply, by a person
    replies: tuple[tuple[dict, bool], ...] = ()  # those that are compared, and whether each is good; the first is above

    @property
    def asked(self) -> list[str]:
        """What the user says, turn by turn."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    @property
    def questions(self) -> list[str]:
        """After each turn the user's side so far; two rows are the same question if the last ones are equal."""
        return list(itertools.accumulate(map(question_key, self.asked), "{}\n{}".format))


def read_given(columns: Iterable[str]) -> Given:
    """--columns think=Complex_CoT answer=Response -> pairs."""
    return tuple(tuple(part.strip() for part in text.split("=", 1)) for text in columns)


def check_columns(given: Given, sets: list[dict]) -> None:
    """Raises UserError if a column of --columns was in no row."""
    found = dict.fromkeys(name for about in sets for name in about["found"])
    for role, column in given:
        if normal(column) not in map(normal, found):
            listed = ", ".join(f"`{name}`" for name in found)
            raise UserError(f"--columns {role}={column}: no row has this column; there are {listed}")


def read_set(
    text: str, config, given: Given, labels: Counter, problems: list[dict], preference: str = ""
) -> tuple[list[Row | None], dict]:
    """(rows in their shuffled order, None for an unusable one; what is to be said of the set). preference: pairs or
    thumbs, if the method compares replies."""
    source = find_source(text)
    notes, read = list(source.notes), []
    labels[source.label] += 1
    label = source.label if labels[source.label] == 1 else f"{source.label}-{labels[source.label]}"
    names = file_names(source.files)
    names = [name if not labels[f"file {name}"] else f"{label}/{name}" for name in names]  # locations are of one row
    labels.update(f"file {name}" for name in names)
    for path, name in zip(source.files, names, strict=True):
        read += ((place, as_columns(row)) for place, row in read_file(path, name, source.part, notes))
    read, feedback = take_feedback(read, config.train_liked, preference)
    random.Random(config.split_seed).shuffle(read)
    read = read[: source.number_of(len(read))]
    if source.amount.isdigit() and int(source.amount) > len(read):
        notes.append(f"{source.name} has {len(read):,} rows, fewer than the {int(source.amount):,} asked for")
    used, unused, found, reasons, rows = Counter(), Counter(), {}, {}, []
    for location, columns in show_progress(read, "reading"):
        if isinstance(columns, dict):
            found |= dict.fromkeys(columns)
        try:
            dialogue, replies = read_any(columns, preference, config.system_prompt, given)
        except Ambiguous as reason:
            raise UserError(f"{location}: {reason}") from None
        except ValueError as reason:
            problems.append({"location": location, "problem": str(reason), "action": "skipped"})
            reasons.setdefault(str(reason), []).append(location)
            rows.append(None)
            continue
        used.update(dialogue.used.items())
        unused.update(dialogue.unused)
        problems += [{"location": location, "problem": what, "action": action} for what, action in dialogue.notes]
        is_correction = feedback.trained.get(location) == "corrected"
        rows.append(Row(location, columns, dialogue.messages, label, is_correction, tuple(replies)))
    unusable = sum(map(len, reasons.values()))
    if unusable > MAX_UNUSABLE * (len(read) + feedback.others.total()):
        raise UserError(f"{source.name}: {nothing_fits(reasons, unusable, read, given)}")
    if config.group_by in unused:
        used[config.group_by, "group"] = unused.pop(config.group_by)
    about = {
        "name": source.name,
        "label": label,
        "files": names,
        "rows": len(read),
        "unusable": unusable,
        "thinking": sum("reasoning_content" in row.messages[-1] for row in rows if row is not None),
        "columns": {},
        "not_used": dict(unused.most_common()),
        "notes": notes,
        "found": list(found),
        "feedback": feedback,
    }
    order = [*COLUMNS, "group"]
    for (column, role), count in sorted(used.items(), key=lambda item: order.index(item[0][1])):
        about["columns"].setdefault(column, {})[role] = count
    return rows, about


def read_any(columns, preference: str, system_prompt: str, given: Given) -> tuple[Dialogue, Rated]:
    if isinstance(columns, dict):  # what is said of a row, and is no part of it
        columns = {name: value for name, value in columns.items() if name not in (FEEDBACK_ID, "AIGC")}
        if name := media_of(columns, [normal(column) for _, column in given]):
            raise ValueError(f"comes with a picture, a video or sound (`{name}`); text alone can be trained on")
    if preference:
        return read_rated(columns, preference, system_prompt, given)
    return read_row(columns, system_prompt, given), []


def media_of(columns: dict, named: list[str]) -> str | None:
    """The column, or the key of a message, that holds what is no text. named: columns that the user has named."""
    for name, value in columns.items():
        if MEDIA.fullmatch(normal(str(name))) and normal(str(name)) not in named and holds_something(value):
            return name
        for part in value if isinstance(value, list) else ():
            if isinstance(part, dict) and (found := media_of(part, named)):
                return found
    return None


def holds_something(value) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(holds_something, value.values() if isinstance(value, dict) else value))
    return str(value).strip().casefold() not in NOTHING


def show_progress(items: list, what: str) -> tqdm:
    """The items, with a bar on the main process's terminal if there are many."""
    quiet = len(items) < MANY or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=what, unit="row", disable=True if quiet else None)


def file_names(paths: list[Path]) -> list[str]:
    """As short as tells them apart."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        folder = os.path.commonpath(paths)
        names = [path.relative_to(folder).as_posix() for path in paths]
    return names


def nothing_fits(reasons: dict[str, list[str]], unusable: int, read: list, given: Given) -> str:
    """What is wrong with most rows, each reason once, and the command that may put it right."""
    total = len(read)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    text = f"{unusable:,} of {total:,} rows are unusable (at most {MAX_UNUSABLE:.0%} may be): " + "; ".join(
        f"{locations[0]} {reason}" + (f" (and {len(locations) - 1:,} more)" if len(locations) > 1 else "")
        for reason, locations in most
    )
    columns = next((row for _, row in read if isinstance(row, dict)), None)
    if columns and 2 * sum(len(reasons.get(f"has no {role}", ())) for role in ("question", "answer")) > total:
        given += propose([row for _, row in read[:100] if isinstance(row, dict)], given)
        example = " ".join(f"'{role}={name}'" for role, name in given)
        known = {role: ", ".join(sorted(name for rank in ranks for name in rank)) for role, ranks in COLUMNS.items()}
        text += (
            f".\nThe columns are {', '.join(f'`{name}`' for name in columns)}. A row holds a dialogue "
            f"({known['dialogue']}), or a question ({known['question']}), an answer ({known['answer']}) and perhaps a "
            f"thinking ({known['think']}).\nSay which column is which, for example: --columns {example}"
        )
    return text


def propose(rows: list[dict], given: Given) -> Given:
    """(what it is, column) for what no column was found to be: by a known word inside of its name (患者问题), or else
    the first and the last column of texts; never a number, a date or an id."""
    longest = {name: max(len(str(row.get(name) or "")) for row in rows) for name in rows[0]}
    found, said = candidates(tuple(rows[0]), given), {column for _, column in given}
    free = [
        name
        for name in rows[0]
        if normal(name) not in NAMES | said
        and not NO_TEXT.search(normal(name))
        and any(isinstance(row.get(name), str) and re.search(r"[^\d\s.,:/_-]", row[name]) for row in rows)
    ]
    pairs = {}
    for role in ("question", "think", "answer"):
        words = [word for rank in COLUMNS[role] for word in rank if len(word) > 2 or not word.isascii()]
        named = [name for name in free if any(word in normal(name) for word in words) and name not in pairs.values()]
        if named and not any(found[role]):
            pairs[role] = named[0]
    texts = [name for name in free if name not in pairs.values()]
    long = [name for name in texts if longest[name] >= 4]  # a department is shorter
    texts = long if len(long) > 1 else texts
    for role, places in (("question", texts[:1]), ("answer", texts[-1:])):
        if role not in pairs and not any(found[role]):
            pairs[role] = (places or ["COLUMN"])[0]
            texts = [name for name in texts if name != pairs[role]]
    return tuple(pairs.items())
