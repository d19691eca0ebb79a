"""Which step file keeps the evaluation loss from turning? Each is trained on the embedded sample with five seeds.

    python benchmarks/screen.py outputs/screen                   # two runs at a time, one thread each; goes on if cut
    python benchmarks/screen.py outputs/screen --only none eaft  # these alone

Prints the table of RESULTS.md. The seed draws the split, the order and the weights; a method is compared with the
baseline of the same seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["tiny", "--early-stopping-patience", "8", "--num-samples", "0", "--swanlab-mode", "disabled", "--resume"]
RECIPES = ("label_smoothing", "eaft", "dft", "kl", "rho", "l2sp", "freeze", "schedule_free", "muon")
METHODS = {"none": []} | {name: ["--step-file", f"recipes/{name}.py"] for name in RECIPES}
METHODS |= {  # a weight below 1 is a lower rate, too: each at the rate that suits it
    f"{name} at {rate}": ["--step-file", f"recipes/{name}.py", "--learning-rate", rate]
    for name in ("eaft", "dft")
    for rate in ("2.5e-3", "1e-2")
}
PER_EPOCH = 90  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45, 46])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    jobs = [(args.folder, name, seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job), jobs))
    print(table(args.folder))


def folder_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '-')}-{seed}"


def train(folder: Path, name: str, seed: int) -> None:
    out = folder_of(folder, name, seed)
    if (out / "report.md").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *COMMON, *METHODS[name], "--output-dir", str(out)]
    command += ["--seed", str(seed), "--split-seed", str(seed)]
    with out.with_name(f"{out.name}.log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(f"{out.name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", file=sys.stderr, flush=True)


def evaluations(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (out / "report.md").exists() else []
    return [row for row in map(json.loads, lines) if "eval/loss" in row]


def table(folder: Path) -> str:
    runs = {name: {} for name in METHODS}
    for name in METHODS:
        for out in folder.glob(f"{name.replace(' ', '-')}-[0-9][0-9]"):
            runs[name][int(out.name[-2:])] = evaluations(out)
    best = {name: {s: min(rows, key=lambda row: row["eval/loss"]) for s, rows in by_seed.items() if rows}
            for name, by_seed in runs.items()}  # fmt: skip
    lines = [
        "| method | seeds | best loss | minus that of none | its epoch | at the turn of none + 1 | thinking, answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in best.items():
        both = sorted(found.keys() & best["none"].keys())
        if not both:
            continue
        losses = [found[s]["eval/loss"] for s in both]
        minus = [found[s]["eval/loss"] - best["none"][s]["eval/loss"] for s in both]
        later = []
        for s in both:
            step = best["none"][s]["step"] + PER_EPOCH
            at = [row["eval/loss"] for row in runs[name][s] if row["step"] == step]
            later += [one - best["none"][s]["eval/loss"] for one in at]
        turn = f"{spread(later, '+.4f')}, " if later else ""
        parts = [statistics.mean(found[s][f"eval/{part}_loss"] for s in both) for part in ("think", "answer")]
        lines.append(
            f"| {name} | {len(both)} | {spread(losses, '.4f')} | {spread(minus, '+.4f')}, lower in "
            f"{sum(one < 0 for one in minus)} | {spread([found[s]['step'] / PER_EPOCH for s in both], '.1f')} | "
            f"{turn}no worse in {sum(one <= 0 for one in later)} of {len(later)} | "
            f"{parts[0]:.4f}, {parts[1]:.4f} |"
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
