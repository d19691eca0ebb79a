"""Questions that stand on both sides of a split, whatever their punctuation, and what must not be trained on."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from data.base.errors import UserError
from data.reading.choices import Cells
from data.reading.formats import Ambiguous, Given, as_columns, read_row
from data.reading.read import read_file
from data.reading.source import find_source
from data.reading.texts import NARROW

# Signs that make another number or another name of it: 1.5 and 15, 3-5 and 35, -3 and 3, C# and C.
IN_NUMBERS = re.compile(r"(?<=\d)\s*([.,:、])\s*(?=\d)|(?<=[0-9A-Za-z])\s*([-+*/^#&])|([-+*/^#&])(?=\s*[0-9A-Za-z])")
NO_WORD = re.compile(r"[\W_]")
LETTERS = re.compile("[A-H]{1,8}")  # the answer to a question of multiple choice
SEED = 12  # characters by which a longer text is searched for an exam's questions


def question_key(text: str) -> str:
    """Normalises a question so that copies compare equal: width, case, whitespace, punctuation, characters without
    width. Signs that make another question of it stay."""
    text = text.translate(NARROW).casefold()
    kept = {match.start(group) for match in IN_NUMBERS.finditer(text) for group in (1, 2, 3)}

    def keep(match: re.Match) -> str:
        sign = match.group()
        return sign if match.start() in kept or sign in "%‰" or unicodedata.category(sign)[0] in "SM" else ""

    return NO_WORD.sub(keep, text)


class Excluded:
    """What must not be trained on: exam questions, wherever a user asks them, and rows by their messages.

    A question is found as a whole, as a line of a longer text, or inside of one if it is long enough to tell.
    """

    def __init__(self, files: Iterable[str], given: Given = (), exam_texts: Iterable[str] = ()):
        """files: of --exclude; a row of multiple choice, or without an answer, stands for its question, another one for
        itself. exam_texts: the questions of --exam. Raises UserError at a row that is neither."""
        self.whole: set[str] = set()
        self.long: dict[str, list[str]] = defaultdict(list)
        self.rows: set[str] = set()
        texts = list(exam_texts)
        for name in files:
            source = find_source(name)
            paths = [path for paths in source.splits.values() for path in paths]
            read = [row for path in paths for row in read_file(path, path.name, source.part, [])]
            for location, columns in read[: source.number_of(len(read))]:
                texts += self.take(location, as_columns(columns), name, given)
        for question in {question_key(text) for text in texts} - {""}:
            self.whole.add(question)
            if len(question) >= SEED:
                self.long[question[:SEED]].append(question)

    def take(self, location: str, columns, name: str, given: Given) -> list[str]:
        """The question of a row that stands for it; otherwise the row is noted."""
        question, choices = Cells(columns, given).question() if isinstance(columns, dict) else ("", {})
        if question and choices:
            return [question]
        try:
            messages = read_row(columns, "", given).messages
            if LETTERS.fullmatch(messages[-1]["content"]):
                return [m["content"] for m in messages if m["role"] == "user"]
            self.rows.add(said(messages))
            return []
        except ValueError as reason:
            if question and not isinstance(reason, Ambiguous):
                return [question]
            raise UserError(
                f"--exclude {name}: {location} {reason}; --columns question=COLUMN names its question"
            ) from None

    def holds(self, messages: list[dict]) -> bool:
        return said(messages) in self.rows or self.asks(m["content"] for m in messages if m["role"] == "user")

    def asks(self, turns: Iterable[str]) -> bool:
        """turns: what the user says. A line may be the question, with a context or choices in others."""
        return bool(self.whole) and any(
            key in self.whole or self.is_inside(key)
            for turn in turns
            for key in map(question_key, {turn, *turn.splitlines()})
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


def said(messages: list[dict]) -> str:
    """A dialogue without its system prompt, which may be that of the run."""
    return json.dumps(
        [[m["role"], m["content"], m.get("reasoning_content")] for m in messages if m["role"] != "system"]
    )
