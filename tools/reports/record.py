"""What a run has written so far, read for a report."""

import json
import math
import re
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from data.base.errors import UserError
from loop.evaluate import rise_of
from loop.record.run_folder import is_held, read_run, read_status, utc
from loop.score import Scored
from model.generate import Reply, format_rates
from tools.shared.answers import Changes, changes_by_subject

GROUP = "eval/loss/"  # and its name: the key of a group's loss in metrics.jsonl


class Verdict(NamedTuple):
    """What the loss did that chooses the best model. kind: overfitting, plateau, falling (the last one is
    the best), worse (none is better than the one before training), early (there is no other yet), or nonfinite (after
    the best)."""

    kind: str
    first: dict  # evaluations: rows of metrics.jsonl with their epoch and the figure that decides
    best: dict
    last: dict  # with a finite loss
    worse: dict  # the first one after the best
    rise: float  # of the figure that decides, from the best to the last
    error: float  # its standard error, paired over the rows; NaN if it is not known
    rows: int  # that it rests on
    train_fall: float  # of the train loss over the same steps, in nats; NaN if it is not known


class Group(NamedTuple):
    """A set or a group of validation rows: its evaluation loss before training, at the best step and at the end, and
    the rise from the best to the last with its standard error."""

    name: str
    rows: int
    first: float
    best: float
    last: float
    rise: float
    error: float


class Record(NamedTuple):
    folder: Path
    run: dict  # run.json
    data: dict  # data_report.json
    launch: dict  # run_status.json
    status: str | None  # as it is there, or `killed`
    train: list[dict]  # rows of metrics.jsonl
    evaluations: list[dict]  # with their epoch
    verdict: Verdict
    answers: list[dict]  # rows of samples.jsonl: of the best model, or of the newest evaluation
    sampled: dict
    step: int
    tables: dict[int, list[Scored]]  # step -> losses of the validation rows, at the best step and the last

    @property
    def own(self) -> dict[str, tuple[str, list[str]]]:
        """Of each measure that the step file brought: its title, and its figures that are there."""
        names = dict.fromkeys(name for row in self.evaluations for name in row)
        return {
            measure: (title + ("" if len(found) > 1 else " ↑" if higher else " ↓"), found)
            for measure, (title, higher) in self.run.get("measures", {}).items()
            if (found := [name for name in names if name == measure or name.startswith(f"{measure}/")])
        }

    @property
    def logged(self) -> list[str]:
        """Figures that the step logged."""
        return sorted({name for row in self.train for name in row if name.startswith("method/")})

    @property
    def rates(self) -> dict[str, float]:
        """Format rates of all `answers`."""
        replies = [Reply(*(sample[name] for name in Reply._fields)) for sample in self.answers]
        return format_rates(replies) if replies else {}

    @property
    def planned_epochs(self) -> float:
        per_epoch = math.ceil(self.data["train"]["examples"] / self.run["rows_per_step"])
        return round(self.run["max_steps"] / per_epoch, 2)

    @property
    def rate_is_gone(self) -> bool:
        """Whether the learning rate had fallen to under a twentieth of its highest."""
        rates = [row["train/learning_rate"] for row in self.train]
        return bool(rates) and rates[-1] < max(rates) / 20

    @property
    def tokens_per_s(self) -> float | None:
        return statistics.median(row["perf/tokens_per_s"] for row in self.train) if self.train else None

    @property
    def peak_gib(self) -> float | None:
        return max(row["memory/peak_gib"] for row in self.train) if self.train else None

    @property
    def exam_changes(self) -> tuple[int, int, dict[str, Changes]] | None:
        """What became of the exam's answers: (first step at which it was asked, best step or else the last, changes by
        subject)."""
        asked = [(row["subject"], row["choices"]) for row in read_lines(self.folder / "data" / "exam.jsonl")]
        right = {row["step"]: row["exam"] for row in read_lines(self.folder / "eval_rows.jsonl") if "exam" in row}
        right = {step: [one == "1" for one in text] for step, text in right.items() if len(text) == len(asked)}
        if len(right) < 2:
            return None
        first, best = min(right), self.verdict.best["step"]
        last = best if best in right and best > first else max(right)
        return first, last, changes_by_subject(right[first], right[last], asked)

    @property
    def launches(self) -> list[dict]:
        """Empty for a run that began before they were written down, even if a later launch is there."""
        launches = self.run.get("launches", [])
        return [] if launches and launches[0].get("from_step") else launches

    @property
    def wall_seconds(self) -> float | None:
        """Of all launches, one that goes on until now, a killed one until its last row; None if they are not known."""
        last = time.time() if self.status == "running" else (self.folder / "metrics.jsonl").stat().st_mtime
        spans = [(one.get("ended", utc(last)), one["began"]) for one in self.launches]
        seconds = [
            (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds() for end, begin in spans
        ]
        return sum(seconds) if spans else None

    @property
    def groups(self) -> list[Group]:
        counts, (first, best, last) = self.data.get("groups", {}), self.verdict[1:4]
        names = [key.removeprefix(GROUP) for key in self.evaluations[0] if key.startswith(GROUP)]
        labels, found = self.data.get("labels", {}), []
        for name in names:
            tables = ([line for line in self.tables.get(row["step"], ()) if name in labels.get(line.row, ())]
                      for row in (best, last))  # fmt: skip
            losses = [row.get(GROUP + name, math.nan) for row in (first, best, last)]
            found.append(Group(name, counts.get(name, 0), *losses, *rise_of(*tables, {"think": 1.0, "answer": 1.0})))
        return found


def read_record(run_dir: Path) -> Record:
    """Raises UserError if run_dir holds no run or no evaluation of it."""
    run = read_run(run_dir)
    rows = read_lines(run_dir / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "eval/loss" in row]
    if not any(math.isfinite(row["eval/loss"]) for row in evaluations):
        raise UserError(f"{run_dir} has no finished evaluation yet; there is nothing to report")
    data = json.loads((run_dir / "data" / "data_report.json").read_text(encoding="utf-8"))
    epochs_per_step = 1 / math.ceil(data["train"]["examples"] / run["rows_per_step"])
    metric = run.get("metric_for_best_model", "eval/loss")
    evaluations = [
        {**row, "epoch": row["step"] * epochs_per_step, "decides": row.get(metric, row["eval/loss"])}
        for row in evaluations
    ]
    samples = read_lines(run_dir / "samples.jsonl")
    answers = [sample for sample in samples if sample["model"] == "best"]
    if not answers and samples:  # not at its end yet: what the newest evaluation got
        answers = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    launch = read_status(run_dir)
    status = launch.get("status")
    best, last = best_and_last(evaluations)
    tables = read_tables(run_dir / "eval_rows.jsonl", {best["step"], last["step"]})
    return Record(
        folder=run_dir,
        run=run,
        data=data,
        launch=launch,
        status="killed" if status == "running" and not is_held(run_dir) else status,
        train=train,
        evaluations=evaluations,
        verdict=judge(evaluations, train, tables, run),
        answers=answers,
        sampled=sampled_in_training(samples),
        step=max(row["step"] for row in [*rows, {"step": 0, **launch}]),
        tables=tables,
    )


def sampled_in_training(samples: list[dict]) -> dict:
    """How many questions were answered at an evaluation, at how many of these, and after how many tokens answers ended
    because their time was over."""
    training = [sample for sample in samples if sample["model"] == "training"]
    cuts = {sample["step"]: sample["cut_at"] for sample in training if "cut_at" in sample}
    steps = {sample["step"] for sample in training}
    return {"times": len(steps), "questions": len(training) // max(1, len(steps)), "cuts": sorted(cuts.values())}


def best_and_last(evaluations: list[dict]) -> tuple[dict, dict]:
    finite = [row for row in evaluations if math.isfinite(row["decides"])]
    return min(finite, key=lambda row: row["decides"]), finite[-1]


def judge(evaluations: list[dict], train: list[dict], tables: dict[int, list[Scored]], run: dict) -> Verdict:
    """It overfits if the loss rose by more than twice the error of the rise; without losses of rows nothing is said."""
    first, (best, last) = evaluations[0], best_and_last(evaluations)
    later = [row for row in evaluations if row["step"] > best["step"]]
    after = [row for row in later if math.isfinite(row["decides"])]
    rise, error, rows = last["decides"] - best["decides"], math.nan, 0
    weights = {
        "eval/weighted_loss": {part: run.get(f"{part}_weight", 1.0) for part in ("think", "answer")},
        "eval/loss": {"think": 1.0, "answer": 1.0},
        "eval/think_loss": {"think": 1.0},
        "eval/answer_loss": {"answer": 1.0},
    }.get(run.get("metric_for_best_model", "eval/loss"))
    if len(tables) == 2 and weights:  # of another figure the losses of rows say nothing
        before, now = tables[best["step"]], tables[last["step"]]
        rise, error = rise_of(before, now, weights)
        rows = len({line.row for line in before} & {line.row for line in now})
    until_best = [row["train/loss"] for row in train if row["step"] <= best["step"]]
    fall = until_best[-1] - train[-1]["train/loss"] if until_best else math.nan
    if not later:
        kind = "early" if best is first else "falling"
    elif not after:
        kind = "nonfinite"
    elif best is first:
        kind = "worse"
    else:
        kind = "overfitting" if rise > 2 * error and rise > 0 else "plateau"
    return Verdict(kind, first, best, last, (after or later or [last])[0], rise, error, rows, fall)


def read_tables(path: Path, steps: set[int]) -> dict[int, list[Scored]]:
    """step -> the losses of the validation rows at these steps; none of a run from before they were kept."""
    tables: dict[int, list[Scored]] = {}
    for line in read_lines(path):
        if line["step"] in steps:
            parts = ((part, *line[part]) for part in ("think", "answer") if part in line)
            tables.setdefault(line["step"], []).extend(
                Scored(line["row"], part, float(loss_sum), count, 0) for part, loss_sum, count in parts
            )
    return tables


def read_lines(path: Path) -> list[dict]:
    """Rows of a file that a run may be writing to; numbers that are not finite are strings there."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # being written, or cut off by a kill
            continue
        is_number = {name: "/" in name and value in ("nan", "inf", "-inf") for name, value in row.items()}
        rows.append({name: float(value) if is_number[name] else value for name, value in row.items()})
    return rows


REPEATED = re.compile(r"(.{1,40}?)\1{7,}", re.DOTALL)


def collapse(text: str) -> str:
    """Text of a model that repeats itself, each run of 8 and more as the first two with their number."""
    return REPEATED.sub(lambda run: f"{run[1]}{run[1]}[… × {len(run[0]) // len(run[1])}]", text)
