"""What votes and forms say: win rates, agreement of raters, and answers to each item, with 95 % intervals."""

import itertools
from collections import Counter
from collections.abc import Iterable

from scipy.stats import binomtest


def rate(part: int, whole: int) -> str:
    """A share with its interval, Wilson's."""
    if not whole:
        return "-"
    low, high = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{part} of {whole} ({part / whole:.0%}, 95 %: {low:.0%} to {high:.0%})"


def say_votes(lines: list[dict]) -> list[str]:
    """lines: votes (`is_cast`). Comparisons of other models, by their names and weights, are counted apart."""
    said, by_models = [], {}
    for line in lines:
        models = tuple((str(reply.get("model") or "-"), reply.get("model_sha256")) for reply in line["replies"])
        if models[::-1] in by_models:  # the same two, named the other way round
            models, line = models[::-1], turned(line)
        by_models.setdefault(models, []).append(line)
    for ((a, _), (b, _)), votes in by_models.items():
        counts = Counter(vote["verdict"] for vote in votes)
        said.append(f"{len(votes)} votes, A = {a}, B = {b}")
        said.append(f"  A better {counts['a']}, B better {counts['b']}, both good {counts['both_good']}, both bad "
                    f"{counts['both_bad']}")  # fmt: skip
        said.append(f"  B wins {won_by_b(votes)}; ties are left out")
        for name in ("rater", "group"):
            parts: dict[str, list[dict]] = {}
            for vote in votes:
                parts.setdefault(str(vote.get(name) or "-"), []).append(vote)
            if len(parts) > 1:
                said += [f"    {name} {part}: B wins {won_by_b(some)}" for part, some in sorted(parts.items())]
        said += [f"  {text}" for text in (side(votes), *agreements(votes)) if text]
    return said


def turned(vote: dict) -> dict:
    """The same vote with A and B exchanged."""
    other = {"a": "b", "b": "a"}
    sides = {name: other.get(vote.get(name), vote.get(name)) for name in ("verdict", "left")}
    return {**vote, **sides, "replies": vote["replies"][::-1]}


def won_by_b(votes: list[dict]) -> str:
    decided = [vote["verdict"] for vote in votes if vote["verdict"] in ("a", "b")]
    return rate(decided.count("b"), len(decided))


def side(votes: list[dict]) -> str:
    """Whether a side was preferred, whatever stood there."""
    decided = [vote["verdict"] == vote["left"] for vote in votes if vote["verdict"] in ("a", "b") and vote.get("left")]
    if not decided:
        return ""
    p = binomtest(sum(decided), len(decided)).pvalue
    return f"the left side wins {rate(sum(decided), len(decided))}, p = {p:.2g}" + (
        ": a side was preferred" if p < 0.05 else ""
    )


def agreements(votes: list[dict]) -> Iterable[str]:
    """Of each two raters who voted on the same replies."""
    by_rater: dict[str, dict] = {}
    for vote in votes:
        key = vote["messages"][-1]["content"], *(reply["content"] for reply in vote["replies"])
        by_rater.setdefault(str(vote.get("rater") or "-"), {})[key] = vote["verdict"]
    for (one, ours), (other, theirs) in itertools.combinations(sorted(by_rater.items()), 2):
        pairs = [(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]
        if pairs:
            same = sum(a == b for a, b in pairs)
            yield f"{one} and {other} agree on {same} of {len(pairs)} questions, κ = {kappa(pairs):.2f}"


def kappa(pairs: list[tuple]) -> float:
    """Cohen's (1960): agreement beyond that of chance; NaN if both always say the same one thing."""
    number = len(pairs)
    ours, theirs = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(ours[name] * theirs[name] for name in ours) / number**2
    same = sum(a == b for a, b in pairs) / number
    return (same - chance) / (1 - chance) if chance < 1 else float("nan")


def say_forms(lines: list[dict]) -> list[str]:
    """Of each item the share of yes among yes and no."""
    forms = [line["form"] for line in lines if isinstance(line.get("form"), dict) and line["form"]]
    said = [f"{len(forms)} forms"] if forms else []
    for item in dict.fromkeys(item for form in forms for item in form):
        counts = Counter(str(form.get(item)) for form in forms)
        whole = counts["yes"] + counts["no"]
        said.append(f"  {item}: {rate(counts['yes'], whole)}; cannot say {counts['cannot_say']}")
    return said
