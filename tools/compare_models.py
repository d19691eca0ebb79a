"""Two models on the same held-out rows: python -m tools.compare_models BASE RUN_DIR/best

Perplexity by part; ROUGE-L, BLEU and keywords of the answers; format rates; answers side by side.
Unless --dataset and --out say otherwise, the rows are RUN_DIR/data/test.jsonl and the figures go to RUN_DIR/compare.
"""

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data.base.console import tool, visible
from data.base.errors import UserError, cannot_import
from data.base.files import write_text
from data.base.language import speak, tr
from data.encode import Example, encode_rows, turns_of
from data.reading.formats import Given
from data.reading.rows import Row, read_given
from loop.evaluate import losses
from loop.record.run_folder import read_run
from loop.samples import prompts
from loop.score import perplexity, score
from model.export import system_prompt_of
from model.generate import BATCH, Reply, format_rates, load_for_generation, reply_to
from model.qwen3 import find_model, load_tokenizer
from tools.reports.pages import TEMPLATES
from tools.shared.answers import keyword_overlap, overlap
from tools.shared.runs import accelerator_of, load_to_score, name_of, read_rows, run_of

# name in the JSON -> what it is; * where lower is better
MEASURES = {
    "loss": "loss, nats per token *",
    "perplexity": "perplexity *",
    "think_perplexity": "perplexity of the thinking *",
    "answer_perplexity": "perplexity of the answer *",
    "think_accuracy": "next-token accuracy, thinking",
    "answer_accuracy": "next-token accuracy, answer",
    "rouge_l": "ROUGE-L of the answers, characters",
    "bleu": "BLEU of the answers, characters",
    "keyword_recall": "keywords of the reference found",
    "keyword_precision": "answer's keywords in the reference",
    "closed": "thinking closed",
    "answered": "answered",
    "stopped": "stopped by itself",
    "empty_think": "thinking left empty *",
}
LOWER = "* lower is better"


@tool("compare_models")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, metavar="MODEL", help="a local folder or a hub id; the base first")
    parser.add_argument(
        "--dataset", help="rows that neither was trained on; default: the run's data/test.jsonl (--test-fraction)"
    )
    parser.add_argument("--num-rows", type=int, default=32, help="rows to answer; the loss is that of all rows")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer, thinking included")
    parser.add_argument("--max-length", type=int, help="longest row in tokens; default: as the run has it")
    parser.add_argument(
        "--system", help="system prompt of rows without a system message; default: the one of the second model"
    )
    parser.add_argument("--out", type=Path, help="folder for compare.json and compare.md; default: RUN_DIR/compare")
    args = parser.parse_args()
    if args.num_rows < 1 or args.max_new_tokens < 1:
        parser.error("--num-rows and --max-new-tokens are at least 1")
    try:
        import jieba  # noqa: F401
        from rouge_score import rouge_scorer  # noqa: F401
        from sacrebleu import corpus_bleu  # noqa: F401
    except ImportError as error:
        package = error.name if error.name in ("jieba", "sacrebleu") else "rouge_score"
        raise cannot_import(error, package, "compare") from None
    args.dataset, args.out, given = places(args)
    if (args.out / "compare.json").exists():
        raise SystemExit(f"tools.compare_models: {args.out} holds a comparison already; name another folder with --out")
    disable_progress_bar()
    _, tuned = map(find_model, args.models)
    system = system_prompt_of(tuned) if args.system is None else args.system
    rows = read_rows(args.dataset, system, given)
    if not rows:
        raise UserError(f"{args.dataset} has no rows")
    args.out.mkdir(parents=True, exist_ok=True)
    asked = rows[: args.num_rows]
    run = next(filter(None, map(run_of, args.models[::-1])), {})
    speak(run.get("language", "en"))
    examples, left_out = same_rows(args.models, rows, args.max_length or run.get("max_length", 2048), run)
    shown = {name: name_of(name) for name in args.models}
    shown = shown if len(set(shown.values())) == len(shown) else {name: name for name in args.models}
    results = []
    for name in args.models:
        figures = figures_of(name, examples[name], run)
        model, tokenizer = load_for_generation(name, accelerator_of(run).device)
        replies = answer(model, tokenizer, asked, args.max_new_tokens, Path(name).name)
        answers = [reply.answer for reply in replies]
        references = [row.messages[-1]["content"] for row in asked]
        figures |= overlap(answers, references) | keyword_overlap(answers, references) | format_rates(replies)
        figures = {key: None if math.isnan(value) else value for key, value in figures.items()}  # NaN is no JSON
        results.append({"model": shown[name], **figures, "replies": [reply._asdict() for reply in replies]})
    questions = [{"question": row.messages[-2]["content"], "reference": row.messages[-1]["content"]} for row in asked]
    report = {"dataset": args.dataset, "rows": len(rows) - left_out, "left_out": left_out, "models": results}
    report["questions"] = questions
    write_text(args.out / "compare.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    page = TEMPLATES.get_template("compare.md").render(report, table=table_rows(report), note=tr(LOWER), tr=tr)
    write_text(args.out / "compare.md", page)
    show(report)
    if left_out:
        print(tr("{} rows are too long for one of the models and left out for both", left_out))
    print(tr("answers side by side: {}", args.out / "compare.md"))


def places(args: argparse.Namespace) -> tuple[str, Path, Given]:
    """The rows and the folder for what is written, where the command line does not name them: those of the run whose
    best/ one of the models is, the second one first; and which column is which in its rows."""
    runs = [folder for model in reversed(args.models) if is_run(folder := Path(os.path.abspath(model)).parent)]
    runs = [Path(os.path.relpath(folder)) for folder in runs]  # the folders above are private
    tested = next((run for run in runs if (run / "data" / "test.jsonl").exists()), None)
    if args.dataset is None and tested is None:
        raise UserError(
            "name rows that neither model was trained on with --dataset: a run with --test-fraction 0.1 keeps "
            "data/test.jsonl; data/val.jsonl chose the best model, which favours it there"
        )
    if args.out is None and not runs:
        raise UserError("neither model is the best/ of a run: name a folder for the figures with --out")
    own = next((run for run in runs if Path(args.dataset or "").resolve().parent == (run / "data").resolve()), tested)
    given = read_given(read_run(own).get("columns", ())) if own else ()
    return args.dataset or str(tested / "data" / "test.jsonl"), args.out or runs[0] / "compare", given


def is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def answer(model, tokenizer, rows: list[Row], max_new_tokens: int, name: str) -> list[Reply]:
    """Greedy replies, with a bar on a terminal."""
    asked, replies = prompts(rows, tokenizer), []
    with tqdm(total=len(asked), desc=name, unit="answer", disable=None) as bar:
        for start in range(0, len(asked), BATCH):
            replies += reply_to(model, tokenizer, asked[start : start + BATCH], max_new_tokens)
            bar.update(len(replies) - bar.n)
    return replies


def same_rows(models: list[str], rows: list[Row], max_length: int, run: dict) -> tuple[dict[str, list[Example]], int]:
    """(model -> its Examples, rows left out): the rows that all models can take, too long ones as in the run."""
    encoded, turns = {}, Counter(location for location, _ in turns_of(rows))
    for name in models:
        encoded[name], _ = encode_rows(rows, load_tokenizer(name), max_length, run.get("overlong", "truncate"))
    counts = [Counter(example.location for example in examples) for examples in encoded.values()]
    kept = {location for location, number in turns.items() if all(count[location] == number for count in counts)}
    if not kept:
        raise UserError(f"no row has at most {max_length} tokens; raise --max-length")
    return {name: [e for e in examples if e.location in kept] for name, examples in encoded.items()}, len(rows) - len(
        kept
    )


def figures_of(name: str, examples: list[Example], run: dict) -> dict[str, float]:
    """Those of a run's evaluation, in its precision."""
    accelerator = accelerator_of(run)
    figures = losses(score(load_to_score(name, run, load_tokenizer(name), accelerator), examples, accelerator))
    return figures | {f"{part}_perplexity": perplexity(figures[f"{part}_loss"]) for part in ("think", "answer")}


def table_rows(report: dict) -> list[tuple[str, str, str, str]]:
    """Measure, first model, second model, difference."""
    a, b = report["models"]
    return [
        (tr(label), "-", "-", "-")
        if None in (a[key], b[key])
        else (tr(label), f"{a[key]:.4f}", f"{b[key]:.4f}", f"{b[key] - a[key]:+.4f}")
        for key, label in MEASURES.items()
    ]


def show(report: dict) -> None:
    table = Table(title=tr("{} rows of {}", report["rows"], visible(report["dataset"])))
    for index, title in enumerate(["", *(model["model"] for model in report["models"]), tr("difference")]):
        table.add_column(
            visible(title), justify="right" if index else "left", overflow="fold", no_wrap=not index, min_width=8
        )
    for row in table_rows(report):
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(tr(LOWER))


if __name__ == "__main__":
    main()
