"""The report of a run, or of several side by side: python -m tools.report RUN_DIR [RUN_DIR ...] [--language en]

One run: report.md and its curves in the run's folder, in the run's own language; in another one report.LANGUAGE.md.
Several: runs.md and runs.png in the folder that holds them, or in --out.
"""

import argparse
import ast
import dataclasses
import math
import statistics
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.base.console import tool
from data.base.errors import UserError
from data.base.files import write_json, write_text
from data.reading.source import public_name
from loop.config import TrainConfig
from loop.start.step_file import DEFAULT as STEP_FILE
from model.export import TEMPLATES as CARDS
from model.export import plain
from tools.reports.candidates import NAMES, SEEDS, Candidate, best_two, by_seed, compare, last_common_step
from tools.reports.plots import draw, draw_runs
from tools.reports.record import Record, collapse, read_record
from tools.shared.runs import name_of

NUM_ANSWERS = 5
FEW_PROBED = 30  # of fewer rows nothing is said about the thinking
NOISE = 0.005  # share of a loss; a gain of the thinking under 4 times that is not called one
# Settings of the method, beside the step file.
METHOD = ("lora_rank", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm")
METHOD += ("think_weight", "answer_weight", "num_train_epochs")


def quote(text: str) -> str:
    """Text of a model as a Markdown quotation that shows each of its characters."""
    lines = [plain(line.rstrip()) for line in collapse(text or "-").splitlines()]
    return "\n".join(f"> {line}\\" if line and after else f"> {line}".rstrip()
                     for line, after in zip(lines, [*lines[1:], ""], strict=True))  # fmt: skip


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as H:MM:SS."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def with_error(value: float, error: float, sign: str = "+") -> str:
    """+0.0196 ± 0.0071; the error only if it is known."""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if is_number(error) else "")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; the deviation if there are several."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def is_number(value) -> bool:
    return isinstance(value, float) and math.isfinite(value)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "reports" / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["quote"] = quote
TEMPLATES.filters["duration"] = duration
TEMPLATES.filters |= {"cell": CARDS.filters["cell"], "code": CARDS.filters["code"]}
# A run from before these were measured has none.
TEMPLATES.filters["percent"] = lambda share: f"{100 * share:.1f} %" if is_number(share) else "-"
TEMPLATES.filters["error"] = with_error
TEMPLATES.filters["spread"] = spread
TEMPLATES.filters["loss"] = lambda loss: f"{loss:.4f}" if is_number(loss) else "-"


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


def write_candidates(
    candidates: list[Candidate], language: str | None, out: Path, test: dict | None = None
) -> tuple[Path, list[dict]]:
    """The page, and the figures of each candidate. test: what a race measured on its test rows."""
    language = language or next(iter(candidates[0].runs.values())).run.get("language", "zh")
    out.mkdir(parents=True, exist_ok=True)
    comparisons, records = compare(candidates), [next(iter(one.runs.values())) for one in candidates]
    said = TEMPLATES.get_template(f"verdict.{language}.md").module
    text = TEMPLATES.get_template(f"runs.{language}.md").render(
        candidates=candidates,
        number=sum(len(one.runs) for one in candidates),
        comparisons=comparisons,
        open=[one.name for one in candidates if not one.is_over],
        two=best_two(candidates),
        step=last_common_step(candidates),
        test=test,
        settings=different_settings(records),
        cells=[cells(one) for one in candidates],
        own=dict.fromkeys(name for record in records for _, names in record.own.values() for name in names),
    )
    draw_runs(out / "runs.png", candidates, language)
    figures = [
        {"name": one.candidate.name, "losses": one.losses, "diverged": one.candidate.diverged,
         "best": one.best and one.best._asdict(), "rows": one.rows, "fixed": one.fixed and one.fixed._asdict(),
         "time": one.time, "verdict": said.verdict(one).strip() if one is not comparisons[0] else ""}
        for one in comparisons
    ]  # fmt: skip
    write_json(out / "runs.json", {"candidates": figures, "fixed_step": last_common_step(candidates), "test": test})
    write_text(out / "runs.md", text)
    return out / "runs.md", figures


def cells(one: Candidate) -> dict[str, str]:
    """What the table of several candidates says of one: means over its runs, with the standard deviation."""
    runs, percent = list(one.runs.values()), TEMPLATES.filters["percent"]

    def at_best(*names: str, form=spread) -> str:
        return ", ".join(form([*one.values(name).values()]) for name in names)

    def shares(values: list[float]) -> str:
        return percent(statistics.fmean(values)) if values else "-"

    rises = one.of(lambda record: record.verdict.rise)
    rise = with_error(*runs[0].verdict[5:7]) if len(runs) == 1 else f"{statistics.fmean(rises):+.4f}"
    steps, epochs = (statistics.fmean(one.of(lambda r, unit=unit: r.verdict.best[unit])) for unit in ("step", "epoch"))
    answered = [record.rates for record in runs if record.rates]
    forms = [shares([rates[name] for rates in answered]) for name in ("closed", "answered", "stopped")]
    seconds, speeds = one.of(lambda record: record.wall_seconds), one.of(lambda record: record.tokens_per_s)
    names = dict.fromkeys(name for record in runs for _, found in record.own.values() for name in found)
    return {name: at_best(name) for name in names} | {
        "seeds": ", ".join(str(record.run["seed"]) for record in runs),
        "best": at_best("eval/loss"),
        "step": f"{steps:.0f} ({epochs:.2f})",
        "last": f"{spread(one.of(lambda record: record.verdict.last['eval/loss']))} ({rise})",
        "parts": at_best("eval/think_loss", "eval/answer_loss"),
        "accuracy": at_best("eval/think_accuracy", "eval/answer_accuracy", form=shares),
        "form": f"{', '.join(forms)} ({len(runs[0].answers)})" if answered else "-",
        "exam": at_best("exam/accuracy", form=shares),
        "forget": at_best("forget/kl"),
        "tokens": f"{statistics.fmean(speeds):,.0f}" if speeds else "-",
        "peak": f"{max(peaks):.1f}" if (peaks := one.of(lambda record: record.peak_gib)) else "-",
        "wall": duration(sum(seconds) if seconds else None),
    }


def names_of(run_dirs: list[Path]) -> list[str]:
    """The folders' names, with their parents' if these are equal."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    names = names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]
    if len(set(names)) < len(names):
        raise UserError("one run is named twice")
    return names


def different_settings(records: list[Record]) -> dict[str, list[str]]:
    """Setting -> its value in each run, if these differ. What a run wrote before a setting existed is its default."""
    defaults = dataclasses.asdict(TrainConfig())
    runs = [defaults | record.run for record in records]
    found = {name: [show(name, run[name]) for run in runs] for name in defaults if name not in NAMES | SEEDS}
    files = [" → ".join(f"{file['file']} ({file['sha256'][:8]})" for file in run["step_files"]) for run in runs]
    found |= {"step_file": files, "train_rows": [run["train_rows"] for run in runs]}
    found |= {name: [run.get(name, "-") for run in runs] for name in ("val_rows", "forget_rows")}
    found["metric_for_best_model"] = [run.get("metric_for_best_model", "-") for run in runs]
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def show(name: str, value) -> str:
    """Without the folders above a file, which are private."""
    if name in ("dataset", "val_dataset", "exam", "exclude", "forget"):
        return " ".join(map(public_name, value))
    if name == "model":
        return name_of(value)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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
