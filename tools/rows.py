"""Which rows are wrong? The loss of every row of a run before and after training, and whether its answer follows.

    python -m tools.rows RUN_DIR [--worst 10] [--suspects N]

RUN_DIR/rows.jsonl gets all rows, the most suspect first, with these figures, in nats per token:

before, after  loss of thinking and answer, of the model before training and of best/
follows        how much less the answer costs after its own question than after another row's, both without thinking
suspect        the worst of three signs, in standard deviations from the median: the thinking, or the answer, costs more
               than the same text after another row's question lets expect; the answer does not follow

--suspects N writes the first N to RUN_DIR/suspects.jsonl: `train.py --exclude RUN_DIR/suspects.jsonl` trains without
them. A model that was trained for too long knows its wrong rows by heart; look at a run that ends where it turns.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.base.console import run_tool, visible
from data.base.errors import UserError
from data.base.files import write_lines
from data.base.language import speak, tr
from data.batches import Collated, rank_rows
from data.encode import Example, encode_turns, shorten_thinking
from data.reading.rows import Row
from loop.evaluate import LossOfGroups, evaluate
from loop.record.run_folder import read_run
from model.generate import fast_dtype
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer
from tools.reports.record import read_side

SUSPECT = 3.5  # deviations from the median, above which a row stands out (Iglewicz and Hoaglin 1993)
TOKENS = 2048  # laid end to end in one forward


class Losses(NamedTuple):
    """Of each row, nats per token."""

    think: list[float | None]
    answer: list[float]


def load(name: str, run: dict, tokenizer, device: torch.device) -> SFTModel:
    """A model as it evaluates; `tiny` as it was before the run trained it."""
    set_seed(run["seed"])
    dtype = torch.float32 if name == "tiny" else fast_dtype(device)
    causal_lm = load_model(name, tokenizer, gradient_checkpointing=False, dtype=dtype)
    return SFTModel(causal_lm, loss_chunk=1024).to(device)


def losses_of(model: SFTModel, rows: list[Example], accelerator: Accelerator, what: str = "") -> Losses:
    """Of rows that each have a place of their own. what: shown beside a bar."""
    groups = rank_rows(rows, batch_size=1, micro_batch_tokens=TOKENS)
    labels = [
        [
            ((f"{row.location}/{part}",), count)
            for row in group
            for part, count in (("think", row.num_think_targets), ("answer", row.num_answer_targets))
        ]
        for group in groups
    ]
    parts = LossOfGroups(labels)
    with tqdm(total=len(groups), desc=what, disable=None if what else True) as bar:
        evaluate(model, Collated(groups), accelerator, check=bar.update, each=parts.add)
    means = parts.means()
    thinks = [means[f"{row.location}/think"] if row.num_think_targets else None for row in rows]
    return Losses(thinks, [means[f"{row.location}/answer"] for row in rows])


class Contexts:
    """The last turn of each row after its own question and thinking, and after other ones."""

    def __init__(self, rows: list[Row], tokenizer, max_length: int):
        self.rows, self.tokenizer, self.max_length = rows, tokenizer, max_length

    def encode(self, questions: list[str] | None = None, thinking: bool = True) -> list[Example]:
        turns = []
        for number, row in enumerate(self.rows):
            *before, asked, reply = row.messages
            if questions:
                before, asked = before[: len(before) % 2], {**asked, "content": questions[number]}
            if not thinking:
                reply = {name: value for name, value in reply.items() if name != "reasoning_content"}
            turns.append((str(number), [*before, asked, reply]))
        return [self.fitting(*pair) for pair in zip(turns, encode_turns(turns, self.tokenizer), strict=True)]

    def fitting(self, turn: tuple[str, list[dict]], row: Example) -> Example:
        """With its thinking shortened, as in training. A row that is too long without it stays as it is."""
        if len(row) <= self.max_length or not row.num_think_targets:
            return row
        return shorten_thinking(*turn, row, self.tokenizer, self.max_length) or row


def study(run_dir: Path, base: str | None) -> list[dict]:
    """A line for each row, the most suspect first. base: the model before training, if not the run's own."""
    run, best = read_run(run_dir), run_dir / "best"
    if not best.is_dir():
        raise UserError(f"{run_dir} has no best/ yet; it comes with the first evaluation")
    rows = [(side, row) for side in ("train", "val", "test") for row in read_side(run_dir, side)]
    if len(rows) < 2:
        raise UserError(f"{run_dir}/data has fewer than two rows")
    dialogues = [row for _, row in rows]
    accelerator, own, name = Accelerator(), load_tokenizer(str(best)), base or run["model"]
    tokenizer = own if name == "tiny" else load_tokenizer(name)
    asked = [row.messages[-2]["content"] for row in dialogues]
    others = asked[len(asked) // 2 :] + asked[: len(asked) // 2]

    contexts = Contexts(dialogues, own, run["max_length"])
    model = load(str(best), run, own, accelerator.device)
    after = losses_of(model, contexts.encode(), accelerator, "best, own question")
    apart = losses_of(model, contexts.encode(others), accelerator, "best, other question")
    after_silent = losses_of(model, contexts.encode(thinking=False), accelerator, "best, own question, no thinking")
    apart_silent = losses_of(model, contexts.encode(others, False), accelerator, "best, other question, no thinking")
    model = load(name, run, tokenizer, accelerator.device)
    before = losses_of(
        model, Contexts(dialogues, tokenizer, run["max_length"]).encode(), accelerator, "before training"
    )
    sides = [side for side, _ in rows]
    follows = [other - own for other, own in zip(apart_silent.answer, after_silent.answer, strict=True)]
    signs = (
        beyond(after.think, apart.think),
        beyond(after.answer, apart_silent.answer),
        [-gain for gain in follows],
    )
    suspects = map(max, *(standard(sign, sides) for sign in signs))

    lines = [
        {
            "location": row.location,
            "side": side,
            "suspect": suspect,
            "follows": follows[n],
            "before": {"think": before.think[n], "answer": before.answer[n]},
            "after": {"think": after.think[n], "answer": after.answer[n]},
            "question": asked[n],
            "answer": row.messages[-1]["content"],
            "columns": row.columns,
        }
        for n, ((side, row), suspect) in enumerate(zip(rows, suspects, strict=True))
    ]
    return sorted(lines, key=lambda line: -line["suspect"])


def beyond(losses: list[float | None], elsewhere: list[float | None]) -> list[float | None]:
    """How much each loss is above the line through all of (elsewhere, losses): a text that is hard anywhere is no
    suspect. None for a row without a loss."""
    known = [n for n, loss in enumerate(losses) if loss is not None]
    xs, ys = [elsewhere[n] for n in known], [losses[n] for n in known]
    if len(set(xs)) < 2:
        return [None if loss is None else 0.0 for loss in losses]
    line = statistics.linear_regression(xs, ys)
    return [None if y is None else y - line.slope * x - line.intercept for x, y in zip(elsewhere, losses, strict=True)]


def standard(values: list[float | None], sides: list[str]) -> list[float]:
    """In standard deviations from the median of the same side, because rows that were trained cost less than held-out
    ones. The deviations are estimated from the median too, so that wrong rows do not hide each other. -inf without a
    value, 0 if there are too few to tell."""
    found = [-math.inf] * len(values)
    for side in set(sides):
        known = [n for n, value in enumerate(values) if sides[n] == side and value is not None]
        middle = statistics.median(values[n] for n in known) if known else 0.0
        deviation = 1.4826 * statistics.median(abs(values[n] - middle) for n in known) if known else 0.0
        for n in known:
            found[n] = (values[n] - middle) / deviation if deviation else 0.0
    return found


def learned(line: dict) -> float:
    """How much less the answer costs after training; below 0 the row was forgotten."""
    return line["before"]["answer"] - line["after"]["answer"]


def is_learned(line: dict) -> bool:
    """Whether the answer costs clearly less than before training. Of a row that was not learned a high loss says
    nothing but that."""
    return line["after"]["answer"] < 0.8 * line["before"]["answer"]


def show(lines: list[dict], number: int) -> None:
    console = Console(markup=False, emoji=False, highlight=False)
    new = sum(not is_learned(line) for line in lines)
    if 2 * new > len(lines):
        console.print(
            tr("the model has not learned {} of these {} rows: what stands out may only be new to it", new, len(lines)),
            style="yellow",
        )
    suspects = [line for line in lines if line["suspect"] >= SUSPECT and is_learned(line)]
    tables = {
        tr("stand out by {} deviations and more: does the answer belong to its question?", SUSPECT): suspects,
        tr("hardest after training"): sorted(lines, key=lambda line: -line["after"]["answer"]),
        tr("forgotten: the answer costs more than before training"): sorted(
            (line for line in lines if learned(line) < 0), key=learned
        ),
    }
    for title, chosen in tables.items():
        if not chosen:
            console.print(f"{title}: {tr('none')}")
            continue
        table = Table(title=title, title_justify="left", expand=True)
        for name in ("row", "suspect", "before", "after", "question", "answer"):
            is_text = name in ("row", "question", "answer")
            width = {"min_width": 14, "ratio": 1} if name in ("question", "answer") else {}
            table.add_column(
                tr(name), justify="left" if is_text else "right", no_wrap=True, overflow="ellipsis", **width
            )
        for line in chosen[:number]:
            figures = (line["suspect"], line["before"]["answer"], line["after"]["answer"])
            texts = (visible(" ".join(line[name].split())[:40]) for name in ("question", "answer"))
            table.add_row(line["location"].replace(".jsonl", ""), *(f"{figure:.2f}" for figure in figures), *texts)
        console.print(table)
    console.print(
        tr("suspect: deviations from the median; before, after: loss of the answer, nats a token"), style="dim"
    )


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--base", help="the model before training, if it is no longer where the run found it")
    parser.add_argument("--worst", type=int, default=10, help="rows to show of each kind")
    parser.add_argument("--suspects", type=int, default=0, metavar="N", help="write the N most suspect rows")
    args = parser.parse_args()
    if args.worst < 1 or args.suspects < 0:
        parser.error("--worst is at least 1 and --suspects at least 0")
    disable_progress_bar()
    speak(read_run(args.run_dir).get("language", "en"))
    lines = study(args.run_dir, args.base)
    write_lines(
        args.run_dir / "rows.jsonl", (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    )
    show(lines, args.worst)
    print(tr("all {} rows: {}", len(lines), args.run_dir / "rows.jsonl"))
    if args.suspects >= len(lines):
        raise UserError(tr("--suspects {}: there are only {} rows, so none would be left", args.suspects, len(lines)))
    if args.suspects:
        path = args.run_dir / "suspects.jsonl"
        write_lines(
            path,
            (json.dumps(line["columns"], ensure_ascii=False, default=str) + "\n" for line in lines[: args.suspects]),
        )
        print(tr("train without the first {}: --exclude {}", args.suspects, path))


def main() -> None:
    run_tool("rows", run)


if __name__ == "__main__":
    main()
