"""Weighs what is said in an emergency: python benchmarks/make_safety.py

From the sentences in benchmarks/safety, three sets that were written apart from each other. Prints how often the rules
of tools/shared/safety.py are wrong, each set judged by weights of the other two, and writes the weights of all to
tools/shared/safety.npz. The words in safety.yaml were read off set 1 and 2, names of people off set 3, too.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import torch

from tools.shared import safety

HERE = Path(__file__).parent / "safety"
DECAY = 1e-4
SETS = ("1", "2", "3")


def main() -> None:
    for kind, judge in (("emergency", safety.is_emergency), ("drug", safety.names_drug)):
        rows = read(kind)
        for name in SETS:
            if kind == "emergency":
                safety.WEIGHTS[kind] = fit([row for row in rows if row["set"] != name])
            right = [(row[kind], judge(row["text"])) for row in rows if row["set"] == name]
            missed = [not said for true, said in right if true]
            false = [said for true, said in right if not true]
            print(f"{kind}, set {name}: missed {sum(missed)} of {len(missed)}, false {sum(false)} of {len(false)}")
    for name in SETS:
        rows = [row for row in read("personal") if row["set"] == name]
        wanted = [(text, row["text"]) for row in rows for text in row["found"]]
        seen = sum(any(text in one or one in text for _, one in safety.personal(row)) for text, row in wanted)
        false = sum(bool(safety.personal(row["text"])) for row in rows if not row["found"])
        print(f"personal, set {name}: missed {len(wanted) - seen} of {len(wanted)}, false {false} texts of "
              f"{sum(not row['found'] for row in rows)}")  # fmt: skip
    numpy.savez_compressed(safety.FILE, emergency=fit(read("emergency")))


def read(kind: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def fit(rows: list[dict]) -> numpy.ndarray:
    """A logistic regression, whose last weight is the constant."""
    x = torch.zeros(len(rows), safety.SIZE + 1)
    for number, row in enumerate(rows):
        for place, value in safety.features(row["text"]).items():
            x[number, place] = value
    x[:, -1], y = 1.0, torch.tensor([float(row["emergency"]) for row in rows])
    weights = torch.zeros(safety.SIZE + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y)
        found = found + DECAY / 2 * weights[:-1].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return weights.detach().half().numpy()


if __name__ == "__main__":
    main()
