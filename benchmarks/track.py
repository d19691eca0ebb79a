"""The small track (benchmarks/track.md): every recipe on the embedded sample with five seeds, by the loss on test rows.

    python benchmarks/track.py outputs/track --jobs 2                  # an hour or more on two cores; goes on if cut
    python benchmarks/track.py outputs/track --only ema schedule_free  # these, and the baseline
    python benchmarks/track.py outputs/track --only --against my_step.py

Prints the table of track.md.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.base.files import write_json  # noqa: E402
from tools import race  # noqa: E402
from tools.reports.final_test import test_loss  # noqa: E402
from tools.reports.record import read_record  # noqa: E402

SEEDS = (42, 43, 44, 45, 46)
FLAGS = "tiny --test-fraction 0.1 --max-steps 720 --early-stopping-patience 0 --num-samples 0 --swanlab-mode disabled"
RECIPES = ("ema", "schedule_free", "eaft", "label_smoothing", "freeze", "layerwise_lr", "l2sp", "noise", "muon", "dft")
RECIPES += ("kl", "rho", "sam")
# The presets `better` and `lora` as they differ from `medical`, in proportion to the rate of `tiny`.
PRESETS = {
    "better": "recipes/ema.py --learning-rate 1e-3 --warmup-ratio 0.05",
    "lora": "--lora-rank 16 --learning-rate 1e-2",
}
CANDIDATES = PRESETS | {name: f"recipes/{name}.py" for name in RECIPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--against", action="append", default=[], help="as in tools.race")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    against = [f"{name}={CANDIDATES[name]}" for name in args.only] + args.against
    sys.argv = ["race", *FLAGS.split(), "--split-by-seed", "--seeds", *map(str, SEEDS), "--jobs", str(args.jobs)]
    sys.argv += [*(part for one in against for part in ("--against", one)), "--out", str(args.folder)]
    race.main()
    print(table(args.folder, ["tiny", *(race.read_candidate(one, list(SEEDS))[0] for one in against)]))


def table(folder: Path, names: list[str]) -> str:
    losses = {name: losses_of(folder, name) for name in names}
    speeds = {name: [read_record(folder / f"{name}-{seed}").tokens_per_s for seed in SEEDS] for name in names}
    rows, base = [], losses["tiny"]
    for name, found in losses.items():
        apart = [ours - theirs for ours, theirs in zip(found, base, strict=True)]
        mean, error = statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))
        ratio = statistics.median(a / b for a, b in zip(speeds["tiny"], speeds[name], strict=True))
        verdict = "**record**" if mean < -2 * error else "worse" if mean > 2 * error else "not told"
        minus = f"{mean:+.4f} ± {2 * error:.4f} | {sum(one < 0 for one in apart)} of {len(apart)} | {verdict}"
        line = f"| `{name}` | {statistics.fmean(found):.4f} ± {statistics.stdev(found):.4f} | "
        line += minus if name != "tiny" else "| | the baseline"
        rows.append((statistics.fmean(found), f"{line} | × {ratio:.2f} |"))
    head = ["| candidate | test loss, mean ± sd | minus the baseline's ± 2 se | lower in | | time of a token |"]
    head.append("|---|---|---|---|---|---|")
    return "\n".join(head + [line for _, line in sorted(rows)])


def losses_of(folder: Path, name: str) -> list[float]:
    """Test losses of a candidate's exported models, by seed; measured once, and kept in track.json."""
    path = folder / "track.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for run in (folder / f"{name}-{seed}" for seed in SEEDS):
        began = read_record(run).launches[0]["began"]
        if known.get(run.name, {}).get("began") != began:
            known[run.name] = {"began": began, "loss": test_loss(run)}
            write_json(path, known)
    return [known[f"{name}-{seed}"]["loss"] for seed in SEEDS]


if __name__ == "__main__":
    main()
