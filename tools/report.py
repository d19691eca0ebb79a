"""report.md and its curves, from what a run has written so far: python -m tools.report RUN_DIR [--language en]"""

import argparse
import json
import math
import statistics
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.errors import UserError
from loop.console import prepare_terminal
from loop.files import write_text
from loop.run_folder import is_held, read_run, read_status
from model.generate import Reply, format_rates
from tools.plots import Group, Verdict, draw

NUM_ANSWERS = 5
GROUP = "eval/loss/"  # and its name: the key of a group's loss in metrics.jsonl
# A rise of the evaluation loss by less than this share of it is not called overfitting.
NOISE = 0.005


def quote(text: str) -> str:
    """Text of a model as a Markdown quotation that cannot break the page around it."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "\n".join(f"> {line}".rstrip() for line in (text or "-").splitlines())


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "report_templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["quote"] = quote
# A run from before these were measured has none.
TEMPLATES.filters["percent"] = lambda share: f"{100 * share:.1f} %" if isinstance(share, float) else "-"


def write_report(run_dir: Path, language: str | None = None) -> Path:
    """Raises UserError if run_dir holds no run or no evaluation of it. Overwrites an older report."""
    run = read_run(run_dir)
    language = language or run.get("language", "zh")
    rows = read_lines(run_dir / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "eval/loss" in row]
    if not any(math.isfinite(row["eval/loss"]) for row in evaluations):
        raise UserError(f"{run_dir} has no finished evaluation yet; there is nothing to report")
    epochs_per_step = train[-1]["train/epoch"] / train[-1]["step"] if train else 0.0
    evaluations = [{**row, "epoch": row["step"] * epochs_per_step} for row in evaluations]
    verdict = judge(evaluations, train)
    samples = read_lines(run_dir / "samples.jsonl")
    answers = [sample for sample in samples if sample["model"] == "best"]
    if not answers and samples:  # not at its end yet: what the newest evaluation got
        answers = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    rates = format_rates([Reply(*(sample[name] for name in Reply._fields)) for sample in answers]) if answers else {}
    data = json.loads((run_dir / "data" / "data_report.json").read_text(encoding="utf-8"))
    groups = groups_of(evaluations, verdict, data)
    stands = read_status(run_dir)
    status = stands.get("status")
    if status == "running" and not is_held(run_dir):
        status = "killed"
    text = TEMPLATES.get_template(f"{language}.md").render(
        run=run,
        launch=stands,
        data=data,
        status=status,
        train=train,
        evaluations=evaluations,
        verdict=verdict,
        groups=groups,
        tokens_per_s=statistics.median(row["perf/tokens_per_s"] for row in train) if train else None,
        peak_gib=max(row["memory/peak_gib"] for row in train) if train else None,
        step=max(row["step"] for row in [*rows, {"step": 0, **stands}]),
        answers=answers[:NUM_ANSWERS],
        num_answers=len(answers),
        rates={name: f"{rate:.0%}" for name, rate in rates.items()},
        sampled=sampled_in_training(samples),
    )
    draw(run_dir / "report", train, evaluations, verdict, status, groups)
    write_text(run_dir / "report.md", text)
    return run_dir / "report.md"


def sampled_in_training(samples: list[dict]) -> dict:
    """How many questions were answered at an evaluation, at how many of these, and after how many tokens answers ended
    because their time was over."""
    training = [sample for sample in samples if sample["model"] == "training"]
    cuts = {sample["step"]: sample["cut_at"] for sample in training if "cut_at" in sample}
    steps = {sample["step"] for sample in training}
    return {"times": len(steps), "questions": len(training) // max(1, len(steps)), "cuts": sorted(cuts.values())}


def judge(evaluations: list[dict], train: list[dict]) -> Verdict:
    finite = [row for row in evaluations if math.isfinite(row["eval/loss"])]
    best = min(finite, key=lambda row: row["eval/loss"])
    first, last = evaluations[0], finite[-1]
    later = [row for row in evaluations if row["step"] > best["step"]]
    after = [row for row in later if math.isfinite(row["eval/loss"])]
    rise = last["eval/loss"] - best["eval/loss"]
    until_best = [row["train/loss"] for row in train if row["step"] <= best["step"]]
    fall = until_best[-1] - train[-1]["train/loss"] if until_best else math.nan
    if not later:
        kind = "early" if best is first else "falling"
    elif not after:
        kind = "nonfinite"
    elif best is first:
        kind = "worse"
    else:
        kind = "overfitting" if rise > NOISE * best["eval/loss"] else "plateau"
    return Verdict(kind, first, best, last, (after or later or [last])[0], rise, fall)


def groups_of(evaluations: list[dict], verdict: Verdict, data: dict) -> list[Group]:
    names = [key.removeprefix(GROUP) for key in evaluations[0] if key.startswith(GROUP)]
    counts = data.get("groups", {})
    return [
        Group(
            name,
            counts.get(name, 0),
            *(row.get(GROUP + name, math.nan) for row in (verdict.first, verdict.best, verdict.last)),
        )
        for name in names
    ]


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


def main() -> None:
    prepare_terminal()
    parser = argparse.ArgumentParser(description="Writes report.md and its curves into the folder of a run.")
    parser.add_argument("run_dir", type=Path, help="output_dir of a run, finished, running or killed")
    parser.add_argument("--language", choices=("zh", "en"), help="as the run's own setting")
    args = parser.parse_args()
    try:
        print(write_report(args.run_dir, args.language))
    except (UserError, OSError) as error:
        raise SystemExit(f"tools.report: {error}") from None


if __name__ == "__main__":
    main()
