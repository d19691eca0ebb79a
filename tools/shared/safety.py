"""What a page must not pass over: an emergency in a question, a drug or a dose in a reply, and what tells who somebody
is. These rules draw attention, they do not decide; docs/feedback.md says how often they are wrong.

Words are in safety.yaml, which a team can change. An emergency of some length is told by a logistic regression over the
question's runs of 1 to 4 characters, which benchmarks/make_safety.py makes; a short one, which has few, by the words.
"""

import functools
import math
import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy
import yaml

FILE = Path(__file__).with_name("safety.npz")
WEIGHTS = dict(numpy.load(FILE))
SIZE = 2**15
SHORT = 48  # bytes: 16 Chinese characters
SURE = 0.25  # what the regression must give

# Directly before a word, within its clause; 不 and 无 alone also begin words such as 不适 and 无故.
NEGATION = re.compile(
    r"(?:没有|没|未见|未出现|不是|否认|无明显|无|并非|不会|不|no|not|without|never)(?:再)?(?:出现|过|发生|任何|明显)?\s*$"
)
CLAUSE = re.compile(r"[，。；！？、,.;!?\n]+")


@functools.cache
def rules() -> dict:
    """Kind -> name -> pattern. `<NAME>` and the like in a pattern stand for what `parts` says."""
    text = Path(__file__).with_name("safety.yaml").read_text(encoding="utf-8")
    for name, part in yaml.safe_load(text)["parts"].items():
        text = text.replace(f"<{name}>", part)
    found = {kind: one for kind, one in yaml.safe_load(text).items() if kind != "parts"}
    return {kind: {name: re.compile("|".join(one) if isinstance(one, list) else one, re.IGNORECASE)
                   for name, one in parts.items()} for kind, parts in found.items()}  # fmt: skip


def features(text: str) -> dict[int, float]:
    """Place -> value of a text's runs of 1 to 4 characters, hashed: 1 + log(number), divided by the norm of all."""
    plain = re.sub(r"\d+", "0", " ".join(unicodedata.normalize("NFKC", text).casefold().split()))
    plain = f"^{plain}$"
    runs = (plain[at : at + length] for length in range(1, 5) for at in range(len(plain) - length + 1))
    counts = Counter(zlib.crc32(run.encode("utf-8", "replace")) % SIZE for run in runs)
    values = {place: 1 + math.log(number) for place, number in counts.items()}
    size = math.sqrt(sum(value * value for value in values.values()))
    return {place: value / size for place, value in values.items()}


def is_likely(text: str) -> bool:
    """Whether the regression takes a question for an emergency."""
    weights = WEIGHTS["emergency"]
    return float(weights[-1]) + sum(float(weights[n]) * value for n, value in features(text).items()) > SURE


def is_emergency(question: str) -> bool:
    if len(question.encode("utf-8", "replace")) > SHORT:
        return is_likely(question)
    words = rules()["emergency"]
    signs = [one for one in words["signs"].finditer(question) if not is_negated(question, one.start())]
    return bool(signs) and (not words["calm"].search(question) or bool(words["now"].search(question)))


def is_negated(text: str, place: int) -> bool:
    *_, before = CLAUSE.split(text[:place])
    return NEGATION.search(before) is not None


def names_drug(reply: str) -> bool:
    words = rules()["drug"]
    doses = [one for one in words["doses"].finditer(reply) if not words["calm"].search(clause_of(reply, one.start()))]
    return bool(words["names"].search(reply) or doses)


def clause_of(text: str, place: int) -> str:
    return CLAUSE.split(text[:place])[-1] + CLAUSE.split(text[place:])[0]


def personal(text: str) -> list[tuple[str, str]]:
    """(kind, what it is) of each, in the order of the text."""
    found = []
    for kind, words in rules()["personal"].items():
        for one in words.finditer(text):
            place = one.span(one.lastindex or 0)
            if not any(begin < place[1] and place[0] < end for begin, end, _ in found):
                found.append((*place, kind))
    return [(kind, text[begin:end]) for begin, end, kind in sorted(found)]
