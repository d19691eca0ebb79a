"""Split: the rows of a run as train, validation and test, what was left out, and the files that say so."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator

from data.base.errors import UserError
from data.leaks import Excluded
from data.reading.exam import Exam, read_exam
from data.reading.rows import Row, check_columns, read_given, read_set

MAX_GROUPS = 20  # values of --group-by with a loss of their own; the rest is one more
OTHERS = "..."


@dataclasses.dataclass
class Split:
    train: list[Row]
    val: list[Row]
    report: dict
    test: list[Row] = dataclasses.field(default_factory=list)
    labels: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # location -> set and group, of val
    exam: Exam | None = None
    held: list[Row] = dataclasses.field(default_factory=list)  # of the replies that are compared, those to evaluate on

    def texts(self) -> Iterator[str]:
        """Of every training row, with the names of roles, from which a tokenizer can be made."""
        for row in self.train:
            for message in [*row.messages, *(reply for reply, _ in row.replies[1:])]:
                yield f"{message['role']}\n{message['content']}{message.get('reasoning_content', '')}"


def load_split(config, preference: str = "") -> Split:
    """The usable rows of config.dataset, each set split as the original experiment split its own, and the report.

    All rows of a set as read are shuffled by `random.seed(split_seed)`, cut at int(n * (1 - val_fraction)); only then
    are rows left out, so a bad row never moves another one to the other side. Test rows are cut off in front of the
    validation rows. config: a loop.config.TrainConfig. Raises UserError.

    preference: pairs or thumbs, if the method compares replies. Then val_fraction of the dataset is `held`, and `val`
    are ordinary rows: of val_dataset, or else the good replies that are held.
    """
    given, problems, sets = read_given(config.columns), [], []
    labels = Counter()
    parts: dict[str, list[Row]] = {"train": [], "test": [], "val": [], "held": []}
    for text in config.dataset:
        rows, about = read_set(text, config, given, labels, problems, preference)
        held_out = 0 if config.val_dataset and not preference else config.val_fraction
        test = int(len(rows) * (1 - held_out - config.test_fraction)) if config.test_fraction else len(rows)
        val = int(len(rows) * (1 - held_out))
        cuts = {"train": rows[: min(test, val)], "test": rows[test:val], "held" if preference else "val": rows[val:]}
        for name, part in cuts.items():
            parts[name] += [row for row in part if row is not None]
        sets.append(about)
    for text in config.val_dataset:
        rows, about = read_set(text, config, given, labels, problems)
        parts["val"] += [row for row in rows if row is not None]
        sets.append(about)
    check_columns(given, sets)

    exam = read_exam(config.exam, given) if config.exam else None
    excluded = Excluded(config.exclude, given, exam.texts if exam else ())
    # A held-out side keeps a shared or an excluded question: the evaluation stays what the split says it is.
    held_out = HeldOut()
    test = held_out.without(without_repeats(parts["test"], problems), "test", problems)
    held_out.add(test, "test")
    test = good_replies(test) if preference else test
    held, val = (held_out.without(without_repeats(parts[name], problems), "val", problems) for name in ("held", "val"))
    if preference and not config.val_dataset:
        val = good_replies(held)
    held_out.add([*held, *val], "validation")
    train = held_out.without(without_repeats(parts["train"], problems), "train", problems, excluded)
    train = train if preference else without_corrected(train, problems)
    by_side = {"train": train, "val": held or val, "test": test}
    sides = {row.location: side for side, rows in by_side.items() for row in rows}
    for about in sets:
        about["notes"] += about.pop("feedback").said(sides)
    split = Split(train, val, make_report(config, sets, train, val, test, problems), test, exam=exam, held=held)
    split.labels = find_labels(val, config.group_by)
    split.report["groups"] = Counter(label for labels in split.labels.values() for label in labels)
    split.report["labels"] = split.labels
    for name, rows in (("train", train), ("evaluate", val), *([("compare", held)] * bool(preference))):
        if not rows:
            read = f"{split.report['rows']} rows read, val_fraction {config.val_fraction}"
            more = "; no held-out reply is good, so name rows with --val-dataset" if held and not rows else ""
            raise UserError(f"{split.report['dataset']}: nothing left to {name} on: {read}{more}")
    return split


def good_replies(rows: list[Row]) -> list[Row]:
    """Rows that compare replies, as rows that teach the good one; without those that have none."""
    found = []
    for row in rows:
        good = next((reply for reply, is_good in row.replies if is_good), None)
        if good is not None:
            messages = [*row.messages[:-1], good]
            others = row.columns.keys() - {"prompt", "chosen", "rejected", "replies"}
            columns = {name: row.columns[name] for name in others} | {"messages": messages}
            found.append(dataclasses.replace(row, columns=columns, messages=messages, replies=()))
    return found


def without_corrected(rows: list[Row], problems: list[dict]) -> list[Row]:
    """A correction takes the place of every other answer to its question."""
    corrected = {row.questions[-1]: row.location for row in rows if row.is_correction}
    kept = []
    for row in rows:
        if row.is_correction or row.questions[-1] not in corrected:
            kept.append(row)
        else:
            problem = f"its answer is corrected in {corrected[row.questions[-1]]}"
            problems.append({"location": row.location, "problem": problem, "action": "replaced"})
    return kept


def find_labels(val: list[Row], group_by: str) -> dict[str, tuple[str, ...]]:
    """location -> the labels that get an evaluation loss of their own: the set, if there are several, and the value
    of the column group_by. Raises UserError if no row has the column."""
    sets = {row.dataset for row in val}
    labels = {row.location: (row.dataset,) if len(sets) > 1 else () for row in val}
    if group_by:
        values = {row.location: group_value(row.columns.get(group_by)) for row in val}
        if not any(row.columns.get(group_by) is not None for row in val):
            found = ", ".join(f"`{name}`" for name in dict.fromkeys(name for row in val for name in row.columns))
            raise UserError(f"--group-by {group_by}: no validation row has this column; there are {found}")
        common = {value for value, _ in Counter(values.values()).most_common(MAX_GROUPS)}
        for location, value in values.items():
            labels[location] += (f"{group_by}/{value if value in common else OTHERS}",)
    return {location: found for location, found in labels.items() if found}


def group_value(value) -> str:
    """As part of a metric's name."""
    text = " ".join(str(part) for part in (value if isinstance(value, list) else [value]) if part is not None).strip()
    return text.replace("/", "|")[:40] or "-"


def without_repeats(rows: list[Row], problems: list[dict]) -> list[Row]:
    seen: dict[bytes, str] = {}
    kept = []
    for row in rows:
        said = json.dumps([row.messages, row.replies], sort_keys=True)
        key = hashlib.blake2b(said.encode(), digest_size=16).digest()
        if key in seen:
            problem = f"is the same as {seen[key]}"
            problems.append({"location": row.location, "problem": problem, "action": "duplicate, removed"})
        else:
            seen[key] = row.location
            kept.append(row)
    return kept


class HeldOut:
    """The questions of held-out rows, which no other side may have.

    Dialogues are the same question if one is the beginning of the other: its last answer would be trained, or its
    question asked.
    """

    def __init__(self):
        self.whole: dict[str, str] = {}  # question -> whose it is
        self.begun: dict[str, str] = {}

    def add(self, rows: list[Row], side: str) -> None:
        for row in rows:
            *_, whole = questions = row.questions
            self.whole[whole] = f"a {side} question ({row.location})"
            self.begun |= dict.fromkeys(questions, self.whole[whole])

    def without(self, rows: list[Row], side: str, problems: list[dict], excluded: Excluded | None = None) -> list[Row]:
        kept = []
        for row in rows:
            *_, whole = questions = row.questions
            shared = next((self.whole[question] for question in questions if question in self.whole), None)
            shared = (shared or self.begun.get(whole)) if whole.strip() else None
            if shared:
                problem, action = f"its question is also {shared}", f"removed from {side}"
            elif excluded and excluded.holds(row.messages):
                problem, action = "it is in a file of --exclude, or its question in one of --exam", "excluded"
            else:
                kept.append(row)
                continue
            problems.append({"location": row.location, "problem": problem, "action": action})
        return kept


def make_report(
    config, sets: list[dict], train: list[Row], val: list[Row], test: list[Row], problems: list[dict]
) -> dict:
    actions = Counter(problem["action"] for problem in problems)
    replies = [m for row in train + val for m in row.messages if m["role"] == "assistant" and m.get("loss", True)]
    return {
        "dataset": " ".join(config.dataset),
        "file": ", ".join(name for about in sets for name in about["files"]),
        "rows": sum(about["rows"] for about in sets),
        "unusable": sum(about["unusable"] for about in sets),
        "without_thinking": sum("reasoning_content" not in reply for reply in replies),
        "replies": len(replies),
        "duplicates": actions["duplicate, removed"],
        "train_val_overlap": actions["removed from train"],
        "excluded": actions["excluded"],
        "train_rows": len(train),
        "val_rows": len(val),
        "test_rows": len(test),
        "datasets": sets,
        "problems": problems,
    }


def split_files(split: Split) -> dict[str, Iterable[str]]:
    """Name -> lines: train.jsonl, val.jsonl (columns as read), *_format.jsonl, data_report.json; test.jsonl if there is
    a test split; exam.jsonl, the subject and number of choices of each question, if there is an exam."""
    files = {"data_report.json": [json.dumps(split.report, ensure_ascii=False, indent=2) + "\n"]}
    for name, rows in (("train", split.train), ("val", split.val), ("test", split.test), ("held", split.held)):
        if rows or name in ("train", "val"):
            files[f"{name}.jsonl"] = to_jsonl(row.columns for row in rows)
        if (rows or name in ("train", "val")) and not any(row.replies for row in rows):
            files[f"{name}_format.jsonl"] = to_jsonl(line for row in rows for line in to_format(row))
    if split.exam:
        asked = ({"subject": one.subject, "choices": len(one.choices)} for one in split.exam.questions)
        files["exam.jsonl"] = to_jsonl(asked)
    return files


def to_jsonl(rows: Iterable[dict]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def to_format(row: Row) -> list[dict]:
    """instruction / input / output for each trained turn; earlier turns of a dialogue as `history`."""
    system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
    turns = row.messages[1:] if system else row.messages
    lines, history = [], []
    for user, reply in zip(turns[::2], turns[1::2], strict=True):
        if reply.get("loss", True):
            output = f"<think>\n{reply.get('reasoning_content', '')}\n</think>\n\n{reply['content']}"
            line = {"instruction": system, "input": user["content"], "output": output}
            lines.append({**line, "history": list(history)} if history else line)
        history.append([user["content"], reply["content"]])
    return lines
