"""Several candidates on one page: what may be concluded, their figures, what differs in their settings."""

import dataclasses
import statistics
from pathlib import Path

from data.base.files import write_json, write_text
from data.reading.source import public_name
from loop.config import TrainConfig
from tools.reports.candidates import NAMES, SEEDS, Candidate, best_two, compare, last_common_step
from tools.reports.pages import TEMPLATES, duration, spread, with_error
from tools.reports.plots import draw_runs
from tools.reports.record import Record
from tools.shared.runs import name_of


def write_candidates(
    candidates: list[Candidate], language: str | None, out: Path, test: dict | None = None
) -> tuple[Path, list[dict]]:
    """Writes runs.md, runs.json and runs.png; returns the page, and the figures of each candidate. test: what a race
    measured on its test rows."""
    language = language or candidates[0].first.run.get("language", "zh")
    out.mkdir(parents=True, exist_ok=True)
    comparisons, records = compare(candidates), [one.first for one in candidates]
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
