"""Questions that stand on both sides of a split, whatever their punctuation, and questions of an exam."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator

from data.errors import UserError
from data.formats import Columns, Given, is_dialogue, read_question
from data.messages import read_messages
from data.read import read_file
from data.source import find_source

# Characters of full width, and the blank that is as wide, as the narrow ones that they stand for.
NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
# Signs that make another number or another name of it: 1.5 and 15, 3-5 and 35, -3 and 3, C# and C.
IN_NUMBERS = re.compile(r"(?<=\d)\s*([.,:、])\s*(?=\d)|(?<=[0-9A-Za-z])\s*([-+*/^#&])|([-+*/^#&])(?=\s*[0-9A-Za-z])")
NO_WORD = re.compile(r"[\W_]")
SEED = 12  # characters by which a longer text is searched for an exam's questions


def question_key(text: str) -> str:
    """A question without what a copy changes: width, case, whitespace, punctuation, characters without width. Signs
    that make another question of it stay."""
    text = text.translate(NARROW).casefold()
    kept = {match.start(group) for match in IN_NUMBERS.finditer(text) for group in (1, 2, 3)}

    def keep(match: re.Match) -> str:
        sign = match.group()
        return sign if match.start() in kept or sign in "%‰" or unicodedata.category(sign)[0] in "SM" else ""

    return NO_WORD.sub(keep, text)


class Exam:
    """The questions of --exclude and --exam: a whole question, a line of one, or a part that is long enough to tell."""

    def __init__(self, files: Iterable[str], given: Given = (), taken: Iterable[str] = ()):
        """taken: the files of --exam."""
        self.whole: set[str] = set()
        self.long: dict[str, list[str]] = defaultdict(list)
        for flag, name in [("--exclude", name) for name in files] + [("--exam", name) for name in taken]:
            found = {question_key(text) for text in read_questions(name, given, flag)}
            for question in found - {""} - self.whole:
                self.whole.add(question)
                if len(question) >= SEED:
                    self.long[question[:SEED]].append(question)

    def holds(self, turns: list[str]) -> bool:
        """turns: what the user says. A line may be the question, with a context or choices in others."""
        return bool(self.whole) and any(
            question_key(text) in self.whole or self.is_inside(question_key(text))
            for turn in turns
            for text in (turn, *turn.splitlines())
        )

    def is_inside(self, text: str) -> bool:
        return any(
            text.startswith(found, start) and not cuts_a_number(text, start, start + len(found))
            for start in range(len(text) - SEED + 1)
            for found in self.long.get(text[start : start + SEED], ())
        )


def cuts_a_number(text: str, begin: int, end: int) -> bool:
    """Whether text[begin:end] begins or ends inside a run of digits."""
    return any(0 < at < len(text) and text[at - 1].isdigit() and text[at].isdigit() for at in (begin, end))


def read_questions(name: str, given: Given, flag: str) -> Iterator[str]:
    """What the user would say in each row of an exam, with its choices and without. Raises UserError if a row has no
    question, because the exam would then be trained on unnoticed."""
    source = find_source(name)
    for path in source.files:
        for location, columns in read_file(path, path.name, source.part, []):
            try:
                if not isinstance(columns, dict):
                    raise ValueError(columns if isinstance(columns, str) else "is not an object")
                yield from questions_of(Columns(columns, given))
            except ValueError as reason:
                raise UserError(f"{flag} {name}: {location} {reason}; --columns question=COLUMN names it") from None


def questions_of(row: Columns) -> Iterator[str]:
    dialogue = row.take("dialogue")
    if dialogue is not None:
        messages = read_messages(dialogue, "dialogue", set())
    else:
        messages = read_question(row, "", set())
        value = row.filled[[name for name, became in row.used.items() if became == "question"][-1]]
        if isinstance(value, str) and not is_dialogue(value):
            yield value
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            yield message["content"]
