"""The questions of an exam, from files in the forms that people keep."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data.base.errors import UserError
from data.reading.choices import Cells, LeftOut, Question, base_of, read_question, say_left_out
from data.reading.read import read_file
from data.reading.source import find_source

SPLITS = ("test", "validation", "valid", "val", "eval", "dev", "train")  # of a folder; the first with answers is asked
Given = Iterable[tuple[str, str]]  # (what it is, column), of --columns


class Exam(NamedTuple):
    questions: list[Question]
    left_out: Counter  # reason -> questions
    notes: list[str]  # what a person should know of the files
    texts: list[str]  # of all questions, of those too that are not asked: none may be trained on

    def __str__(self) -> str:
        return "\n".join([f"{len(self.questions):,} questions{say_left_out(self.left_out)}", *self.notes])

    @property
    def guessing(self) -> float:
        """The share of right answers that a guess gives."""
        return sum(1 / len(question.choices) for question in self.questions) / max(1, len(self.questions))


def read_exam(names: Iterable[str], given: Given = ()) -> Exam:
    """Each question once, though it may stand in several files. Raises UserError if a name has none to ask."""
    exam, seen = Exam([], Counter(), [], []), set()
    for name in names:
        source = find_source(name, SPLITS)
        rows = {split: rows_of(files, source.part) for split, files in source.splits.items()}
        exam.texts.extend(Cells(columns, given).question()[0] for read in rows.values() for columns, _ in read)
        for asked, read in rows.items():  # noqa: B007
            indices = random.Random(0).sample(range(len(read)), source.number_of(len(read)))
            base = base_of((columns for columns, _ in read), given)
            found, left_out = ask([read[index] for index in sorted(indices)], given, base)
            if found:
                break
        else:
            columns = dict.fromkeys(f"`{column}`" for read in rows.values() for row, _ in read for column in row)
            raise UserError(
                f"{name} has no question with choices and one right answer{say_left_out(left_out)}. Its columns are "
                f"{', '.join(columns) or 'none'}; known are those of CMMLU, C-Eval, CMB, CMExam, MedQA and MedMCQA, or "
                "question, options (or A to D) and answer"
            )
        if len(rows) > 1:
            exam.notes.append(f"{name}: {asked} is asked; nothing of {', '.join(rows)} is trained on")
        if base is not None:
            exam.notes.append(f"{name}: its answers are numbers that count from {base}")
        new = [question for question in found if question.key not in seen]
        seen.update(question.key for question in new)
        exam.questions.extend({question.key: question for question in new}.values())
        exam.left_out.update(left_out)
        exam.left_out["asked already"] += len(found) - len({question.key for question in new})
    return exam._replace(left_out=+exam.left_out)


def rows_of(files: list, part: str) -> list[tuple[dict, str]]:
    """(columns, name of the file) of each row."""
    read = ((row, path.stem) for path in files for _, row in read_file(path, path.name, part, []))
    return [(row, stem) for row, stem in read if isinstance(row, dict)]


def ask(rows: list[tuple[dict, str]], given: Given, base: int | None) -> tuple[list[Question], Counter]:
    """(questions, why others were left out)"""
    found, left_out = [], Counter()
    for columns, stem in rows:
        try:
            found.append(read_question(columns, stem, given, base))
        except LeftOut as reason:
            left_out[str(reason)] += 1
    return found, left_out
