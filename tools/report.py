"""The report of a run, or of several side by side: python -m tools.report RUN_DIR [RUN_DIR ...] [--language en]

One run: report.md and its curves in the run's folder, in the run's own language; in another one report.LANGUAGE.md.
Several: runs.md and runs.png in the folder that holds them, or in --out.
"""

import argparse
import ast
import dataclasses
from pathlib import Path

from data.base.console import tool
from data.base.errors import UserError
from data.base.files import write_text
from loop.config import TrainConfig
from loop.start.step_file import DEFAULT as STEP_FILE
from tools.reports.candidates import by_seed
from tools.reports.pages import TEMPLATES, is_number, with_error
from tools.reports.plots import draw
from tools.reports.record import Record, read_record
from tools.reports.side_by_side import write_candidates

NUM_ANSWERS = 5
FEW_PROBED = 30  # of fewer rows nothing is said about the thinking
NOISE = 0.005  # share of a loss; a gain of the thinking under 4 times that is not called one
# Settings of the method, beside the step file.
METHOD = ("lora_rank", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm")
METHOD += ("think_weight", "answer_weight", "num_train_epochs")


def write_report(run_dir: Path, language: str | None = None) -> Path:
    """Raises UserError if run_dir holds no run or no evaluation of it. Overwrites an older report."""
    record = read_record(run_dir)
    own = record.run.get("language", "zh")
    language = language or own
    pictures = "report" if language == own else f"report/{language}"
    text = TEMPLATES.get_template(f"{language}.md").render(
        record._asdict(),
        record=record,
        v=record.verdict,
        groups=record.groups,
        shown=record.answers[:NUM_ANSWERS],
        rates=record.rates,
        examined=[row for row in record.evaluations if "exam/accuracy" in row],
        probed=[row for row in record.evaluations if is_number(row.get("think_probe/own"))],
        gains=gains(record),
        forgotten=[
            with_error(row["forget/kl"], row["forget/kl_error"], "")
            for row in record.verdict[2:4]
            if "forget/kl" in row
        ],
        methods=methods(record),
        changed=changed(record),
        only_sample=all(name.split(":")[0] == "sample" for name in record.run["dataset"]),
        metric=record.run.get("metric_for_best_model", "eval/loss"),
        best_step=record.launch.get("best_step", record.verdict.best["step"]),
        pictures=pictures,
    )
    draw(run_dir / pictures, record, language)
    path = run_dir / ("report.md" if language == own else f"report.{language}.md")
    write_text(path, text)
    return path


def methods(record: Record) -> list[tuple[str, str]]:
    """(file, first line of its docstring and what --step-set set) of the step files that are not loop/step.py."""
    found, own = [], first_line(STEP_FILE.read_bytes())
    for file in record.run.get("step_files", []):
        path = record.folder / "code" / file["file"]
        line = first_line(path.read_bytes()) if path.is_file() else ""
        values = ", ".join(f"{name} = {value!r}" for name, value in file.get("set", {}).items())
        if line != own:
            found.append((file["file"], f"{line} ({values})" if values else line))
    return found


def changed(record: Record) -> list[tuple[str, object, object]]:
    """(setting, value, value in the experiment as it was) of what acts on how a model is trained."""
    experiment = dataclasses.asdict(TrainConfig())
    run = experiment | record.run | {"num_train_epochs": record.planned_epochs}  # max_steps may have decided
    return [(name, run[name], experiment[name]) for name in METHOD if run[name] != experiment[name]]


def first_line(code: bytes) -> str:
    return (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0]


def gains(record: Record) -> tuple[float, float, str] | None:
    """What the answers' own thinking saves against none and against another row's, in nats per token, at the best step
    or else the last that was probed; and whether it helps: yes, no (it costs), or little (not to be told)."""
    probed = [row for row in record.evaluations if is_number(row.get("think_probe/own"))]
    if not probed:
        return None
    row = next((row for row in probed if row["step"] == record.verdict.best["step"]), probed[-1])
    over_none, over_other = (row[f"think_probe/{name}"] - row["think_probe/own"] for name in ("none", "other"))
    least, noise = min(over_none, over_other), NOISE * row["think_probe/own"]
    # Of few rows, or of a model that does not close its thinking yet, it says nothing.
    says = record.data["val"]["examples"] >= FEW_PROBED and row.get("eval/close_accuracy", 1.0) >= 0.5
    return over_none, over_other, "yes" if says and least > 4 * noise else "no" if says and least < -noise else "little"


def write_comparison(run_dirs: list[Path], language: str | None, out: Path | None) -> Path:
    """runs.md, runs.json and runs.png of several runs; those that differ in the seed alone are one column. Raises
    UserError if one is no run or has no evaluation."""
    records = [read_record(run_dir) for run_dir in run_dirs]
    parents = {run_dir.resolve().parent for run_dir in run_dirs}
    if out is None and len(parents) > 1:
        raise UserError("these runs lie in different folders: name one for runs.md and runs.png with --out")
    path, _ = write_candidates(by_seed(records, names_of(run_dirs)), language, out or parents.pop())
    return path


def names_of(run_dirs: list[Path]) -> list[str]:
    """The folders' names, with their parents' if these are equal."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    names = names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]
    if len(set(names)) < len(names):
        raise UserError("one run is named twice")
    return names


@tool("report")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="finished, running or killed")
    parser.add_argument("--language", choices=("zh", "en"), help="as the run's own setting")
    parser.add_argument("--out", type=Path, help="folder for runs.md and runs.png of several runs")
    args = parser.parse_args()
    if len(args.run_dirs) == 1:
        if args.out:
            raise UserError("--out is the folder for several runs; the report of one is in its own")
        print(write_report(args.run_dirs[0], args.language))
    else:
        print(write_comparison(args.run_dirs, args.language, args.out))


if __name__ == "__main__":
    main()
