"""Which share of changed meanings a model catches: python benchmarks/judge.py MODEL PAIRS.jsonl

PAIRS.jsonl has lines of `question`, `rewrite` and `same` (whether both ask the same). The judge is that of
tools.augment for a local model, the likelihoods of yes and no. Its other judge, the loss of the row's answer, needs
answers.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.reading.rows import Row
from tools.augment import Augment, problem

args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
args.add_argument("model")
args.add_argument("pairs", type=Path)
args = args.parse_args(namespace=argparse.Namespace(url=None, rewrites=1))
pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
rows = [Row(str(n), {}, [{"role": "user", "content": pair["question"]}]) for n, pair in enumerate(pairs)]
seen = [problem(pair["question"], pair["rewrite"]) for pair in pairs]
judged = Augment(rows, 2048, args).by_likelihood([(n, pair["rewrite"]) for n, pair in enumerate(pairs)])
refused = {n for n, _ in judged}
for same, name in ((False, "of {} changed meanings"), (True, "of {} equal meanings")):
    numbers = [n for n, pair in enumerate(pairs) if pair["same"] is same]
    checks, model = sum(bool(seen[n]) for n in numbers), sum(n in refused for n in numbers)
    both = sum(bool(seen[n]) or n in refused for n in numbers)
    print(f"{name.format(len(numbers))} refused: {checks} by the checks, {model} by the model, {both} by either")
