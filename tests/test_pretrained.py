"""From a pretrained model to a chat, honestly: pytest -m slow tests/test_pretrained.py"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import metrics_of
from smollm import rows, smollm

ARGS = ["tiny", "--system-prompt", "", "--val-fraction", "0.2", "--max-length", "128", "--learning-rate", "5e-4",
        "--num-train-epochs", "4", "--eval-steps", "6", "--sample-max-new-tokens", "64", "--seed", "1"]  # fmt: skip


@pytest.mark.slow
def test_a_pretrained_model_learns_to_think_answer_and_stop(train_py, jsonl, tmp_path):
    """Questions that it was not trained on: every block is closed, every reply stops, most capitals are right."""
    args = ["--model", smollm(tmp_path), "--dataset", jsonl(rows()), "--output-dir", tmp_path / "run"]
    train_py(*ARGS, *args, timeout=1800)
    first, last = metrics_of(tmp_path / "run")[0], metrics_of(tmp_path / "run")[-1]
    assert first["format/closed"] == 0.0
    assert last["best_format/closed"] == last["best_format/answered"] == last["best_format/stopped"] == 1.0
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    best = [sample for sample in samples if sample["model"] == "best"]
    assert len(best) == 6
    assert sum(sample["reference"] in sample["answer"] for sample in best) >= 4
    assert sum(sample["reference"].split()[-1].strip(".") in sample["think"] for sample in best) >= 4

    command = [sys.executable, "-m", "tools.chat", str(tmp_path / "run/best"), "--temperature", "0", "--json"]
    command += ["--question", "What is the capital of Mongolia?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    reply = json.loads(done.stdout)
    print(done.stdout)
    assert reply["closed"] and reply["stopped"] and "Mongolia" in reply["answer"]
