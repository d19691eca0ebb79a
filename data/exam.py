"""Multiple choice: the questions of an exam, and what a model is asked."""

import random
import re
from typing import NamedTuple

import torch

from data.batches import MicroBatch, collate
from data.encode import Example, token_ids
from data.errors import UserError
from data.read import read_file
from data.source import find_source
from data.template import generation_prompt

LETTERS = "ABCDEFGH"
LEFT_OUT = "for want of choices or of one right letter, or because they need a picture"
ASK = "请直接给出正确选项的字母。"
REFERS = re.compile("^以上|^上述|都(?:是|不是|对|不对)$|均(?:是|不是|对|不对|正确)$|^[A-H](?:[、和与+,，]?[A-H])+")
OWN_LETTER = re.compile(r"^([A-H])[.、．:：)）]\s*")
PICTURE = re.compile(r"<img\b|!\[[^\]]*\]\(|data:image/", re.IGNORECASE)


class Question(NamedTuple):
    subject: str
    text: str
    choices: tuple[str, ...]  # in the order in which they are asked
    correct: int  # index of the right one

    @property
    def asked(self) -> str:
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return "\n".join([self.text, *choices, ASK])


def read_exam(names: list[str]) -> tuple[list[Question], int]:
    """The questions with one right choice, and how many were left out. Raises UserError if a file has none."""
    questions, left_out = [], 0
    for name in names:
        source, before = find_source(name), len(questions)
        for path in source.files:
            for _, columns in read_file(path, path.name, source.part, []):
                question = read_question(columns, path.stem) if isinstance(columns, dict) else None
                if question:
                    questions.append(question)
                else:
                    left_out += 1
        if len(questions) == before:
            raise UserError(
                f"{name} has no question with choices and one right letter; columns of CMMLU, C-Eval, CMB and CMExam "
                "are known: question, A to D or option, answer"
            )
    return questions, left_out


def read_question(columns: dict, stem: str) -> Question | None:
    """None if it has no text, needs a picture, has fewer than two choices, or not exactly one right one."""
    cells = {str(name).strip().lower(): value for name, value in columns.items() if value is not None}
    choices = choices_of(cells)
    letter = str(cells.get("answer", "")).strip().upper()
    text = str(cells.get("question", "")).strip()
    needs_picture = any(cells.get(name) for name in ("image", "images", "img", "picture")) or PICTURE.search(
        "\n".join([text, *choices.values()])
    )
    if not text or needs_picture or not 2 <= len(choices) <= len(LETTERS) or letter not in choices:
        return None
    order = sorted(choices)
    if not any(REFERS.search(choice) for choice in choices.values()):  # to other choices, whose letters would be others
        random.Random(f"{text}{order}").shuffle(order)
    subject = next((str(cells[name]) for name in ("subject", "exam_subject", "exam_class") if cells.get(name)), stem)
    return Question(subject, text, tuple(choices[name] for name in order), order.index(letter))


def choices_of(cells: dict) -> dict[str, str]:
    """letter -> text, from columns of their own, an object, pairs, or lines that begin with the letter."""
    own = {letter: str(cells[letter.lower()]).strip() for letter in LETTERS if letter.lower() in cells}
    options = cells.get("option", cells.get("options", cells.get("choices", own)))
    if isinstance(options, str):
        options = dict(re.findall(r"^\s*([A-H])[\s.、．:：)）]\s*(.*?)\s*$", options, re.MULTILINE))
    elif isinstance(options, list):
        pairs = [
            (str(o.get("key", o.get("label"))), o.get("value", o.get("text"))) for o in options if isinstance(o, dict)
        ]
        options = dict(pairs) if pairs else dict(zip(LETTERS, options, strict=False))
    if not isinstance(options, dict):
        return {}
    named = {str(letter).strip().upper(): str(text).strip() for letter, text in options.items() if str(text).strip()}
    own = {letter: OWN_LETTER.match(text) for letter, text in named.items()}
    if all(match and match[1] == letter for letter, match in own.items()):  # "A. 甲"
        named = {letter: text[own[letter].end() :] for letter, text in named.items()}
    return named


def exam_prompts(questions: list[Question], tokenizer, system_prompt: str, thinking: bool = False) -> list[str]:
    """As the chat template renders them; without thinking they end with a closed block."""
    opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
    dialogues = [[*opening, {"role": "user", "content": question.asked}] for question in questions]
    return [generation_prompt(dialogue, tokenizer, thinking) for dialogue in dialogues]


def exam_rows(prompts: list[str], tokenizer) -> list[Example]:
    """Rows without targets; each location is the number of its prompt."""
    return [
        Example(torch.tensor(ids), len(ids), len(ids), str(number))
        for number, ids in enumerate(token_ids(prompts, tokenizer))
    ]


def collate_exam(rows: list[Example], tokenizer) -> MicroBatch:
    """The rows laid end to end; the targets of each are all LETTERS as its next token."""
    inputs = collate(rows).inputs
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    ends = inputs["cu_seqlens"][1:].long() - 1
    inputs |= {"target_positions": ends.repeat_interleave(len(letters)), "target_ids": letters.repeat(len(rows))}
    return MicroBatch(inputs, torch.zeros(len(rows) * len(letters), dtype=torch.bool))
