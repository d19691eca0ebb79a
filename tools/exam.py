"""Multiple choice: what share of an exam's questions models know, and whether two of them differ.

    python -m tools.exam MODEL [MODEL ...] --exam FILE [FILE ...] [--think]

The answer is the letter of the highest likelihood after a closed block of thinking: an empty one, or with --think the
model's own, and all models get the same system prompt, unless --own-prompt is there. Of two models the table shows the
questions that the second one lost and won. Each question's choices stand in an order drawn for it, the same
for every model, so a preference for "A" is worth no more than a guess. Files are CSV, JSON or parquet in the form of
CMMLU, C-Eval, CMB, CMExam, MedQA, MedMCQA and others alike.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.base.console import tool, visible
from data.base.files import write_json
from data.base.language import speak, tr
from data.contexts import exam_prompts, exam_rows
from data.reading.choices import Question
from data.reading.exam import read_exam
from data.template import CLOSE, OPEN, opens_block
from loop.evaluate import is_right
from loop.score import score
from model.export import system_prompt_of
from model.generate import chat_tokenizer, load_for_generation, reply_to
from model.qwen3 import find_model
from tools.shared.answers import changes_by_subject
from tools.shared.runs import accelerator_of, load_to_score, name_of, run_of


class Score(NamedTuple):
    right: int
    number: int

    @property
    def accuracy(self) -> float:
        return self.right / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 % (Wilson 1927)."""
        return tuple(binomtest(self.right, self.number).proportion_ci(method="wilson"))


def take_exam(name: str, questions: list[Question], system: str, run: dict, max_new_tokens: int = 0) -> list[bool]:
    """Which questions a model answers right, after a system prompt. run: in whose precision; max_new_tokens: of its
    thinking, 0 for none."""
    # Its own tokenizer: a model that does not think is asked without a block.
    tokenizer, accelerator = chat_tokenizer(name), accelerator_of(run)
    prompts = exam_prompts(questions, tokenizer, system, max_new_tokens > 0)
    if max_new_tokens:
        causal_lm, _ = load_for_generation(name, accelerator.device)
        replies = reply_to(causal_lm, tokenizer, prompts, max_new_tokens)
        prompts = [
            prompt + ("" if opens_block(prompt) else OPEN) + reply.think + CLOSE
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
    model = load_to_score(name, run, tokenizer, accelerator)
    with tqdm(desc=Path(name).name, disable=None) as bar:
        return is_right(questions, score(model, exam_rows(prompts, tokenizer), accelerator, check=bar.update))


def mcnemar(ours: list[bool], theirs: list[bool]) -> float:
    """The exact two-sided p of McNemar's test: how likely it is that the questions which only one of two equal models
    answered right are shared out at least as unevenly."""
    better = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    worse = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return binomtest(better, better + worse).pvalue if better + worse else 1.0


def scores_of(questions: list[Question], right: list[bool]) -> dict[str, Score]:
    """Of each subject, and of all."""
    scores = {}
    for question, is_one in zip(questions, right, strict=True):
        for subject in (question.subject, "all"):
            score = scores.get(subject, Score(0, 0))
            scores[subject] = Score(score.right + is_one, score.number + 1)
    return {subject: scores[subject] for subject in [*sorted(scores.keys() - {"all"}), "all"]}


def show(models: list[str], results: list[dict[str, Score]], changed: dict, p: float | None, guessing: float) -> None:
    """changed: subject -> Changes, of two models; or empty."""
    table = Table()
    more = (tr("lost"), tr("won"), tr("of each by guessing")) if changed else ()
    for index, title in enumerate((tr("subject"), tr("questions"), *map(name_of, models), *more)):
        table.add_column(title, justify="right" if index else "left", overflow="fold")
    for subject, first in results[0].items():
        cells = []
        for scores in results:
            low, high = scores[subject].interval
            cells.append(f"{scores[subject].accuracy:.1%} ({low:.1%}-{high:.1%})")
        if one := changed.get(subject):
            cells += [str(one.lost), str(one.won), f"{one.by_guessing:.1f}"]
        table.add_row(tr("all") if subject == "all" else visible(subject), str(first.number), *cells)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(tr("a guess: {:.1%}; in brackets the 95 % interval", guessing))
    if p is not None:
        one = changed["all"]
        beyond = (max(0.0, number - one.by_guessing) for number in (one.lost, one.won))
        console.print(tr("beyond guessing: {:.1f} lost, {:.1f} won of {:,}", *beyond, one.number))
        console.print(tr("McNemar's test of the two on the same questions: p = {:.3f}", p))


@tool("exam")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a local folder or a hub id")
    parser.add_argument("--exam", nargs="+", required=True, metavar="FILE", help="files or folders of questions")
    parser.add_argument("--think", action="store_true", help="the model thinks before it answers, which takes long")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest thinking")
    parser.add_argument(
        "--system", help="system prompt, the same for all; default: the first that a model was trained with"
    )
    parser.add_argument(
        "--own-prompt", action="store_true", help="each model gets the one it was trained with, or none"
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if args.own_prompt and args.system is not None:
        parser.error("--system is the same for all, --own-prompt is not: name one of them")
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens is at least 1")
    if args.out and (args.out.exists() or not args.out.absolute().parent.is_dir()):
        parser.error(f"--out {args.out} must be a new file in a folder that exists")
    disable_progress_bar()
    exam = read_exam(args.exam)
    questions, run = exam.questions, next(filter(None, map(run_of, args.models)), {})
    speak(run.get("language", "en"))
    own = [system_prompt_of(find_model(model)) for model in args.models]
    system = next(filter(None, own), "") if args.system is None else args.system
    prompts = own if args.own_prompt else [system] * len(own)
    print(exam)
    for name, prompt in zip(args.models, prompts, strict=True) if args.own_prompt else [("", system)]:
        print(tr("system prompt of {}: {}", name_of(name) if name else tr("all models"), visible(prompt) or "-"))
    right = [take_exam(model, questions, prompt, run, args.max_new_tokens * args.think)
             for model, prompt in zip(args.models, prompts, strict=True)]  # fmt: skip
    results = [scores_of(questions, answers) for answers in right]
    p = mcnemar(*right) if len(right) == 2 else None
    asked = [(question.subject, len(question.choices)) for question in questions]
    changed = changes_by_subject(*right, asked) if len(right) == 2 else {}
    show(args.models, results, changed, p, exam.guessing)
    if args.out:
        figures = {model: {subject: score._asdict() for subject, score in scores.items()}
                   for model, scores in zip(args.models, results, strict=True)}  # fmt: skip
        told = {subject: one._asdict() for subject, one in changed.items()}
        write_json(args.out, {"models": figures, "p": p, "changes": told})


if __name__ == "__main__":
    main()
