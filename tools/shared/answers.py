"""Figures of answers: overlap with their references in characters and keywords; what became of an exam's answers."""

from collections.abc import Sequence
from typing import NamedTuple


class Changes(NamedTuple):
    """Of the answers to an exam's questions, before and after."""

    number: int
    before: int  # right ones
    after: int
    lost: int  # right before, wrong after
    won: int
    by_guessing: float  # so many are lost, and so many won, if a model guesses what it does not know


def changes(before: Sequence[bool], after: Sequence[bool], choices: Sequence[int]) -> Changes:
    """choices: of each question. A model that does not know an answer is taken to guess it, anew each time, and to be
    right with g = 1 / choices. Of the questions that neither model knows, (1 - g)^2 are then wrong twice, and g (1 - g)
    are lost, as many are won: 1 / (choices - 1) for each that is wrong twice. The idea is that of Harmon et al. 2025
    (arXiv:2510.17776), who take it from the two accuracies."""
    rows = list(zip(before, after, choices, strict=True))
    lost, won = (sum(a == is_lost and b != is_lost for a, b, _ in rows) for is_lost in (True, False))
    guessed = sum(1 / (number - 1) for a, b, number in rows if not a and not b)
    return Changes(len(rows), sum(map(bool, before)), sum(map(bool, after)), lost, won, guessed)


def changes_by_subject(
    before: Sequence[bool], after: Sequence[bool], asked: list[tuple[str, int]]
) -> dict[str, Changes]:
    """asked: subject and choices of each question. Of each subject, and of `all`."""
    rows = list(zip(before, after, asked, strict=True))
    parts = {subject: [row for row in rows if row[2][0] == subject] for subject in sorted({name for name, _ in asked})}
    return {
        subject: changes(*zip(*((a, b, choices) for a, b, (_, choices) in part), strict=True))
        for subject, part in [*parts.items(), ("all", rows)]
    }


class Characters:
    """A tokenizer for rouge_score: Chinese has no spaces, so each character that is not one is a token."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


def overlap(answers: list[str], references: list[str]) -> dict[str, float]:
    """Means over the answers of ROUGE-L's F1 (0-1), and corpus BLEU (0-100), both over characters."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rougeL"], tokenizer=Characters())
    scores = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return {"rouge_l": sum(scores) / len(scores), "bleu": corpus_bleu(answers, [references], tokenize="char").score}


def keywords(text: str) -> set[str]:
    """Nouns, verbs and adjectives of two characters and more, as jieba's part of speech tells them, and words of
    Latin letters."""
    import jieba
    from jieba import posseg

    jieba.setLogLevel("ERROR")
    found = ((pair.word, pair.flag) for pair in posseg.cut(text))
    return {word for word, flag in found if len(word) > 1 and (flag[0] in "nva" or flag == "eng")}


def keyword_overlap(answers: list[str], references: list[str]) -> dict[str, float]:
    """Means over the answers: the share of the reference's keywords that the answer has, and the share of the answer's
    that the reference has. Rows whose reference has no keyword are left out; 0 if an answer has none."""
    recalls, precisions = [], []
    for answer, reference in zip(answers, references, strict=True):
        said, wanted = keywords(answer), keywords(reference)
        if wanted:
            recalls.append(len(said & wanted) / len(wanted))
            precisions.append(len(said & wanted) / len(said) if said else 0.0)
    return {"keyword_recall": mean(recalls), "keyword_precision": mean(precisions)}


def mean(values: list) -> float:
    return sum(values) / len(values) if values else float("nan")
