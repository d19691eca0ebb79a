"""report.md and its curves, from what a run has written so far: python -m tools.report RUN_DIR [--language en]"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.errors import UserError
from loop.console import prepare_terminal
from loop.files import write_text
from loop.run_folder import is_held, read_run, read_status
from model.generate import Reply, format_rates

NUM_ANSWERS = 5
GROUP = "eval/loss/"  # and its name: the key of a group's loss in metrics.jsonl
# Some of these come with each system; matplotlib has no Chinese font of its own.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
                 "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Noto Sans CJK JP", "Arial Unicode MS")  # fmt: skip
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


class Verdict(NamedTuple):
    """What the evaluation loss did. kind: overfitting, plateau, falling (the last one is the best), worse (none is
    better than the one before training), early (there is no other yet), or nonfinite (after the best)."""

    kind: str
    first: dict  # evaluations: rows of metrics.jsonl with an epoch
    best: dict
    last: dict  # with a finite loss
    worse: dict  # the first one after the best
    rise: float  # of the last over the best, in nats
    train_fall: float  # of the train loss over the same steps, in nats; NaN if it is not known


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
    )
    draw(run_dir / "report", train, evaluations, verdict, status, groups)
    write_text(run_dir / "report.md", text)
    return run_dir / "report.md"


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


class Group(NamedTuple):
    """A set or a group of validation rows, and its evaluation loss before training, at the best step and at the end."""

    name: str
    rows: int
    first: float
    best: float
    last: float


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


def draw(
    folder: Path, train: list[dict], evaluations: list[dict], verdict: Verdict, status: str | None, groups: list[Group]
) -> None:
    """loss.png, parts.png, training.png, and groups.png if there are some. Labels are in English: matplotlib has no
    Chinese font of its own."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    plt.rcParams.update(
        {
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
        }
    )

    def line(axes, rows, name, label, **style):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, **style)

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    line(axes, train, "train/loss", "train", color="C0", alpha=0.8)
    line(axes, evaluations, "eval/loss", "eval", color="C1", marker="o")
    best = verdict.best
    axes.axvline(best["step"], color="C2", linestyle="--", label=f"best: step {best['step']}, {best['eval/loss']:.4f}")
    if status == "early_stopped":
        axes.axvline(
            verdict.last["step"], color="C3", linestyle=":", label=f"stopped early: step {verdict.last['step']}"
        )
    axes.set(xlabel="step", ylabel="loss, nats per target token")
    if train:
        per_step = train[-1]["train/epoch"] / train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step))
        top.set_xlabel("epoch")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)

    has_rates = any("format/closed" in row for row in evaluations)
    figure, panels = plt.subplots(1, 3 if has_rates else 2, figsize=(13 if has_rates else 9, 4), layout="constrained")
    for part, color in (("think", "C0"), ("answer", "C1")):
        line(panels[0], train, f"train/{part}_loss", f"{part}, train", color=color, alpha=0.4)
        line(panels[0], evaluations, f"eval/{part}_loss", f"{part}, eval", color=color, marker="o")
        line(panels[1], evaluations, f"eval/{part}_accuracy", part, color=color, marker="o")
    panels[0].set(xlabel="step", title="loss by part")
    panels[1].set(xlabel="step", title="next-token accuracy (eval)")
    if has_rates:
        for index, name in enumerate(("closed", "answered", "stopped", "empty_think")):
            rows = [row for row in evaluations if f"format/{name}" in row]
            line(panels[2], rows, f"format/{name}", name, color=f"C{index}", marker="os^v"[index], alpha=0.8)
        panels[2].set(xlabel="step", title="format of the samples", ylim=(-0.05, 1.05))
    for panel in panels:
        panel.legend()
    figure.savefig(folder / "parts.png", dpi=120)

    figure, panels = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    names = {
        "train/learning_rate": "learning rate",
        "train/grad_norm": "gradient norm",
        "perf/tokens_per_s": "tokens/s",
    }
    for panel, (name, title) in zip(panels, names.items(), strict=True):
        line(panel, train, name, title)
        panel.set(xlabel="step", title=title)
    panels[2].set_ylim(bottom=0)
    figure.savefig(folder / "training.png", dpi=120)
    if groups:
        draw_groups(folder / "groups.png", groups)
    plt.close("all")


def draw_groups(path: Path, groups: list[Group]) -> None:
    """What each group has learned at the best step, and what it lost from there to the last one. Without a Chinese
    font a name that needs one is shown as its number in the table."""
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    installed = {font.name for font in font_manager.fontManager.ttflist}
    font = next((name for name in CHINESE_FONTS if name in installed), None)
    names = [group.name if font or group.name.isascii() else f"no. {n}" for n, group in enumerate(groups, start=1)]
    labels = [f"{name} ({group.rows} rows)" for name, group in zip(names, groups, strict=True)]
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.5 + 0.3 * len(groups)), sharey=True, layout="constrained")
    learned, lost = [group.first - group.best for group in groups], [group.last - group.best for group in groups]
    panels[0].barh(labels, learned, color="C0")
    panels[1].barh(labels, lost, color=["C3" if rise > 0 else "C2" for rise in lost])
    panels[0].set(xlabel="nats", title="learned: fall of the loss until the best step")
    panels[1].set(xlabel="nats", title="lost: rise of the loss from there to the last step")
    panels[0].invert_yaxis()
    for tick in panels[0].get_yticklabels():
        tick.set_fontfamily([font, "DejaVu Sans"] if font else ["DejaVu Sans"])
    figure.savefig(path, dpi=120)


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
