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
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.base.console import tool, visible
from data.base.errors import UserError
from data.base.files import write_lines
from data.base.language import speak, tr
from data.contexts import in_context
from data.encode import Example, encode_rows
from data.reading.rows import Row
from loop.record.run_folder import read_run
from loop.score import Scored, loss_of, score
from model.qwen3 import load_tokenizer
from model.tiny import TINY
from tools.shared.runs import accelerator_of, load_to_score, read_side

SUSPECT = 3.5  # deviations from the median, above which a row stands out (Iglewicz and Hoaglin 1993)
PARTS = ("think", "answer")


def study(run_dir: Path, base: str | None) -> list[dict]:
    """A line for each row, the most suspect first. base: the model before training, if not the run's own."""
    run, best = read_run(run_dir), run_dir / "best"
    if not best.is_dir():
        raise UserError(f"{run_dir} has no best/ yet; it comes with the first evaluation")
    of_sides = {side: read_side(run_dir, side) for side in ("train", "val", "test")}
    rows = [row for part in of_sides.values() for row in part]
    sides = [side for side, part in of_sides.items() for _ in part]
    if len(rows) < 2:
        raise UserError(f"{run_dir}/data has fewer than two rows")
    accelerator, tokenizer, name = accelerator_of(run), load_tokenizer(str(best)), base or run["model"]
    asked = [row.messages[-2]["content"] for row in rows]
    others = asked[len(asked) // 2 :] + asked[: len(asked) // 2]

    model = load_to_score(str(best), run, tokenizer, accelerator)
    after = losses_of(of_sides, tokenizer, run, model, accelerator, tr("best, own question"))

    def last_turn(**context) -> dict[str, list]:
        """think and answer -> of each row the loss of its last turn in a context."""
        examples = in_context(rows, tokenizer, run["max_length"], **context)
        table = with_bar(model, examples, accelerator, tr("best, other contexts"))
        return {part: by_row(table, part, map(str, range(len(rows)))) for part in PARTS}

    here = after if all(len(row.asked) == 1 for row in rows) else last_turn()
    apart, apart_silent = last_turn(questions=others), last_turn(thinking=False, questions=others)
    own_silent = last_turn(thinking=False)
    own = tokenizer if name in TINY else load_tokenizer(name)
    model = load_to_score(name, run, own, accelerator)
    before = losses_of(of_sides, own, run, model, accelerator, tr("before training"))

    follows = [other - own for other, own in zip(apart_silent["answer"], own_silent["answer"], strict=True)]
    signs = (
        beyond(here["think"], apart["think"]),
        beyond(here["answer"], apart_silent["answer"]),
        [-gain for gain in follows],
    )
    suspects = map(max, *(standard(sign, sides) for sign in signs))
    lines = [
        {
            "location": row.location,
            "side": side,
            "suspect": suspect,
            "follows": follows[n],
            "before": {part: losses[n] for part, losses in before.items()},
            "after": {part: losses[n] for part, losses in after.items()},
            "question": asked[n],
            "answer": row.messages[-1]["content"],
            "columns": row.columns,
        }
        for n, (side, row, suspect) in enumerate(zip(sides, rows, suspects, strict=True))
    ]
    return sorted(lines, key=lambda line: -line["suspect"])


def losses_of(of_sides: dict[str, list[Row]], tokenizer, run: dict, model, accelerator, what: str) -> dict[str, list]:
    """think and answer -> of each row its loss as the run evaluates it, None without such a target. A row that is too
    long for the run is scored as it is."""
    table = []
    for rows in of_sides.values():
        examples, _ = encode_rows(rows, tokenizer, run["max_length"], "truncate")
        kept = {example.location for example in examples}
        left = [row for row in rows if row.location not in kept]
        places = {str(number): row.location for number, row in enumerate(left)}
        long = in_context(left, tokenizer, run["max_length"])
        examples += [replace(example, location=places[example.location]) for example in long]
        table += with_bar(model, examples, accelerator, what)
    places = [row.location for rows in of_sides.values() for row in rows]
    return {part: by_row(table, part, places) for part in PARTS}


def with_bar(model, examples: list[Example], accelerator, what: str) -> list[Scored]:
    with tqdm(desc=what, disable=None) as bar:
        return score(model, examples, accelerator, check=bar.update)


def by_row(table: list[Scored], part: str, places: Iterable[str]) -> list[float | None]:
    """The loss of a part of each row; None for a row that has none."""
    lines: dict[str, list[Scored]] = {}
    for line in table:
        lines.setdefault(line.row, []).append(line)
    losses = (loss_of(lines.get(place, ()), part) for place in places)
    return [loss if loss == loss else None for loss in losses]


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


@tool("rows")
def main() -> None:
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


if __name__ == "__main__":
    main()
