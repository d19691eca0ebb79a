"""What an evaluation measures: the loss, what the thinking is worth, an exam, what is forgotten, and what a step file
brings.

Each measure says which rows it wants and what it makes of their table of losses; all of them are computed in one pass.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

from accelerate import Accelerator

from data.base.console import say
from data.base.errors import UserError
from data.base.language import tr
from data.contexts import change_thinking, exam_prompts, exam_rows
from data.dataset import Data
from data.encode import Example
from data.reading.choices import LETTERS, Question
from loop.config import TrainConfig
from loop.distributed import gather
from loop.score import Scored, accuracy_of, loss_of, mean, perplexity, score, total
from loop.start.step_file import name_of, run_own

WEIGHTED = "eval/weighted_loss"  # decides which model is the best, unless the step file names another figure


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that is measured. A step file brings its own in `evaluators(data, config)`; they are then in
    metrics.jsonl, in SwanLab, and in the report's tables and curves."""

    name: str  # of the figure; with a / in it
    title: str  # of its curve
    rows: Sequence[Example]  # to compute, such as those of data.val; the same on every rank
    of: Callable[..., float | dict[str, float]]  # of their table, a list of Scored; several figures are NAME/KEY
    every: int = 0  # steps, a multiple of eval_steps; 0: at each evaluation
    higher_is_better: bool = False
    needs_first: bool = False  # `of` also gets the table of the first evaluation, before training


class Evaluation:
    """Everything that a run measures at an evaluation. All ranks call it."""

    def __init__(self, data: Data, config: TrainConfig, accelerator: Accelerator, method: ModuleType):
        """Raises UserError if what the step file brings cannot be measured."""
        self.config, self.accelerator, self.method = config, accelerator, method
        weights = config.think_weight, config.answer_weight
        self.measures = [Measure("eval", "loss", data.val, lambda table: losses(table, *weights))]
        if labels := data.split.labels:
            self.measures.append(Measure("eval/loss", "groups", data.val, lambda table: by_label(table, labels)))
        if config.think_probe:
            self.measures += think_probe(data, config.max_length)
        self.first: dict[str, list[Scored]] = {}  # measure -> its table before the first step, if it needs that
        self.right: list[bool] = []  # which questions of the exam, if this evaluation asked them
        if data.replies:
            self.measures.append(Measure("forget", "forgetting", data.replies, forgotten, needs_first=True))
        if data.split.exam:
            self.measures.append(self.letter_exam(data))
        self.own = run_own(method, "evaluators", data, config) if hasattr(method, "evaluators") else []
        check_measures(self.own, config, method)
        self.measures += self.own
        check_what_decides(self.measures, config, method)
        wanted = [(len(row), row.prompt_length) for measure in self.measures for row in measure.rows]
        if any(other != wanted for other in gather(wanted) if self.own):
            raise UserError(f"evaluators in {name_of(method)} wants other rows on one process than on another")

    def __call__(self, model, step: int, check: Callable[[], None]) -> tuple[dict[str, float], list[Scored]]:
        """(figures by name, the table of the validation rows). check: see `score`."""
        is_last = step == self.config.max_steps
        due = [one for one in self.measures if is_last or step % (one.every or self.config.eval_steps) == 0]
        rows = [row for measure in due for row in measure.rows]
        table = iter(score(model, rows, self.accelerator, check, self.config.per_device_eval_batch_size))
        figures, val, self.right = {}, None, []
        for measure in due:
            part = [*itertools.islice(table, sum(len(row.parts) for row in measure.rows))]
            val = part if val is None else val
            found = self.figures_of(measure, part)
            is_one = not isinstance(found, dict)
            figures |= {measure.name: found} if is_one else {f"{measure.name}/{key}": found[key] for key in found}
        return figures, val

    def letter_exam(self, data: Data) -> Measure:
        """An exam by the likelihood of the letter after a closed block of thinking."""
        exam = data.split.exam
        say(tr("exam: {}", exam))
        prompts = exam_prompts(exam.questions, data.tokenizer, self.config.system_prompt)

        def of(table: list[Scored]) -> dict[str, float]:
            self.right = is_right(exam.questions, table)
            number = len(self.right)
            return {"accuracy": sum(self.right) / number, "questions": number, "guessing": exam.guessing}

        rows = exam_rows(prompts, data.tokenizer)
        return Measure("exam", "exam accuracy", rows, of, every=self.config.exam_steps, higher_is_better=True)

    def figures_of(self, measure: Measure, table: list[Scored]) -> float | dict[str, float]:
        """Raises UserError if a step file's own gives no number."""
        tables = table, *([self.first.setdefault(measure.name, table)] * measure.needs_first)
        if measure not in self.own:
            return measure.of(*tables)
        found = run_own(self.method, f"the measure {measure.name}", *tables, call=measure.of)
        for value in found.values() if isinstance(found, dict) else [found]:
            if not isinstance(value, (int, float)):
                raise UserError(f"the measure {measure.name} gives {value!r}; it gives a number, or a dict of numbers")
        if isinstance(found, dict):
            return {key: float(value) for key, value in found.items()}
        return float(found)


def check_measures(own: list[Measure], config: TrainConfig, method: ModuleType) -> None:
    where = f"evaluators in {name_of(method)}"
    taken = {"eval/best_loss", *(f"eval/{name}" for name in losses([]))}
    others = ("train", "perf", "memory", "format", "best_format", "think_probe", "exam", "forget")
    if not isinstance(own, list) or not all(isinstance(measure, Measure) for measure in own):
        raise UserError(f"{where} returns a list of loop.evaluate.Measure")
    for measure in own:
        is_list = isinstance(measure.rows, Sequence) and all(isinstance(row, Example) for row in measure.rows)
        if not is_list or not all(isinstance(text, str) for text in (measure.name, measure.title)):
            raise UserError(f"{where}: a Measure has two texts and a list of examples, such as those of data.val")
        if (
            "/" not in measure.name.strip("/")
            or measure.name.split("/")[0] in others
            or measure.name in taken
            or measure.name.startswith("eval/loss/")
        ):
            raise UserError(f"{where}: {measure.name!r} cannot be the name of a figure; eval/long_answers can")
        taken.add(measure.name)
        if not isinstance(measure.every, int) or measure.every < 0 or measure.every % config.eval_steps:
            raise UserError(f"{where}: `every` of {measure.name} is no multiple of eval_steps {config.eval_steps}")


def check_what_decides(measures: list[Measure], config: TrainConfig, method: ModuleType) -> None:
    """Raises UserError if the figure that chooses the best model is not measured each time, or better if higher."""
    decides = str(getattr(method, "METRIC_FOR_BEST_MODEL", WEIGHTED))
    for one in measures:
        if decides == one.name or decides.startswith(f"{one.name}/"):
            if one.higher_is_better:
                raise UserError(f"METRIC_FOR_BEST_MODEL {decides!r}: higher is better, and the lowest would be kept")
            if one.every not in (0, config.eval_steps):
                raise UserError(f"METRIC_FOR_BEST_MODEL {decides!r} is not measured at each evaluation")


def losses(table: list[Scored], think_weight: float = 1.0, answer_weight: float = 1.0) -> dict[str, float]:
    """Of the validation rows. weighted_loss: as it is trained, with the weights of thinking and answer."""
    found = {"loss": loss_of(table), "think_loss": loss_of(table, "think"), "answer_loss": loss_of(table, "answer")}
    found |= {f"{part}_accuracy": accuracy_of(table, part) for part in ("think", "answer", "close", "stop")}
    weights = {"think": think_weight, "answer": answer_weight}
    lines = [line for line in table if line.part in weights]
    weighted = total([weights[line.part] * line.loss_sum for line in lines if weights[line.part]])
    found["weighted_loss"] = mean(weighted, sum(line.count for line in lines))
    return found | {"perplexity": perplexity(found["loss"])}


def by_label(table: list[Scored], labels: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """label -> loss of its rows. labels: of each row its set and group."""
    groups: dict[str, list[Scored]] = {}
    for line in table:
        for label in labels.get(line.row, ()):
            groups.setdefault(label, []).append(line)
    return {label: loss_of(lines) for label, lines in sorted(groups.items())}


def think_probe(data: Data, max_length: int) -> list[Measure]:
    """Does the thinking help? The loss of the answers after a row's own thinking, after none, and after the thinking of
    another row. If the answer follows from the thinking, the first is the lowest and the last the highest.

    Each is over the same tokens: the answer without the blank line before it, which after no thinking is in the
    prompt. The first comes with the evaluation; the others cost two more forwards of its rows, of which one is short.
    """
    changed = change_thinking(data.split.val, data.val, data.tokenizer, max_length)
    if not changed:
        say("--think-probe measures nothing: fewer than two validation dialogues think")
        return []

    def of(table: list[Scored]) -> dict[str, float]:
        return {name: loss_of(table, name) for name in changed}

    return [Measure("think_probe", "thinking", [row for rows in changed.values() for row in rows], of)]


def forgotten(table: list[Scored], first: list[Scored]) -> dict[str, float]:
    """How much the loss on replies of the model before training rose, and the standard error. They were drawn from that
    model, so this is an estimate of KL(before || now) for a token, in nats, which forgetting follows (Shenfeld et al.
    2025, arXiv:2509.04259)."""
    kl, error = rise_of(first, table, {"reply": 1.0})
    files = sorted({line.row.rpartition(":")[0] for line in table})
    each = {name: [line for line in table if line.row.startswith(f"{name}:")] for name in files if len(files) > 1}
    by_file = {f"kl/{name}": rise_of(first, each[name], {"reply": 1.0})[0] for name in each}
    return {"kl": kl, "kl_error": error, **by_file}


def is_right(questions: list[Question], table: list[Scored]) -> list[bool]:
    """Whether the likeliest letter of each question is that of the right choice. table: of `exam_rows`."""
    by_row = [table[start : start + len(LETTERS)] for start in range(0, len(table), len(LETTERS))]
    return [
        min(range(len(question.choices)), key=lambda n: lines[n].loss_sum) == question.correct
        for question, lines in zip(questions, by_row, strict=True)
    ]


def rise_of(before: list[Scored], after: list[Scored], weights: dict[str, float]) -> tuple[float, float]:
    """(how much the mean loss of a target rose, its standard error), both in nats, over rows that are in both tables.

    The rows are drawn together, their targets are not: the error is that of a ratio of sums over rows (Cochran 1977,
    section 6.4). NaN for fewer than two rows.
    """
    sums: dict[str, list[float]] = {}
    common = {line.row for line in before} & {line.row for line in after}
    for sign, table in ((-1, before), (1, after)):
        for line in table:
            if line.part in weights and line.row in common:
                row = sums.setdefault(line.row, [0.0, 0.0])
                row[0] += sign * weights[line.part] * line.loss_sum
                row[1] += line.count / 2
    count = total([count for _, count in sums.values()])
    rise = mean(total([difference for difference, _ in sums.values()]), count)
    rests = [(difference - rise * count) ** 2 for difference, count in sums.values()]
    return rise, math.sqrt(total(rests) * len(sums) / (len(sums) - 1)) / count if len(sums) > 1 else math.nan
