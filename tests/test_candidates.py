"""What may be concluded from several seeds: on numbers, not on training."""

import math
import random
import statistics
from types import SimpleNamespace

import pytest
from scipy import stats

from tools.reports.candidates import Candidate, Comparison, difference
from tools.reports.pages import TEMPLATES


def races(apart: float, number: int = 200, seeds: int = 5, candidates: int = 1, comparisons: int = 0):
    """The verdicts of simulated races, a list for each. A seed moves all candidates alike, and each by itself, so that
    paired differences have a standard deviation of 1; the first candidate lies `apart` from the baseline."""
    draw = random.Random(0)
    found = []
    for _ in range(number):
        common = [draw.gauss(0, 3) for _ in range(seeds)]
        base, *others = (
            [shift + (apart if n == 1 else 0) + draw.gauss(0, math.sqrt(0.5)) for shift in common]
            for n in range(candidates + 1)
        )
        found.append([difference(one, base, comparisons or candidates).kind for one in others])
    return found


def test_of_200_races_without_a_difference_few_are_called_and_with_one_of_two_deviations_most():
    assert sum(kinds != ["open"] for kinds in races(0.0)) <= 0.08 * 200
    assert sum(kinds == ["lower"] for kinds in races(-2.0)) >= 0.8 * 200
    assert sum(kinds == ["higher"] for kinds in races(2.0)) >= 0.8 * 200


def test_with_ten_candidates_the_chance_of_one_wrong_call_stays_the_same():
    assert sum(set(kinds) != {"open"} for kinds in races(0.0, candidates=10)) <= 0.08 * 200
    assert sum(set(kinds) != {"open"} for kinds in races(0.0, candidates=10, comparisons=1)) > 0.2 * 200


def test_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [0.21, 0.24, 0.22, 0.25], [0.23, 0.25, 0.25, 0.26]
    found = difference(ours, theirs)
    own = stats.ttest_rel(ours, theirs)
    low, high = own.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert found.n == found.lower == 4 and (found.kind == "lower") == (own.pvalue < 0.05)
    low, high = own.confidence_interval(1 - 0.05 / 3)
    assert difference(ours, theirs, comparisons=3).half == pytest.approx((high - low) / 2)


def test_one_seed_and_equal_losses_are_called_what_they_are():
    assert difference([0.2], [0.3]).kind == "one" and math.isnan(difference([0.2], [0.3]).half)
    assert difference([0.2, 0.3], [0.2, 0.3]).kind == "equal"


def test_so_many_seeds_more_tell_a_difference_in_four_of_five_races():
    """The number that is said, tried: races with that many seeds and the same mean and deviation."""
    assert difference([0.1, 0.3], [0.0, 0.0]).more is None  # the deviation of two is not known
    for apart in (-0.5, -0.8, -1.5):
        each = [apart + value for value in (-1.2, -0.4, 0.4, 1.2)]
        found = difference(each, [0.0] * 4)
        sd = statistics.stdev(each)
        enough, one_less = (
            sum(kinds == ["lower"] for kinds in races(apart / sd, number=400, seeds=found.n + more)) / 400
            for more in (found.more, found.more - 1)
        )
        assert enough > 0.75 and (one_less < 0.85 or found.more == 1), (apart, found.more, enough, one_less)
    assert difference([0.001, -0.001, 0.002], [0.0, 0.0, 0.0019]).more is None


def candidate(name: str, status: str = "completed") -> Candidate:
    """Of three runs, of which two have the status."""
    states = ("completed", status, status)
    return Candidate(name, {n: SimpleNamespace(status=state, run={"seed": n}) for n, state in enumerate(states)})


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", {"lower": "lower by 1.0000 ± 0.", "higher": "higher by 1.0000", "open": "no difference was shown: +0.",
                "one": "+1.0000 with one seed", "equal": "the same losses in all 3 seeds"}),
        ("zh", {"lower": "低 1.0000 ± 0.", "higher": "高 1.0000", "open": "看不出差别：+0.",
                "one": "+1.0000，只有一个种子", "equal": "3 个种子的损失逐位相同"}),
    ],
)  # fmt: skip
def test_each_verdict_is_said_in_both_languages(language, words):
    said = TEMPLATES.get_template(f"verdict.{language}.md").module
    losses = {"lower": [-1.0, -1.01, -0.99], "higher": [1.0, 1.01, 0.99], "open": [1.0, -1.0, 0.3], "one": [1.0],
              "equal": [0.0, 0.0, 0.0]}  # fmt: skip
    for kind, each in losses.items():
        found = difference(each, [0.0] * len(each))
        one = Comparison(candidate("b"), {}, len(each), found, (found.mean, 9.0), None, None)
        text = said.verdict(one).strip()
        assert found.kind == kind and words[kind] in text and "\n" not in text, text
        unsure = {"en": "so for other rows it is not sure", "zh": "换一批样本未必成立"}[language]
        assert (unsure in text) == (kind in ("lower", "higher"))
        assert said.between(("a", "b", found)).strip().count("\n") == 0
    diverged = said.verdict(one._replace(candidate=candidate("b", "diverged"))).strip()
    assert {"en": "diverged in 2 of 3 runs", "zh": "3 次训练中有 2 次发散"}[language] in diverged
    for pairs, why in (
        (0, {"en": "no seed in common", "zh": "没有相同的种子"}),
        (3, {"en": "other validation rows", "zh": "验证样本不同"}),
    ):
        assert why[language] in said.verdict(one._replace(best=None, rows=None, pairs=pairs))
