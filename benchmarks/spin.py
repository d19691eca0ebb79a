"""How long waiting threads spin: libgomp's own 300,000 turns against the 10,000 of loop/start/environment.py.

    python benchmarks/spin.py [--pairs 5] [--busy 2] [--processes 2] [train.py's arguments]

Interleaved pairs of the same run, alone or beside --busy processes that do nothing but compute; prints tokens/s of each
and the ratio of each pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPINS = ("300000", "10000")


def tokens_per_s(spins: str, processes: int, arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "train.py", *arguments]
        env = {**os.environ, "GOMP_SPINCOUNT": spins, "SWANLAB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}
        flags = ["--output-dir", f"{folder}/run", "--num-samples", "0", "--eval-steps", "1000", "--logging-steps", "5"]
        subprocess.run([*command, *flags], cwd=ROOT, env=env, check=True, capture_output=True)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args, more = parser.parse_known_args()
    arguments = more or ["tiny", "--max-steps", "30"]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    ratios = []
    try:
        for number in range(args.pairs):
            order = SPINS if number % 2 else SPINS[::-1]
            found = {spins: tokens_per_s(spins, args.processes, arguments) for spins in order}
            ratios.append(found[SPINS[1]] / found[SPINS[0]])
            print(
                f"{SPINS[0]}: {found[SPINS[0]]:7,.0f}   {SPINS[1]}: {found[SPINS[1]]:7,.0f}   {ratios[-1]:.2f}",
                flush=True,
            )
    finally:
        for process in busy:
            process.kill()
    print(f"ratio: median {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), n = {len(ratios)}")


if __name__ == "__main__":
    main()
