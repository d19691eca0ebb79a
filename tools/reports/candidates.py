"""Candidates: runs that differ in the seed alone, and what may be concluded from them.

Runs of two candidates are paired by seed, because much of a run's loss is the luck of its seed. The interval of a mean
difference is Student's (Gosset 1908), of 95 %, or of 1 - 5 % / m if there are m comparisons (Bonferroni).
"""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats

from loop.config import TrainConfig
from loop.evaluate import rise_of
from loop.record.run_folder import FINISHED
from tools.reports.record import Record

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 100
PARTS = {"think": 1.0, "answer": 1.0}
# In what runs of one candidate may differ: the seeds, the place, and the rows if each seed draws its own split.
SEEDS = {"seed", "split_seed"}
NAMES = {"output_dir", "run_name", "resume", "dry_run", "language"}
ROWS = {"train_rows", "val_rows"}


class Difference(NamedTuple):
    """Of a candidate minus another, paired by seed."""

    n: int
    mean: float
    half: float  # of the interval; NaN for one seed
    lower: int  # in so many seeds
    more: int | None  # seeds until a difference of this size is told in 4 of 5 races; None: not known, or too many

    @property
    def kind(self) -> str:
        """lower, higher, open (cannot be told), equal (to the bit), or one (one seed says nothing about others)."""
        if self.n < 2:
            return "one"
        if self.mean == self.half == 0:
            return "equal"
        return "lower" if self.mean < -self.half else "higher" if self.mean > self.half else "open"


def difference(ours: Sequence[float], theirs: Sequence[float], comparisons: int = 1) -> Difference:
    """Of two candidates' losses, in the order of their seeds. comparisons: how many are made, this one among them."""
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean, lower = len(each), statistics.fmean(each), sum(one < 0 for one in each)
    if n < 2:
        return Difference(n, mean, math.nan, lower, None)
    sd, tail, numbers = statistics.stdev(each), LEVEL / comparisons / 2, range(n, n + MOST_SEEDS + 1)
    error, degrees = [sd / math.sqrt(number) for number in numbers], [number - 1 for number in numbers]
    halves = stats.t.ppf(1 - tail, degrees) * error
    told = (halves + stats.t.ppf(POWER, degrees) * error <= abs(mean))[1:].tolist()
    more = told.index(True) + 1 if True in told and n > 2 else None  # of two the deviation is not known
    return Difference(n, mean, float(halves[0]), lower, more)


class Candidate(NamedTuple):
    name: str
    runs: dict[int, Record]  # by the seed that pairs it with other candidates; each has an evaluation

    @property
    def first(self) -> Record:
        return next(iter(self.runs.values()))

    @property
    def diverged(self) -> list[int]:
        """Seeds."""
        return [record.run["seed"] for record in self.runs.values() if record.status == "diverged"]

    def values(self, name: str, step: int | None = None) -> dict[int, float]:
        """seed -> a figure at the best step of its run, or at another; where it is known."""
        rows = {seed: row_at(record, step) for seed, record in self.runs.items()}
        return {seed: row[name] for seed, row in rows.items() if math.isfinite(row.get(name, math.nan))}

    @property
    def is_over(self) -> bool:
        return all(record.status in (*FINISHED, "diverged") for record in self.runs.values())

    def of(self, figure: Callable[[Record], float | None]) -> list[float]:
        """A figure of each run, if it has one."""
        return [value for record in self.runs.values() if (value := figure(record)) is not None]


class Comparison(NamedTuple):
    """A candidate against the first one."""

    candidate: Candidate
    losses: dict[int, float]  # seed -> evaluation loss at the best step
    pairs: int  # seeds that both have
    best: Difference | None  # None for the first one itself, and if no pair has the same validation rows
    rows: tuple[float, float] | None  # (mean difference, half of its interval) over the validation rows
    fixed: Difference | None  # at the last step that all of them have
    time: tuple[float, float, float] | None  # of a token: ratio to the first one's, mean and range over the seeds


def row_at(record: Record, step: int | None) -> dict:
    if step is None:
        return record.verdict.best
    return next((row for row in record.evaluations if row["step"] == step), {})


def last_common_step(candidates: list[Candidate]) -> int | None:
    """The last that every run which did not diverge was evaluated at; None if there is none after step 0."""
    steps = [
        {row["step"] for row in record.evaluations if math.isfinite(row["eval/loss"])}
        for candidate in candidates
        for record in candidate.runs.values()
        if record.status != "diverged"
    ]
    return max(set.intersection(*steps), default=0) or None if steps else None


def compare(candidates: list[Candidate]) -> list[Comparison]:
    """Each one against the first."""
    first, step, number = candidates[0], last_common_step(candidates), max(1, len(candidates) - 1)
    found = [Comparison(first, first.values("eval/loss"), 0, None, None, None, None)]
    for one in candidates[1:]:
        pairs = [(one.runs[seed], first.runs[seed]) for seed in common_seeds(one, first)]
        ratios = [theirs.tokens_per_s / ours.tokens_per_s for ours, theirs in pairs if ours.train and theirs.train]
        time = (statistics.fmean(ratios), min(ratios), max(ratios)) if ratios else None
        best, fixed = paired(one, first, number), paired(one, first, number, step) if step else None
        rows, seeds = over_rows(pairs, number), len(one.runs.keys() & first.runs.keys())
        found.append(Comparison(one, one.values("eval/loss"), seeds, best, rows, fixed, time))
    return found


def common_seeds(one: Candidate, other: Candidate) -> list[int]:
    """Those in which both have the same validation rows; losses of others are not compared."""
    return [
        seed for seed in one.runs
        if seed in other.runs and one.runs[seed].run["val_rows"] == other.runs[seed].run["val_rows"]
    ]  # fmt: skip


def paired(one: Candidate, other: Candidate, comparisons: int, step: int | None = None) -> Difference | None:
    ours, theirs = one.values("eval/loss", step), other.values("eval/loss", step)
    seeds = [seed for seed in common_seeds(one, other) if seed in ours and seed in theirs]
    return difference(*([losses[seed] for seed in seeds] for losses in (ours, theirs)), comparisons) if seeds else None


def over_rows(pairs: list[tuple[Record, Record]], comparisons: int) -> tuple[float, float] | None:
    """At each run's best step. A row is known by its place among the others, for its file may have another name."""
    ours, theirs = [], []
    for pair in pairs:
        tables = [record.tables.get(record.verdict.best["step"], []) for record in pair]
        if len(tables[0]) == len(tables[1]):  # a run from before they were kept has none
            ours += [line._replace(row=other.row) for line, other in zip(*tables, strict=True)]
            theirs += tables[1]
    rise, error = rise_of(theirs, ours, PARTS)
    half = error * stats.norm.ppf(1 - LEVEL / comparisons / 2)
    return (rise, half) if math.isfinite(half) else None


def lowest(comparisons: list[Comparison]) -> list[Candidate]:
    """Those that did not diverge, the lowest mean loss first."""
    sound = [one for one in comparisons if one.losses and not one.candidate.diverged]
    return [one.candidate for one in sorted(sound, key=lambda one: statistics.fmean(one.losses.values()))]


def best_two(candidates: list[Candidate]) -> tuple[str, str, Difference] | None:
    """The two lowest beside the first one, and their difference, corrected for all pairs: they were chosen by it."""
    ranked = [one for one in lowest(compare(candidates)) if one is not candidates[0]][:2]
    found = paired(*ranked, math.comb(len(candidates), 2)) if len(ranked) == 2 else None
    return (*(one.name for one in ranked), found) if found else None


def by_seed(records: list[Record], names: list[str]) -> list[Candidate]:
    """Runs that differ in the seed alone as one candidate each, in the order of their first ones."""
    groups: dict[tuple, list[int]] = {}
    but = ROWS if len({record.run.get("split_seed") for record in records}) > 1 else set()
    for number, record in enumerate(records):
        groups.setdefault(method_of(record, but), []).append(number)
    found: dict[int, Candidate] = {}  # by the number of its first run
    for numbers in groups.values():
        seeds = [records[number].run["seed"] for number in numbers]
        if len(set(seeds)) < len(seeds):  # the same run twice, on another machine perhaps
            found |= {n: Candidate(names[n], {records[n].run["seed"]: records[n]}) for n in numbers}
            continue
        letters = zip(*(names[n] for n in numbers), strict=False)
        alike = itertools.takewhile(lambda each: len(set(each)) == 1, letters)
        common = re.sub(r"[-_. /]*\d*$", "", "".join(each[0] for each in alike))  # ema-42 and ema-43 are ema
        taken = not common or len(numbers) == 1 or any(one.name == common for one in found.values())
        name = names[numbers[0]] if taken else common
        found[numbers[0]] = Candidate(name, {seed: records[n] for seed, n in zip(seeds, numbers, strict=True)})
    return [found[number] for number in sorted(found)]


def method_of(record: Record, but: set[str]) -> tuple:
    """What two runs of one candidate have in common. but: settings in which they may differ too."""
    code = tuple(str([file.get(name) for name in ("sha256", "imports", "set")]) for file in record.run["step_files"])
    known = dataclasses.asdict(TrainConfig())  # what a run wrote before a setting existed is its default
    names = (known.keys() | ROWS | {"rows_per_step"}) - SEEDS - NAMES - {"step_file"} - but
    return code, tuple(str((known | record.run)[name]) for name in sorted(names))
