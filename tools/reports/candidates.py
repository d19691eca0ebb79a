"""Candidates: runs that differ in the seed alone, and what may be concluded from them.

Runs of two candidates are paired by seed, because the seed draws much of what a run's loss is. The interval of a mean
difference is Student's of 95 % (Gosset 1908), divided by the number of comparisons (Bonferroni).
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats

from loop.config import TrainConfig
from loop.evaluate import rise_of
from loop.score import Scored
from tools.reports.record import Record

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 100
PARTS = {"think": 1.0, "answer": 1.0}


class Difference(NamedTuple):
    """Of a candidate minus another, paired by seed."""

    n: int
    mean: float
    half: float  # of the interval; NaN for one seed
    lower: int  # in so many seeds
    more: int | None  # seeds until a difference of this size is told in 4 of 5 races; None if more than MOST_SEEDS

    @property
    def kind(self) -> str:
        """lower, higher, open (cannot be told), equal (to the bit), or one (one seed says nothing about others)."""
        if self.n < 2:
            return "one"
        if self.mean == self.half == 0:
            return "equal"
        return "lower" if self.mean < -self.half else "higher" if self.mean > self.half else "open"


def difference(ours: Sequence[float], theirs: Sequence[float], comparisons: int = 1) -> Difference:
    """Of two candidates' losses, in the order of their seeds. comparisons: that are made beside this one."""
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean, lower = len(each), statistics.fmean(each), sum(one < 0 for one in each)
    if n < 2:
        return Difference(n, mean, math.nan, lower, None)
    sd, tail, numbers = statistics.stdev(each), LEVEL / comparisons / 2, range(n, n + MOST_SEEDS + 1)
    error, degrees = [sd / math.sqrt(number) for number in numbers], [number - 1 for number in numbers]
    halves = stats.t.ppf(1 - tail, degrees) * error
    told = (halves + stats.t.ppf(POWER, degrees) * error <= abs(mean))[1:].tolist()
    more = told.index(True) + 1 if True in told else None
    return Difference(n, mean, float(halves[0]), lower, more)


class Candidate(NamedTuple):
    name: str
    runs: dict[int, Record]  # by the seed that pairs it with other candidates; each has an evaluation
    diverged: tuple[int, ...] = ()  # seeds

    def values(self, name: str, step: int | None = None) -> dict[int, float]:
        """seed -> a figure at the best step of its run, or at another; where it is known."""
        rows = {seed: row_at(record, step) for seed, record in self.runs.items()}
        return {seed: row[name] for seed, row in rows.items() if isinstance(row.get(name), float)}

    def of(self, figure: Callable[[Record], float | None]) -> list[float]:
        """A figure of each run, if it has one."""
        return [value for record in self.runs.values() if (value := figure(record)) is not None]


class Comparison(NamedTuple):
    """A candidate against the first one."""

    candidate: Candidate
    losses: dict[int, float]  # seed -> the lowest evaluation loss
    best: Difference | None  # None for the first one itself, and without common seeds
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
        for seed, record in candidate.runs.items()
        if seed not in candidate.diverged
    ]
    return max(set.intersection(*steps), default=0) or None if steps else None


def compare(candidates: list[Candidate]) -> list[Comparison]:
    """Each one against the first. Losses of other validation rows are not compared."""
    first, step, number = candidates[0], last_common_step(candidates), max(1, len(candidates) - 1)
    found = []
    for one in candidates:
        seeds = [seed for seed in one.runs if seed in first.runs and same_rows(one.runs[seed], first.runs[seed])]
        losses = one.values("eval/loss")

        def paired(step: int | None, one=one, seeds=seeds) -> Difference | None:
            ours, theirs = one.values("eval/loss", step), first.values("eval/loss", step)
            both = [seed for seed in seeds if seed in ours and seed in theirs]
            return difference([ours[s] for s in both], [theirs[s] for s in both], number) if both else None

        if one is first or not seeds:
            found.append(Comparison(one, losses, None, None, None, None))
            continue
        speeds = [(first.runs[seed].tokens_per_s, one.runs[seed].tokens_per_s) for seed in seeds]
        ratios = [theirs / ours for theirs, ours in speeds if theirs and ours]
        time = (statistics.fmean(ratios), min(ratios), max(ratios)) if ratios else None
        rise, error = rise_of(*(numbered([c.runs[seed] for seed in seeds]) for c in (first, one)), PARTS)
        half = error * stats.norm.ppf(1 - LEVEL / number / 2)
        rows = (rise, half) if math.isfinite(half) else None
        found.append(Comparison(one, losses, paired(None), rows, paired(step) if step else None, time))
    return found


def same_rows(one: Record, other: Record) -> bool:
    return one.run["val_rows"] == other.run["val_rows"]


def numbered(records: list[Record]) -> list[Scored]:
    """The losses of the validation rows at each run's best step. Rows are known by their tokens and their number among
    them, because a file may have another name in another run."""
    table = []
    for record in records:
        lines, numbers = record.tables.get(record.verdict.best["step"], []), {}
        for line in lines:
            number = numbers.setdefault(line.row, len(numbers))
            table.append(line._replace(row=f"{record.run['val_rows']} {number}"))
    return table


def lowest(comparisons: list[Comparison]) -> list[Comparison]:
    """Those that did not diverge, the lowest mean loss first."""
    sound = [one for one in comparisons if one.losses and not one.candidate.diverged]
    return sorted(sound, key=lambda one: statistics.fmean(one.losses.values()))


def best_two(comparisons: list[Comparison]) -> tuple[str, str, Difference] | None:
    """The two lowest candidates beside the first one, and their difference: of all pairs that could have been these."""
    ranked = [one for one in lowest(comparisons) if one.best]
    if len(ranked) < 2:
        return None
    (a, b), pairs = ranked[:2], math.comb(len(comparisons), 2)
    both = [seed for seed in a.losses if seed in b.losses]
    if not both:
        return None
    found = difference([a.losses[seed] for seed in both], [b.losses[seed] for seed in both], pairs)
    return a.candidate.name, b.candidate.name, found


# Settings in which runs of one candidate may differ: the seeds, the place, and what does not act on the result.
SEEDS = {"seed", "split_seed"}
NAMES = {"output_dir", "run_name", "resume", "dry_run", "language"}


def by_seed(records: list[Record], names: list[str]) -> list[Candidate]:
    """Runs that differ in the seed alone as one candidate each, in the order of their first ones."""
    groups: dict[tuple, list[int]] = {}
    one_split = len({record.run.get("split_seed") for record in records}) == 1
    for number, record in enumerate(records):
        groups.setdefault(method_of(record, one_split), []).append(number)
    found: dict[int, Candidate] = {}  # by the number of its first run
    for numbers in groups.values():
        seeds = [records[number].run["seed"] for number in numbers]
        if len(set(seeds)) < len(seeds):  # the same run twice, on another machine perhaps
            found |= {n: candidate_of(names[n], {records[n].run["seed"]: records[n]}) for n in numbers}
            continue
        *others, last = sorted(names[n] for n in numbers)  # ema-42 and ema-43 are ema
        size = next((i for i, (a, b) in enumerate(zip((others or [last])[0], last, strict=False)) if a != b), len(last))
        name = re.sub(r"[-_. /]*\d*$", "", last[:size]) or last
        found[numbers[0]] = candidate_of(name, {seed: records[n] for seed, n in zip(seeds, numbers, strict=True)})
    return [found[number] for number in sorted(found)]


def candidate_of(name: str, runs: dict[int, Record]) -> Candidate:
    diverged = tuple(seed for seed, record in runs.items() if record.status == "diverged")
    return Candidate(name, runs, diverged)


def method_of(record: Record, with_rows: bool = True) -> tuple:
    """What two runs of one candidate have in common."""
    code = tuple(str([file.get(name) for name in ("sha256", "imports", "set")]) for file in record.run["step_files"])
    rows = (record.run["train_rows"], record.run["val_rows"]) if with_rows else ()
    known = dataclasses.asdict(TrainConfig())  # what a run wrote before a setting existed is its default
    names = known.keys() - SEEDS - NAMES - {"step_file"}
    settings = tuple(str((known | record.run)[name]) for name in sorted(names))
    return code, rows, record.run["rows_per_step"], settings
