"""Questions of multiple choice, in the forms that people keep: the one parser for exams, their exclusion and training.

Known are, among others, the columns of CMMLU, C-Eval, CMB, CMExam, MedQA, MedMCQA, MMLU and ARC.
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from string import ascii_uppercase
from typing import NamedTuple

from data.reading.texts import MARKER, NARROW, from_text, is_blank, normal

LETTERS = "ABCDEFGH"
ASK = "请直接给出正确选项的字母。"
# What a column is -> its names, as `normal` writes them, the most specific first.
FORMS = {
    "question": ("question", "题目", "问题", "题干", "试题", "question_text", "qtext", "stem", "query", "problem",
                 "prompt", "ask", "instruction"),
    "options": ("options", "option", "choices", "choice", "选项", "候选项", "备选答案", "candidates", "answer_choices",
                "answers"),
    "answer": (
        "answer_idx", "answerkey", "answer_key", "answer_letter", "answer_index", "correct_option", "correct_answer",
        "correct_choice", "right_answer", "正确答案", "标准答案", "参考答案", "答案", "正确选项", "cop", "correct",
        "answer", "gold", "ground_truth", "label", "target", "ra", "output",
    ),
    "subject": ("subject", "exam_subject", "subject_name", "exam_class", "科目", "学科", "meta_info"),
    "picture": ("image", "images", "img", "picture", "pictures", "figure", "image_path", "image_url", "qimage", "图片",
                "图像"),
}  # fmt: skip
OWN_COLUMN = re.compile(r"(?:options?|opt?|choices?|选项|备选项?|endings?)?_?([a-h])(?:_?(?:选项|项|options?))?")
NUMBERED = re.compile(r"(?:options?|choices?|选项|endings?)_?(\d)")
KEYS = ("key", "label", "letter", "id", "aid", "option", "name")
VALUES = ("value", "text", "content", "choice", "option", "answer", "atext")
NO_CHOICE = {"nan", "null", "<na>", "n/a"}
PICTURE = re.compile(
    r"<img\b|!\[[^\]]*\]\(|\\includegraphics|data:image/|<image"
    r"|如(?:下|上|左|右)?图(?:所示|示|中|，|,|\d)|(?:下|附|左|右)图(?:所示|示|中)"
    r"|(?:shown|seen|depicted) in the (?:\w+ )?(?:figure|image|picture|photo)"
    r"|(?:figure|image|picture) (?:below|above)\b",
    re.IGNORECASE,
)
# A choice that means others by their place, which shuffling would change.
REFERS = re.compile(
    r"^(?:以上|上述|上面|前面|前述)|(?:以上|上述)[^，。；]{0,4}(?:都|均|皆|全|项|选|答案|各)|前[两二三四]?[项者]|[两二三四]者[都均皆全]"
    r"|^(?:都|均|皆|全部?)(?:是|不是|对|不对|错|正确|不正确|错误|可以?|有|无)$|^无(?:正确|以上)"
    r"|选项\s*[A-H]|(?:^|[^A-Za-z0-9\u4e00-\u9fff]|[是即为除仅只选指由或和与及非])\s*[A-H]\s*"
    r"(?:(?:[、,，和与及或/+&]|以及|and|or)\s*)+[A-H](?![A-Za-z0-9]|\s*型)"
    r"|(?:^|[，,；;])[A-H]\s*(?:对|错|正确|错误|不对|成立|项)|^(?!.*([A-H]).*\1)[A-H]{2,8}\s*(?:都|均|皆|全|对|错|正确|$)"
    r"|\b(?i:both|either|neither|only|options?|choices?|answers?)\s+\(?[A-H]\b|^[A-H] (?i:only)$"
    r"|^\(?[A-H]\)? (?i:and|or) \(?[A-H]\b"
    r"|\b(?i:(?:all|none|both|neither|either|any|two|some|each) (?:of )?(?:the )?"
    r"(?:above|preceding|foregoing|others?|these|those|options|choices))\b"
)
LETTER = re.compile(
    r"\W*(?:(?:the )?(?:正确|标准|参考|最佳|correct|right|best)?\s*(?:答案|选项|答|选|answer|option|choice)?\s*"
    r"(?:应为|应选|是|为|选|is)?)\W*([A-H])\W*",
    re.IGNORECASE,
)
# {} is the label; a blank ends it at the beginning of a line, a sign anywhere.
LABEL = (
    r"(?:^|(?<=[\s;；,，。.?？、|(（\[【]))[(（\[【]?{}(?:\s*[.、．。:：)）\]】]|(?:(?<=^.)|(?<=\n.))[ \t\u3000])\s*"
)


class Question(NamedTuple):
    subject: str
    text: str
    choices: tuple[str, ...]  # in the order in which they are asked
    correct: int  # index of the right one

    @property
    def asked(self) -> str:
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return "\n".join([self.text, *choices, ASK])

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """The same for the same question in another file."""
        return same(self.text), frozenset(map(same, self.choices))


class LeftOut(ValueError):
    """Why a question cannot be asked."""


class Cells:
    """The columns of one row, by what they are. given: (what it is, column), of --columns."""

    def __init__(self, columns: dict, given: Iterable[tuple[str, str]] = ()):
        self.cells = {normal(str(name)): value for name, value in columns.items() if not is_blank(value)}
        self.given = {role: normal(column) for role, column in given}

    def find(self, role: str) -> list:
        names = (self.given[role],) if role in self.given else FORMS[role]
        return [self.cells[name] for name in names if name in self.cells]

    def question(self) -> tuple[str, dict[str, str]]:
        """The text, and label -> choice; empty if it has none. A list of messages is no question."""
        text = next((str(value).strip() for value in self.find("question") if isinstance(value, (str, int))), "")
        options = next(iter(self.find("options")), None) or self.columns_of_choices()
        choices = {} if options is None else choices_of(options)
        if text and not choices:
            before, choices = labelled(text)
            text = before if choices else text
        return text, choices

    def columns_of_choices(self) -> dict:
        """Of columns A, B, ... or option_a, opa, 选项A, ...; of option_1, ... counted from 1 or 0."""
        own = {match[1].upper(): name for name in self.cells if (match := OWN_COLUMN.fullmatch(name))}
        numbered = {match[1]: name for name in self.cells if (match := NUMBERED.fullmatch(name))}
        return {label: self.cells[name] for label, name in sorted((own if len(own) > 1 else numbered).items())}


def same(text: str) -> str:
    """A text without what a copy changes: width and blanks."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def choices_of(options) -> dict[str, str]:
    """label -> text, from an object, a list of texts, objects or pairs, two lists of labels and texts, or a text of
    any of these or of lines. Labels are letters if the file has none. Empty if it is none of these."""
    if isinstance(options, str) and options.lstrip()[:1] in ("{", "["):
        try:  # a text that numpy wrote has no commas
            plain = re.sub(r"array\(|,\s*dtype=\w+\)", "", options.strip())
            options = from_text(re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", plain), "options")
        except ValueError:
            return {}
    if isinstance(options, str):
        _, found = labelled(options)
        lines = [line.strip() for line in options.splitlines() if line.strip()]
        options = found or (lines if len(lines) > 1 else [part.strip() for part in options.split("|")])
        if len(options) < 2:
            return {}
    if isinstance(options, dict) and isinstance(options.get("text"), list):
        labels = options.get("label")
        options = list(map(list, zip(labels, options["text"], strict=False))) if labels else options["text"]
    if isinstance(options, list):
        pairs = [pair_of(option) for option in options]
        many = len(options) > len(ascii_uppercase)
        options = {} if many else dict(pairs if all(pairs) else zip(ascii_uppercase, options, strict=False))
    if not isinstance(options, dict):
        return {}
    texts = {str(label).strip().upper(): value for label, value in options.items() if is_choice(value)}
    if any(isinstance(value, (dict, list)) for value in texts.values()):
        return {}
    texts = {label: str(value).strip() for label, value in texts.items()}
    own = [re.match(LABEL.format(re.escape(label)), text.translate(NARROW)) for label, text in texts.items()]
    if all(own):  # "A. 甲"
        texts = {label: text[match.end() :] for (label, text), match in zip(texts.items(), own, strict=True)}
    return texts


def is_choice(value) -> bool:
    return not is_blank(value) and str(value).strip().lower() not in NO_CHOICE


def pair_of(option) -> tuple | None:
    """(label, text) of one option of a list."""
    if isinstance(option, list) and len(option) == 2 and len(str(option[0]).strip()) == 1:
        return tuple(option)
    if not isinstance(option, dict):
        return None
    key = next((name for name in KEYS if name in option), None)
    value = next((name for name in VALUES if name in option and name != key), None)
    if len(option) == 1:
        return next(iter(option.items()))
    return (option[key], option[value]) if key and value and isinstance(option[key], (str, int)) else None


def labelled(text: str) -> tuple[str, dict[str, str]]:
    """(what stands before, label -> text) of a text with the labels A, B, ... or 1, 2, ... in their order, each at the
    beginning of a line or after a blank or a sign. What follows a label up to the next one belongs to it."""
    narrow = text.translate(NARROW)
    for labels in (LETTERS, LETTERS.lower(), "12345678"):
        starts = []
        for label in labels:
            found = re.compile(LABEL.format(label), re.MULTILINE).search(narrow, starts[-1].end() if starts else 0)
            if not found:
                break
            starts.append(found)
        if len(starts) > 1 and (labels[0] != "1" or text[: starts[0].start()].strip() == ""):
            ends = [*(match.start() for match in starts[1:]), len(text)]
            parts = [text[match.end() : end].strip(" \t\r\n;；|") for match, end in zip(starts, ends, strict=True)]
            return text[: starts[0].start()].strip(), dict(zip(map(str.upper, labels), parts, strict=False))
    return text, {}


def read_question(columns: dict, stem: str, given: Iterable[tuple[str, str]] = (), base: int | None = None) -> Question:
    """One question with its choices in an order drawn for it. base: from which a number as the answer counts. Raises
    LeftOut with the reason if it has no text, needs a picture, or has not exactly one right choice."""
    row = Cells(columns, given)
    text, choices = row.question()
    if not text:
        raise LeftOut("no question")
    if any(row.find("picture")) or PICTURE.search("\n".join([text, *choices.values()])):
        raise LeftOut("a picture")
    if MARKER.search("\n".join([text, *choices.values()])):
        raise LeftOut("a control token in its text")
    if not 2 <= len(choices) <= len(LETTERS):
        raise LeftOut("no choices" if len(choices) < 2 else f"more than {len(LETTERS)} choices")
    if len(set(map(same, choices.values()))) < len(choices):
        raise LeftOut("equal choices")
    correct = right_choice(row.find("answer"), choices, base)
    order = list(choices)
    if not any(REFERS.search(unicodedata.normalize("NFKC", choice)) for choice in choices.values()):
        random.Random(f"{text}{sorted(order)}").shuffle(order := sorted(order))
    elif order != list(LETTERS[: len(order)]) and any(label in LETTERS for label in order):
        raise LeftOut("choices that name a missing one")
    subject = next((str(value) for value in row.find("subject")), stem)
    return Question(subject, text, tuple(choices[label] for label in order), order.index(correct))


def right_choice(answers: list, choices: dict[str, str], base: int | None) -> str:
    """The label of the right choice. Raises LeftOut if there is not exactly one."""
    found, reason = [], "no answer"
    for answer in answers:
        try:
            found.append(label_of(answer, choices, base))
        except LeftOut as error:
            reason = reason if str(error) == "no right choice" and reason != "no answer" else str(error)
    if not found:
        raise LeftOut(reason)
    if len(set(found)) > 1:
        raise LeftOut("answers that disagree")
    return found[0]


def label_of(answer, choices: dict[str, str], base: int | None) -> str:
    """Of an answer that is a label in any dress, a number, or the text of a choice."""
    if isinstance(answer, str) and answer.strip()[:1] == "[":
        with suppress(ValueError):
            answer = from_text(answer.strip(), "answer")
    if isinstance(answer, list):
        if len(answer) != 1:
            raise LeftOut("several right choices")
        answer = answer[0]
    number = number_of(answer)
    plain = str(answer if number is None else number).strip()
    if plain.upper() in choices:
        return plain.upper()
    texts = [label for label, text in choices.items() if same(text) == same(plain)]
    texts = texts or [label for label, text in choices.items() if same(text).casefold() == same(plain).casefold()]
    if number is not None and not (isinstance(answer, str) and texts):
        if base is None:
            raise LeftOut("a number as the answer, which may count from 0 or from 1")
        label = ascii_uppercase[number - base] if base <= number < base + len(LETTERS) else ""
        if label in choices:
            return label
        raise LeftOut("no right choice")
    if len(texts) == 1:
        return texts[0]
    if (match := OWN_COLUMN.fullmatch(normal(plain))) and match[1].upper() in choices:
        return match[1].upper()
    narrow = unicodedata.normalize("NFKC", plain)
    if (match := LETTER.fullmatch(narrow)) and match[1].upper() in choices:
        return match[1].upper()
    if match := re.match(LABEL.format("([A-H])"), narrow):  # "A. 甲"
        rest = same(narrow[match.end() :])
        others = {same(text) for label, text in choices.items() if label != match[1]}
        if match[1] in choices and rest not in others:
            return match[1]
    letters = set(re.sub(r"[\W_和与及]|and", "", narrow.upper()))
    raise LeftOut("several right choices" if len(letters) > 1 and letters <= choices.keys() else "no right choice")


def number_of(answer) -> int | None:
    """An answer that is a whole number, as a number, as a table holds it or as text."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float, str)):
        return None
    match = re.fullmatch(r"\s*(\d+)(?:\.0+)?\s*", str(answer))
    return int(match[1]) if match else None


def base_of(rows: Iterable[dict], given: Iterable[tuple[str, str]] = ()) -> int | None:
    """From which the numbers count that a file has as answers: 0 if one is 0, 1 if one is the number of choices. None
    if neither tells, or if its choices are numbered themselves."""
    low = high = False
    for columns in rows:
        row = Cells(columns, given)
        _, choices = row.question()
        numbers = [number_of(answer) for answer in row.find("answer")]
        numbers = [number for number in numbers if number is not None and str(number) not in choices]
        low |= 0 in numbers
        high |= bool(choices) and len(choices) in numbers
    return None if low == high else 0 if low else 1


def say_left_out(reasons: Counter) -> str:
    """ "; 3 left out: a picture (2), no answer (1)"; empty without any."""
    if not reasons:
        return ""
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
    return f"; {reasons.total():,} left out: {listed}"
