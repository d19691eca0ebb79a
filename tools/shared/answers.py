"""Figures of answers against their references: overlap of characters and of keywords."""


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
