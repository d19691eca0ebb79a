"""Rows of one --dataset: read, made a dialogue each, and a report of what each column became."""

import dataclasses
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data.errors import UserError
from data.feedback import take_feedback
from data.formats import COLUMNS, NAMES, Ambiguous, Given, candidates, normal, read_row
from data.leaks import question_key
from data.read import read_file
from data.source import Source, find_source

MAX_UNUSABLE = 0.1
MANY = 20_000  # rows from which on it takes a while


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row."""

    location: str  # file and line
    columns: dict  # as read
    messages: list[dict]  # of a data.formats.Dialogue
    dataset: str = ""  # the label of its --dataset
    rewrites: tuple[str, ...] = ()  # of a data.formats.Dialogue

    @property
    def asked(self) -> list[str]:
        """What the user says, turn by turn."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    @property
    def questions(self) -> list[str]:
        """After each turn the user's side so far; two rows are the same question if the last ones are equal."""
        return list(itertools.accumulate(map(question_key, self.asked), "{}\n{}".format))

    @property
    def reworded(self) -> list["Row"]:
        """A row for each of `rewrites`."""
        found = []
        for number, text in enumerate(self.rewrites, start=1):
            messages = [{**m, "content": text} if m["role"] == "user" else m for m in self.messages]
            found.append(dataclasses.replace(self, location=f"{self.location} rewrite {number}", messages=messages))
        return found


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


def read_set(text: str, config, given: Given, labels: Counter, problems: list[dict]) -> tuple[list[Row | None], dict]:
    """(rows in their shuffled order, None for an unusable one; what is to be said of the set)."""
    source = find_source(text)
    notes, read = list(source.notes), []
    labels[source.label] += 1
    label = source.label if labels[source.label] == 1 else f"{source.label}-{labels[source.label]}"
    names = file_names(source.files)
    names = [name if not labels[f"file {name}"] else f"{label}/{name}" for name in names]  # locations are of one row
    labels.update(f"file {name}" for name in names)
    for path, name in zip(source.files, names, strict=True):
        read += ((place, as_columns(row)) for place, row in read_file(path, name, source.part, notes))
    read, said = take_feedback(read, config.train_liked)
    notes += said
    random.Random(config.seed).shuffle(read)
    if source.amount:
        read = read[: amount_of(source, len(read), notes)]
    used, unused, found, reasons, rows = Counter(), Counter(), {}, {}, []
    for location, columns in show_progress(read, "reading"):
        if isinstance(columns, dict):
            found |= dict.fromkeys(columns)
        try:
            dialogue = read_row(columns, config.system_prompt, given)
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
        rows.append(Row(location, columns, dialogue.messages, label, dialogue.rewrites))
    unusable = sum(map(len, reasons.values()))
    if unusable > MAX_UNUSABLE * len(read):
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
    }
    order = [*COLUMNS, "group"]
    for (column, role), count in sorted(used.items(), key=lambda item: order.index(item[0][1])):
        about["columns"].setdefault(column, {})[role] = count
    return rows, about


def as_columns(row):
    """A row that is a list of messages, as the column that it would be."""
    is_dialogue = isinstance(row, list) and row and all(isinstance(item, dict) for item in row)
    return {"messages": row} if is_dialogue else row


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


def amount_of(source: Source, rows: int, notes: list[str]) -> int:
    """Rows that :500 or :10% takes."""
    if source.amount.endswith("%"):
        return max(1, round(rows * float(source.amount[:-1]) / 100))
    if int(source.amount) > rows:
        notes.append(f"{source.name} has {rows:,} rows, fewer than the {int(source.amount):,} asked for")
    return int(source.amount)


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
        found, said = candidates(tuple(columns), given), {column for _, column in given}
        free = [name for name, value in columns.items() if isinstance(value, str) and normal(name) not in NAMES | said]
        guesses = zip(("question", "answer"), (free[:1], free[-1:]), strict=True)
        given += tuple((role, *(guess or ["COLUMN"])) for role, guess in guesses if not any(found[role]))
        example = " ".join(f"'{role}={name}'" for role, name in given)
        known = {role: ", ".join(sorted(name for rank in ranks for name in rank)) for role, ranks in COLUMNS.items()}
        text += (
            f".\nThe columns are {', '.join(f'`{name}`' for name in columns)}. A row holds a dialogue "
            f"({known['dialogue']}), or a question ({known['question']}), an answer ({known['answer']}) and perhaps a "
            f"thinking ({known['think']}).\nSay which column is which, for example: --columns {example}"
        )
    return text
