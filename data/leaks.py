"""Questions that stand on both sides of a split, whatever their punctuation, and questions of an exam."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from data.errors import UserError
from data.formats import Columns, is_dialogue
from data.read import read_file
from data.source import find_source

BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,:/-](?=\d)")
SEED = 12  # characters by which a longer text is searched for an exam's questions


def question_key(text: str) -> str:
    """A question without what a copy changes: width, case, whitespace, punctuation, characters without width.

    Signs that make another question of it stay: 1.5 and 15, > and <, 5 % and 5.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = {match.start() for match in BETWEEN_DIGITS.finditer(text)}
    return "".join(
        character
        for index, character in enumerate(text)
        if character.isalnum() or index in kept or character in "%‰" or unicodedata.category(character)[0] == "S"
    )


class Exam:
    """The questions of --exclude, found as a whole question or inside a longer one."""

    def __init__(self, files: Iterable[str]):
        self.short: set[str] = set()
        self.long: dict[str, list[str]] = defaultdict(list)
        for name in files:
            questions = {question_key(text) for text in read_questions(name)} - {""}
            for question in questions:
                if len(question) < SEED:
                    self.short.add(question)
                else:
                    self.long[question[:SEED]].append(question)

    def holds(self, question: str) -> bool:
        """question: a `question_key`."""
        if not self.long:
            return question in self.short
        return question in self.short or any(
            question.startswith(found, start)
            for start in range(len(question) - SEED + 1)
            for found in self.long.get(question[start : start + SEED], ())
        )


def read_questions(name: str) -> list[str]:
    """Raises UserError if a row has none, because the exam would then be trained on unnoticed."""
    source, questions = find_source(name), []
    for path in source.files:
        for location, columns in read_file(path, path.name, source.part, []):
            question = Columns(columns, ()).take("question") if isinstance(columns, dict) else None
            if isinstance(question, str) and is_dialogue(question):
                question = None
            if not isinstance(question, str):
                raise UserError(f"--exclude {name}: {location} has no question")
            questions.append(question)
    return questions
