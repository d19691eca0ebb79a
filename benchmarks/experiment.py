"""The experiment itself, on a pretrained model: trains until the evaluation loss has turned, and prints what was seen.

    python benchmarks/experiment.py                                   # Qwen3-1.7B from ModelScope, on a GPU
    python benchmarks/experiment.py --model DIR --dataset FILE ...    # any flags of train.py

Run again, it goes on where it was stopped; a finished run is only read.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loop.record.run_folder import read_run, read_status  # noqa: E402
from loop.start.command_line import parse_config  # noqa: E402
from tools.reports.record import read_lines  # noqa: E402


def main() -> None:
    flags = sys.argv[1:]
    folder = Path(parse_config(flags).output_dir)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--resume"])
    if done.returncode:
        raise SystemExit(done.returncode)
    if any("train/loss" in row for row in read_lines(folder / "metrics.jsonl")):
        print(table(folder))


def table(folder: Path) -> str:
    """Markdown: every evaluation of a run, and its figures."""
    run, status, rows = read_run(folder), read_status(folder), read_lines(folder / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    last = {key: value for row in rows for key, value in row.items()}
    lines = [
        f"{run['model']}, {run['rows_per_step']} rows a step, rate {run['learning_rate']:g}, {status['status']}",
        "",
        "| step | epoch | eval loss | think | answer | closes | stops |",
        "|---|---|---|---|---|---|---|",
    ]
    epochs = train[-1]["train/epoch"] / train[-1]["step"]
    for row in (row for row in rows if "eval/loss" in row):
        best = " (best)" if row["step"] == status["best_step"] else ""
        losses = " | ".join(f"{row[f'eval/{name}']:.4f}" for name in ("loss", "think_loss", "answer_loss"))
        form = " | ".join(f"{row[f'eval/{name}_accuracy']:.0%}" for name in ("close", "stop"))
        lines.append(f"| {row['step']}{best} | {row['step'] * epochs:.2f} | {losses} | {form} |")
    speed = sorted(row["perf/tokens_per_s"] for row in train)
    lines += [
        "",
        f"tokens/s: median {speed[len(speed) // 2]:.0f} ({speed[0]:.0f}-{speed[-1]:.0f}); "
        f"peak memory {max(row['memory/peak_gib'] for row in train):.1f} GiB",
        *(f"best model: {name.partition('/')[2]} {last[name]:.0%}" for name in last if name.startswith("best_format/")),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
