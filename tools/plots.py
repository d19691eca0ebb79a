"""The curves of report.md, and what they are drawn from."""

from pathlib import Path
from typing import NamedTuple

# Some of these come with each system; matplotlib has no Chinese font of its own.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
                 "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Noto Sans CJK JP", "Arial Unicode MS")  # fmt: skip


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


class Group(NamedTuple):
    """A set or a group of validation rows, and its evaluation loss before training, at the best step and at the end."""

    name: str
    rows: int
    first: float
    best: float
    last: float


def draw(
    folder: Path, train: list[dict], evaluations: list[dict], verdict: Verdict, status: str | None, groups: list[Group]
) -> None:
    """loss.png, parts.png, training.png, and groups.png if there are some. Labels are in English: matplotlib has no
    Chinese font of its own."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    draw_losses(folder / "loss.png", train, evaluations, verdict, status)
    draw_parts(folder / "parts.png", train, evaluations)
    draw_training(folder / "training.png", train)
    if groups:
        draw_groups(folder / "groups.png", groups)
    plt.close("all")


def line(axes, rows: list[dict], name: str, label: str, **style) -> None:
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, **style)


def draw_losses(path: Path, train: list[dict], evaluations: list[dict], verdict: Verdict, status: str | None) -> None:
    """Over steps and epochs, the best model marked."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    line(axes, train, "train/loss", "train", color="C0", alpha=0.8)
    line(axes, evaluations, "eval/loss", "eval", color="C1", marker="o")
    best, last = verdict.best, verdict.last["step"]
    axes.axvline(best["step"], color="C2", linestyle="--", label=f"best: step {best['step']}, {best['eval/loss']:.4f}")
    if status == "early_stopped":
        axes.axvline(last, color="C3", linestyle=":", label=f"stopped early: step {last}")
    axes.set(xlabel="step", ylabel="loss, nats per target token")
    if train:
        per_step = train[-1]["train/epoch"] / train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step))
        top.set_xlabel("epoch")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_parts(path: Path, train: list[dict], evaluations: list[dict]) -> None:
    """Thinking and answer apart: loss, accuracy, and the format of the samples."""
    from matplotlib import pyplot as plt

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
    figure.savefig(path, dpi=120)


def draw_training(path: Path, train: list[dict]) -> None:
    from matplotlib import pyplot as plt

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
    figure.savefig(path, dpi=120)


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
