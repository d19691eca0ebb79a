"""What an evaluation measures: the loss, and on request what the thinking is worth and an exam."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.base.console import say
from data.base.language import tr
from data.batches import Collated
from data.dataset import Data
from data.encode import Example, encode_turns, render_prompt, shorten_thinking, token_ids, turns_of
from data.exam import collate_exam, exam_prompts, exam_rows
from data.reading.choices import LETTERS, Question
from loop.config import TrainConfig
from loop.evaluate import EvalMetrics, LossOfGroups, evaluate


class Evaluation:
    """Everything that a run measures at an evaluation. All ranks call it."""

    def __init__(self, data: Data, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        counts = data.split.report["val"]
        self.num_targets = counts["think_tokens"], counts["answer_tokens"]
        rows = data.eval_rows(data.val, config)
        self.batches, self.groups = Collated(rows), LossOfGroups(data.labels_of(rows))
        self.probe = ThinkProbe(data, config, rows) if config.think_probe else None
        self.exam = LetterExam(data, config) if data.split.exam else None

    def __call__(self, model, step: int, check: Callable[[], None]) -> tuple[EvalMetrics, dict[str, float]]:
        """The metrics, and more of them by name. check: called before each forward; what it raises ends all of it."""
        watched = [self.groups, self.probe.own] if self.probe else [self.groups]

        def each(index: int, losses: torch.Tensor) -> None:
            for groups in watched:
                groups.add(index, losses)

        metrics = evaluate(model, self.batches, self.accelerator, check, each)
        more = {"eval/weighted_loss": self.weighted(metrics)}
        more |= {f"eval/loss/{label}": loss for label, loss in self.groups.means().items()}
        if self.probe:
            more |= self.probe.losses(model, self.accelerator, check)
        exam_steps = self.config.exam_steps or self.config.eval_steps
        if self.exam and (step % exam_steps == 0 or step == self.config.max_steps):
            more |= self.exam.accuracy(model, self.accelerator, check)
        return metrics, more

    def weighted(self, metrics: EvalMetrics) -> float:
        """The loss as it is trained, with the weights of thinking and answer: the one that chooses the best model."""
        weights = self.config.think_weight, self.config.answer_weight
        if weights == (1, 1):
            return metrics.loss
        losses = metrics.think_loss, metrics.answer_loss
        parts = zip(weights, losses, self.num_targets, strict=True)
        return sum(weight * loss * number for weight, loss, number in parts if weight * number) / sum(self.num_targets)


class ThinkProbe:
    """Does the thinking help? The loss of the answers after a row's own thinking, after none, and after the thinking of
    another row. If the answer follows from the thinking, the first is the lowest and the last the highest.

    Each is over the same tokens: the answer without the blank line before it, which after no thinking is in the
    prompt. The first comes with the evaluation; the others cost two more forwards of its rows, of which one is short.
    """

    def __init__(self, data: Data, config: TrainConfig, groups: list[list[Example]]):
        """groups: `Data.eval_rows` of the validation rows."""
        blank = len(token_ids(["\n\n"], data.tokenizer)[0])
        own = [[part for row in rows for part in own_parts(row, blank)] for rows in groups]
        self.own = LossOfGroups(own)
        changed = change_thinking(data, blank, config.max_length)
        if not changed:
            say("--think-probe measures nothing: fewer than two validation dialogues think")
        self.batches = {name: Collated(data.eval_rows(rows, config)) for name, rows in changed.items()}

    def losses(self, model, accelerator: Accelerator, check: Callable[[], None]) -> dict[str, float]:
        """After an evaluation that `own` has seen. Empty if fewer than two rows think."""
        found = self.own.means() if self.batches else {}
        for name, batches in self.batches.items():
            found[name] = evaluate(model, batches, accelerator, check).answer_loss
        return {f"think_probe/{name}": loss for name, loss in found.items()}


def own_parts(row: Example, blank: int) -> list[tuple[tuple[str, ...], int]]:
    """(labels, number of targets) of what is left out of a row and of what is counted."""
    counted = row.num_answer_targets - blank if row.num_think_targets else 0
    return [((), len(row) - row.prompt_length - counted), (("own",), counted)]


def change_thinking(data: Data, blank: int, max_length: int) -> dict[str, list[Example]]:
    """The validation rows that think, without their thinking (none) and with that of the next one (other), their
    answers alone as targets. Empty if fewer than two rows think."""
    turns = thinking_turns(data)
    none, other = [], []
    for index, (location, messages) in enumerate(turns):
        *before, reply = messages
        none.append((location, [*before, {"role": "assistant", "content": reply["content"]}]))
        others = (said[-1]["reasoning_content"] for place, said in turns[index + 1 :] + turns if place != location)
        thought = next((thought for thought in others if thought != reply["reasoning_content"]), None)
        if thought is None:  # one dialogue alone
            return {}
        other.append((location, [*before, {**reply, "reasoning_content": thought}]))
    other = [
        row if len(row) <= max_length else shorten_thinking(*turn, row, data.tokenizer, max_length) or row
        for turn, row in zip(other, encode_turns(other, data.tokenizer), strict=True)
    ]
    return {
        "none": [answer_alone(row, 0) for row in encode_turns(none, data.tokenizer)],
        "other": [answer_alone(row, blank) for row in other],
    }


def thinking_turns(data: Data) -> list[tuple[str, list[dict]]]:
    """(location, messages up to it) of the turns in data.val that think; a turn that was dropped is in neither."""
    kept = {(row.location, row.prompt_length) for row in data.val if row.num_think_targets}
    turns = [turn for turn in turns_of(data.split.val) if "reasoning_content" in turn[1][-1]]
    prompts = token_ids([render_prompt(messages, data.tokenizer) for _, messages in turns], data.tokenizer)
    return [turn for turn, prompt in zip(turns, prompts, strict=True) if (turn[0], len(prompt)) in kept]


def answer_alone(row: Example, blank: int) -> Example:
    start = row.answer_start + blank
    return Example(row.input_ids, start, start, row.location)


class LetterExam:
    """An exam by the likelihood of the letter after a closed block of thinking."""

    def __init__(self, data: Data, config: TrainConfig):
        self.questions, self.tokenizer = data.split.exam.questions, data.tokenizer
        self.guessing = data.split.exam.guessing
        say(tr("exam: {}", data.split.exam))
        rows = exam_rows(exam_prompts(self.questions, data.tokenizer, config.system_prompt), data.tokenizer)
        self.groups = data.eval_rows(rows, config)

    def accuracy(self, model, accelerator: Accelerator, check: Callable[[], None]) -> dict[str, float]:
        found = letter_likelihoods(model, self.groups, self.tokenizer, accelerator, check)
        right = is_right(self.questions, found)
        return {"exam/accuracy": sum(right) / len(right), "exam/questions": len(right), "exam/guessing": self.guessing}


def letter_likelihoods(
    model, groups: list[list[Example]], tokenizer, accelerator: Accelerator, check=lambda: None
) -> list[list[float]]:
    """Of each prompt the log-likelihood of each letter as the next token, on every rank. model: an SFTModel; groups:
    `exam_rows` as this rank lays them into micro-batches."""
    found = []

    def each(index: int, losses: torch.Tensor) -> None:
        likelihoods = (-losses).view(-1, len(LETTERS)).tolist()
        # A rank short of rows ends with rows of two tokens.
        numbered = zip(groups[index], likelihoods, strict=True)
        found.extend((int(row.location), values) for row, values in numbered if len(row) > 2)

    evaluate(model, [collate_exam(group, tokenizer) for group in groups], accelerator, check, each)
    return [likelihoods for _, likelihoods in sorted(gather_object(found))]


def is_right(questions: list[Question], likelihoods: list[list[float]]) -> list[bool]:
    """Whether the likeliest letter of each question is that of the right choice."""
    return [
        max(range(len(question.choices)), key=values.__getitem__) == question.correct
        for question, values in zip(questions, likelihoods, strict=True)
    ]
