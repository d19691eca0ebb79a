"""Multiple choice: what share of an exam's questions models know, and whether two of them differ.

    python -m tools.exam MODEL [MODEL ...] --exam FILE [FILE ...] [--think]

The answer is the letter of the highest likelihood after a closed block of thinking: an empty one, or with --think the
model's own. Each question's choices stand in an order drawn for it, the same for every model, so a preference for "A"
is worth no more than a guess. Files are CSV or JSON with the columns of CMMLU, C-Eval, CMB or CMExam.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from data.batches import collate, pack
from data.encode import Example, token_ids
from data.errors import UserError
from data.read import read_file
from data.source import find_source
from data.template import CLOSE, OPEN, generation_prompt, opens_block
from loop.console import prepare_terminal
from loop.distributed import to_device
from loop.files import write_text
from model.export import system_prompt_of
from model.generate import fast_dtype, load_for_generation, reply_to
from model.qwen3 import find_model, load_model, load_tokenizer

LETTERS = "ABCDEFGH"
ASK = "请直接给出正确选项的字母。"
TOKENS = 2048  # laid end to end in one forward


class Question(NamedTuple):
    subject: str
    text: str
    choices: tuple[str, ...]  # in the order in which they are asked
    correct: int  # index of the right one

    @property
    def asked(self) -> str:
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return "\n".join([self.text, *choices, ASK])


class Score(NamedTuple):
    right: int
    number: int

    @property
    def accuracy(self) -> float:
        return self.right / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 % (Wilson 1927)."""
        z, n, p = 1.96, self.number, self.accuracy
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def read_exam(names: list[str]) -> tuple[list[Question], int]:
    """The questions with one right choice, and how many were left out. Raises UserError if a file has none."""
    questions, left_out = [], 0
    for name in names:
        source, before = find_source(name), len(questions)
        for path in source.files:
            for _, columns in read_file(path, path.name, source.part, []):
                question = read_question(columns, path.stem) if isinstance(columns, dict) else None
                if question:
                    questions.append(question)
                else:
                    left_out += 1
        if len(questions) == before:
            raise UserError(
                f"{name} has no question with choices and one right letter; columns of CMMLU, C-Eval, CMB and CMExam "
                "are known: question, A to D or option, answer"
            )
    return questions, left_out


def read_question(columns: dict, stem: str) -> Question | None:
    """None if it has no text, fewer than two choices, or not exactly one right one."""
    cells = {str(name).strip().lower(): value for name, value in columns.items() if value is not None}
    choices = choices_of(cells)
    letter = str(cells.get("answer", "")).strip().upper()
    text = str(cells.get("question", "")).strip()
    if not text or len(choices) < 2 or letter not in choices:
        return None
    order = sorted(choices)
    random.Random(f"{text}{order}").shuffle(order)
    subject = next((str(cells[name]) for name in ("subject", "exam_subject", "exam_class") if cells.get(name)), stem)
    return Question(subject, text, tuple(choices[name] for name in order), order.index(letter))


def choices_of(cells: dict) -> dict[str, str]:
    """letter -> text, from columns of their own, an object, pairs, or lines that begin with the letter."""
    own = {letter: str(cells[letter.lower()]).strip() for letter in LETTERS if letter.lower() in cells}
    options = cells.get("option", cells.get("options", cells.get("choices", own)))
    if isinstance(options, str):
        options = dict(re.findall(r"^\s*([A-H])[\s.、．:：)）]\s*(.*?)\s*$", options, re.MULTILINE))
    elif isinstance(options, list):
        pairs = [(o.get("key", o.get("label")), o.get("value", o.get("text"))) for o in options if isinstance(o, dict)]
        options = dict(pairs) if pairs else dict(zip(LETTERS, options, strict=False))
    if not isinstance(options, dict):
        return {}
    return {str(letter).strip().upper(): str(text).strip() for letter, text in options.items() if str(text).strip()}


@torch.no_grad()
def letter_likelihoods(causal_lm, tokenizer, prompts: list[str], device: torch.device) -> list[list[float]]:
    """Of each prompt the log-likelihood of each letter as the next token. Prompts are laid end to end."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    rows = [
        Example(torch.tensor(ids), len(ids), len(ids), str(i)) for i, ids in enumerate(token_ids(prompts, tokenizer))
    ]
    found: dict[str, list[float]] = {}
    for group in pack(rows, 1, TOKENS):
        inputs = to_device(collate(group).inputs, device)
        names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
        hidden = causal_lm.model(**{name: inputs[name] for name in names}, use_cache=False).last_hidden_state[0]
        logits = causal_lm.lm_head(hidden[inputs["cu_seqlens"][1:].long() - 1]).float()
        values = logits.log_softmax(-1)[:, letters].tolist()
        found |= {row.location: value for row, value in zip(group, values, strict=True)}
    return [found[row.location] for row in rows]


def take(name: str, questions: list[Question], think: bool, max_new_tokens: int, device: torch.device) -> list[bool]:
    """Which questions a model answers right."""
    tokenizer = load_tokenizer(name)
    system = system_prompt_of(find_model(name))
    opening = [{"role": "system", "content": system}] if system else []
    dialogues = [[*opening, {"role": "user", "content": question.asked}] for question in questions]
    prompts = [generation_prompt(dialogue, tokenizer, thinking=think) for dialogue in dialogues]
    if think:
        causal_lm, _ = load_for_generation(name, device)
        replies = reply_to(causal_lm, tokenizer, prompts, max_new_tokens)
        prompts = [
            prompt + ("" if opens_block(prompt) else OPEN) + reply.think + CLOSE
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
    causal_lm = load_model(name, tokenizer, gradient_checkpointing=False, dtype=fast_dtype(device)).to(device).eval()
    likelihoods = letter_likelihoods(causal_lm, tokenizer, prompts, device)
    return [
        max(range(len(question.choices)), key=values.__getitem__) == question.correct
        for question, values in zip(questions, likelihoods, strict=True)
    ]


def mcnemar(ours: list[bool], theirs: list[bool]) -> float:
    """The exact two-sided p of McNemar's test: how likely it is that the questions which only one of two equal models
    answered right are shared out at least as unevenly."""
    better = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    worse = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2 ** (better + worse))


def scores_of(questions: list[Question], right: list[bool]) -> dict[str, Score]:
    """Of each subject, and of all."""
    scores = {}
    for question, is_right in zip(questions, right, strict=True):
        for subject in (question.subject, "all"):
            score = scores.get(subject, Score(0, 0))
            scores[subject] = Score(score.right + is_right, score.number + 1)
    return {subject: scores[subject] for subject in [*sorted(scores.keys() - {"all"}), "all"]}


def show(models: list[str], results: list[dict[str, Score]], p: float | None) -> None:
    table = Table()
    for title in ("subject", "questions", *(Path(model).name for model in models)):
        table.add_column(title, justify="left" if title == "subject" else "right", overflow="fold")
    for subject, first in results[0].items():
        cells = []
        for scores in results:
            low, high = scores[subject].interval
            cells.append(f"{scores[subject].accuracy:.1%} ({low:.1%}-{high:.1%})")
        table.add_row(subject, str(first.number), *cells)
    console = Console()
    console.print(table)
    if p is not None:
        console.print(f"McNemar's test of the two on the same questions: p = {p:.3f}")


def main() -> None:
    prepare_terminal()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a local folder or a ModelScope id")
    parser.add_argument("--exam", nargs="+", required=True, metavar="FILE", help="files or folders of questions")
    parser.add_argument("--think", action="store_true", help="the model thinks before it answers, which takes long")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest thinking")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens is at least 1")
    disable_progress_bar()
    try:
        questions, left_out = read_exam(args.exam)
        print(f"{len(questions):,} questions; {left_out:,} without choices or one right letter left out")
        device = Accelerator().device
        right = [take(model, questions, args.think, args.max_new_tokens, device) for model in args.models]
        results = [scores_of(questions, answers) for answers in right]
        p = mcnemar(*right) if len(right) == 2 else None
        show(args.models, results, p)
        if args.out:
            figures = {model: {subject: score._asdict() for subject, score in scores.items()}
                       for model, scores in zip(args.models, results, strict=True)}  # fmt: skip
            write_text(args.out, json.dumps({"models": figures, "p": p}, ensure_ascii=False, indent=2) + "\n")
    except (UserError, OSError) as error:
        raise SystemExit(f"tools.exam: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
