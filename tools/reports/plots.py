"""The curves of the reports."""

import functools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

from tools.reports.candidates import Candidate
from tools.reports.record import Group, Record

# matplotlib has no Chinese font of its own; these come with systems, best first.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
                 "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Noto Sans CJK JP", "Arial Unicode MS")  # fmt: skip
# Picture -> title of a panel -> figure in metrics.jsonl -> its label.
PANELS = {
    "parts.png": {
        "loss by part": {"train/think_loss": "thinking, train", "eval/think_loss": "thinking, eval",
                         "train/answer_loss": "answer, train", "eval/answer_loss": "answer, eval"},
        "next-token accuracy (eval)": {"eval/think_accuracy": "thinking, eval", "eval/answer_accuracy": "answer, eval"},
        "form kept (eval)": {"eval/close_accuracy": "closes", "eval/stop_accuracy": "stops"},
    },
    "training.png": {"learning rate": {"train/learning_rate": ""}, "gradient norm": {"train/grad_norm": ""},
                     "tokens/s": {"perf/tokens_per_s": ""}},
    "exam.png": {"exam accuracy": {"exam/accuracy": ""}},
    "forget.png": {"forgotten, nats per token": {"forget/kl": ""}},
    "think_probe.png": {
        "loss of the answer, by the thinking before it": {
            "think_probe/own": "own thinking", "think_probe/none": "no thinking",
            "think_probe/other": "another row's thinking",
        }
    },
}  # fmt: skip
LABELS = Path(__file__).with_name("templates") / "labels.zh.yaml"


@functools.cache
def chinese_font() -> str | None:
    """An installed font with Chinese characters, also one that came after matplotlib listed them."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - listed:
        try:
            font_manager.fontManager.addfont(path)
        except Exception:  # a format that matplotlib does not read
            continue
    names = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    known = next((name for name in CHINESE_FONTS if name in names), None)
    return known or next((name for name, path in names.items() if has_chinese(path)), None)


def has_chinese(path: str) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        return ord("诊") in FT2Font(path).get_charmap()
    except Exception:
        return False


class Canvas:
    """matplotlib with labels in a language, in English if no font has Chinese characters."""

    def __init__(self, language: str):
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        self.plt, self.font = plt, chinese_font()
        is_chinese = language == "zh" and self.font is not None
        self.labels = yaml.safe_load(LABELS.read_text(encoding="utf-8")) if is_chinese else {}
        plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "figure.dpi": 120})
        plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False})
        plt.rcParams["font.family"] = ["DejaVu Sans", *([self.font] if self.font else [])]

    def say(self, text: str, *values) -> str:
        text = self.labels.get(text, text)
        return text.format(*values) if values else text

    def panels(self, number: int, width: float, height: float, **more):
        figure, panels = self.plt.subplots(1, number, figsize=(width, height), layout="constrained", **more)
        return figure, panels

    def line(self, axes, rows: list[dict], name: str, label: str, **style) -> None:
        rows = [row for row in rows if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, **style)

    def percent(self, axes) -> None:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))

    def save(self, figure, path: Path) -> None:
        """With one legend under all panels, where it covers no data."""
        entries = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        if len(entries) > 1:
            figure.legend(
                entries.values(), entries.keys(), loc="outside lower center", ncols=min(4, len(entries)), frameon=False
            )
        figure.savefig(path)
        self.plt.close(figure)


def draw(folder: Path, record: Record, language: str) -> None:
    """loss.png, and those of groups.png, own.png, method.png and PANELS for which there is something to show."""
    folder.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(language)
    draw_losses(canvas, folder / "loss.png", record)
    titles = [title for title, _ in record.own.values()]
    own = {title if titles.count(title) == 1 else measure: {name: name.removeprefix(f"{measure}/") for name in names}
           for measure, (title, names) in record.own.items()}  # fmt: skip
    logged = {name.removeprefix("method/"): {name: ""} for name in record.logged}
    there = {name for row in [*record.train, *record.evaluations] for name in row}
    for file, panels in {**PANELS, "own.png": own, "method.png": logged}.items():
        if any(name in there for figures in panels.values() for name in figures):
            draw_curves(canvas, folder / file, record, panels)
    if record.groups:
        draw_groups(canvas, folder / "groups.png", record.groups)


def draw_curves(canvas: Canvas, path: Path, record: Record, panels: dict[str, dict[str, str]]) -> None:
    """panels: as in PANELS."""
    figure, axes = canvas.panels(len(panels), max(7, 4.5 * len(panels)), 4.2, squeeze=False)
    for panel, (title, figures) in zip(axes[0], panels.items(), strict=True):
        for name, label in figures.items():
            color = "C0" if "/think_" in name else "C1" if "/answer_" in name else None
            of_steps = name.startswith(("train/", "perf/", "method/"))
            style = {"alpha": 0.5} if of_steps and label else {} if of_steps else {"marker": "o"}
            canvas.line(panel, [*record.train, *record.evaluations], name, canvas.say(label), color=color, **style)
            if name.endswith("accuracy"):
                canvas.percent(panel)
        panel.set(xlabel=canvas.say("step"), title=canvas.say(title))
    canvas.save(figure, path)


def add_epochs(canvas: Canvas, axes, record: Record) -> None:
    if record.train:
        per_step = record.train[-1]["train/epoch"] / record.train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step))
        top.set_xlabel(canvas.say("epoch"))


def near_best(records: Iterable[Record], *names: str) -> tuple[float, float]:
    """The range of losses from half way to the best one on: where a turn can be seen. names: of the losses."""
    losses = [
        row[name]
        for record in records
        for row in [*record.evaluations, *record.train]
        for name in names
        if row["step"] >= record.verdict.best["step"] / 2 and math.isfinite(row.get(name, math.nan))
    ]
    return min(losses), max(losses)


def draw_losses(canvas: Canvas, path: Path, record: Record) -> None:
    """Over steps and epochs, the best model marked; near the best, if the fall before it hides the turn."""
    low, high = near_best([record], "eval/loss", "train/loss")
    has_zoom = record.verdict.first["eval/loss"] - low > 4 * (high - low) > 0
    figure, panels = canvas.panels(1 + has_zoom, 13 if has_zoom else 9, 5, squeeze=False)
    best = record.verdict.best
    for axes in panels[0]:
        canvas.line(axes, record.train, "train/loss", canvas.say("train"), color="C0", alpha=0.8)
        canvas.line(axes, record.evaluations, "eval/loss", canvas.say("eval"), color="C1", marker="o")
        label = canvas.say("best: step {}, {:.4f}", best["step"], best["eval/loss"])
        axes.axvline(best["step"], color="C2", linestyle="--", label=label)
        if record.status == "early_stopped":
            last = record.verdict.last["step"]
            axes.axvline(last, color="C3", linestyle=":", label=canvas.say("stopped early: step {}", last))
        axes.set(xlabel=canvas.say("step"), ylabel=canvas.say("loss, nats per target token"))
        add_epochs(canvas, axes, record)
    if has_zoom:
        axes.set_ylim(low - 0.1 * (high - low), high)
        axes.set_xlim(left=best["step"] / 2)
        axes.set_title(canvas.say("near the best"))
    canvas.save(figure, path)


def draw_groups(canvas: Canvas, path: Path, groups: list[Group]) -> None:
    """What each group has learned at the best step, and what it lost from there to the last one. Without a Chinese
    font a name that needs one is shown as its number in the table."""
    names = [
        group.name if canvas.font or group.name.isascii() else canvas.say("no. {}", number)
        for number, group in enumerate(groups, start=1)
    ]
    labels = [canvas.say("{} ({} rows)", name, group.rows) for name, group in zip(names, groups, strict=True)]
    figure, panels = canvas.panels(2, 11, 1.5 + 0.3 * len(groups), sharey=True)
    learned, lost = [group.first - group.best for group in groups], [group.last - group.best for group in groups]
    panels[0].barh(labels, learned, color="C0")
    panels[1].barh(labels, lost, color=["C3" if rise > 0 else "C2" for rise in lost])
    panels[0].set(xlabel=canvas.say("nats"), title=canvas.say("learned: fall of the loss until the best step"))
    panels[1].set(xlabel=canvas.say("nats"), title=canvas.say("lost: rise of the loss from there to the last step"))
    panels[0].invert_yaxis()
    canvas.save(figure, path)


def draw_runs(path: Path, candidates: list[Candidate], language: str) -> None:
    """Evaluation losses over steps, and over epochs near the best; exams and what was forgotten, if they were measured.
    Of a candidate of several runs the mean with its standard deviation, each run thin; a star marks the best."""
    canvas, loss = Canvas(language), "loss, nats per target token"
    records = [record for one in candidates for record in one.runs.values()]
    wanted = [("step", "eval/loss", "step", loss, ""), ("epoch", "eval/loss", "epoch", loss, "near the best"),
              ("step", "exam/accuracy", "step", "", "exam accuracy"),
              ("forget/kl", "eval/loss", "forgotten, nats per token", loss, "learned against forgotten")]  # fmt: skip
    there = {name for record in records for row in record.evaluations for name in row}
    wanted = [one for one in wanted if {*one[:2]} <= there]
    figure, panels = canvas.panels(len(wanted), 6 * len(wanted), 5)
    for axes, (x, y, *labels) in zip(panels, wanted, strict=True):
        for number, one in enumerate(candidates):
            draw_candidate(axes, one, x, y, {"color": f"C{number % 10}", "label": one.name})
        axes.set(**dict(zip(("xlabel", "ylabel", "title"), map(canvas.say, labels), strict=True)))
        if y == "exam/accuracy":
            canvas.percent(axes)
    low, high = near_best(records, "eval/loss")
    if high > low:
        panels[1].set(ylim=(low - 0.1 * (high - low), high))
        panels[1].set_xlim(left=min(record.verdict.best["epoch"] for record in records) / 2)
    canvas.save(figure, path)


def draw_candidate(axes, one: Candidate, x: str, y: str, style: dict) -> None:
    """A line through the means at the steps that all its runs have."""
    known = [[row for row in record.evaluations if all(math.isfinite(row.get(name, math.nan)) for name in (x, y))]
             for record in one.runs.values()]  # fmt: skip
    curves = [{row["step"]: (row[x], row[y]) for row in rows} for rows in known]
    if not all(curves):
        return
    steps = sorted(set.intersection(*map(set, curves)))
    points = [[statistics.fmean(values) for values in zip(*(curve[step] for curve in curves), strict=True)]
              for step in steps]  # fmt: skip
    axes.plot([x for x, _ in points], [y for _, y in points], marker=".", **style)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*zip(*curve.values(), strict=True), color=style["color"], alpha=0.35, linewidth=0.7)
        if x != "forget/kl":
            sds = [statistics.stdev(curve[step][1] for curve in curves) for step in steps]
            low, high = ([y + sign * sd for (_, y), sd in zip(points, sds, strict=True)] for sign in (-1, 1))
            axes.fill_between([x for x, _ in points], low, high, color=style["color"], alpha=0.15, linewidth=0)
    bests = [record.verdict.best for record in one.runs.values()]
    if y == "eval/loss" and all(x in best for best in bests):
        star = [statistics.fmean(best[name] for best in bests) for name in (x, y)]
        axes.plot(*star, color=style["color"], marker="*", markersize=14)
