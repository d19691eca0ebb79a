"""Which rows are wrong: figures against the run's own evaluations, and rows with swapped answers found."""

import json
import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT, good_row
from ranks import run

from data.reading.source import SAMPLE
from tools import rows
from tools.rows import beyond, standard


def table(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    turns = [{"role": role, "content": f"{role}{i}"} for i in range(2) for role in ("user", "assistant")]
    given = [good_row(i) for i in range(19)] + [{**good_row(19), "answer": "答" * 300}]  # one that is too long to train
    given += [{"question": "不想？", "answer": "不想。"}, {"messages": turns}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    args = ["tiny", "--dataset", folder / "rows.jsonl", "--val-fraction", "0.3", "--max-steps", 8, "--eval-steps", 8]
    args += ["--max-length", 256]
    done = run([*args, "--num-samples", 0, "--output-dir", folder / "run"], log=folder / "log")
    assert done.codes == [0], done.output
    return folder / "run"


def test_the_figures_are_those_of_the_run(studied, tool):
    """Over the validation rows, weighted by their tokens, the losses are those of the evaluations."""
    code, said = tool(rows, studied, "--worst", 3, "--suspects", 4)
    lines = table(studied)
    assert code == 0
    assert len(lines) == 22 and [line["side"] for line in lines].count("val") == 7
    assert lines == sorted(lines, key=lambda line: -line["suspect"])
    assert "stand out by 3.5" in said and "hardest after training" in said and "train without the first 4" in said
    suspects = (studied / "suspects.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) for row in suspects] == [line["columns"] for line in lines[:4]]
    # Row by row, to the bit if the weights are: before training they are, best/ is rounded to bf16.
    steps = {}
    for line in map(json.loads, (studied / "eval_rows.jsonl").open(encoding="utf-8")):
        steps.setdefault(line["step"], {})[line["row"]] = line
    places = {row: f"val.jsonl:{n}" for n, row in enumerate(steps[0], start=1)}
    found = {line["location"]: line for line in lines}
    for when, step, tolerance in (("before", 0, 0), ("after", 8, 0.02)):
        for row, line in steps[step].items():
            for part in ("think", "answer"):
                ours, theirs = found[places[row]][when][part], line.get(part)
                assert (ours is None) == (theirs is None)
                assert ours is None or ours == pytest.approx(theirs[0] / theirs[1], rel=tolerance, abs=0), (row, part)


def test_a_run_without_the_suspects(studied, tmp_path):
    suspects = tmp_path / "suspects.jsonl"
    suspects.write_text((studied / "data/train.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    args = ["tiny", "--dataset", studied.parent / "rows.jsonl", "--exclude", suspects, "--dry-run"]
    done = run([*args, "--output-dir", tmp_path / "out"], log=tmp_path / "log")
    assert done.codes == [0] and "1 rows left out, because --exclude or --exam holds them" in done.output


def test_what_cannot_be_studied_is_told(studied, tmp_path, tool):
    for arguments, message in {(tmp_path,): "is no folder of a run", (studied, "--base", "none"): "none"}.items():
        code, _ = tool(rows, *arguments)
        assert code.startswith("tools.rows: ") and message in code


def test_what_is_beyond_the_expected():
    """A text that is hard everywhere is no suspect, one that is hard in its place alone is; each side for itself."""
    elsewhere = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, None]
    losses = [0.5, 1.01, 1.49, 2.0, 2.51, 3.7, 3.5, None]
    rests = beyond(losses, elsewhere)
    found = standard(rests, ["train"] * 8)
    assert max(range(8), key=found.__getitem__) == 5 and found[5] > 3 and found[7] == -math.inf
    assert max(abs(found[n]) for n in (0, 1, 2, 3, 4, 6)) < 3
    assert beyond([None, 1.0], [None, 2.0]) == [None, 0.0]
    assert standard([1.0, 2.0, 3.0, 11.0, 12.0, 13.0], ["train"] * 3 + ["val"] * 3) == pytest.approx(
        [-1 / 1.4826, 0.0, 1 / 1.4826] * 2
    )
    assert standard([1.0] * 5, ["train"] * 5) == [0.0] * 5 and standard([None], ["val"]) == [-math.inf]


def area(scores: list[tuple[float, bool]]) -> float:
    """Under the ROC curve: how often a swapped row stands above one that is not."""
    swapped, others = ([score for score, is_swapped in scores if is_swapped is which] for which in (True, False))
    return sum((a > b) + (a == b) / 2 for a in swapped for b in others) / (len(swapped) * len(others))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [("answer",), ("think", "answer")])
def test_swapped_answers_are_found(columns, tmp_path, train_py):
    """5 % of the sample's answers, alone or with their thinking, are those of another complaint."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    drawn = random.Random(7)
    for index in drawn.sample(range(len(rows)), len(rows) // 20):
        other = drawn.choice([row for row in rows if row["instruction"] != rows[index]["instruction"]])
        rows[index] |= {name: other[name] for name in columns} | {"swapped": "yes"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    args = ["tiny", "--dataset", tmp_path / "rows.jsonl", "--max-steps", 540, "--eval-steps", 60, "--num-samples", 0]
    train_py(*args, "--output-dir", out, timeout=1800, OMP_NUM_THREADS=None)
    subprocess.run([sys.executable, "-m", "tools.rows", out], cwd=ROOT, check=True, capture_output=True)
    scores = [(line["suspect"], "swapped" in line["columns"]) for line in table(out)]
    assert sum(is_swapped for _, is_swapped in scores) == 40
    assert area(scores) >= 0.95
