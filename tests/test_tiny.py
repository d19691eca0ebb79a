"""The README's first command, as everyone runs it first: what it shows, and what its model has learned."""

import json

import pytest
import torch
from runs import metrics_of, status_of

from benchmarks.make_sample import ROWS_OF_EACH, make_rows
from data.reading.formats import read_row
from data.reading.source import SAMPLE
from loop.evaluate import rise_of
from model.generate import format_rates, load_for_generation, reply_to
from tools.reports.record import read_tables


def test_the_sample_is_what_its_script_makes():
    rows = make_rows()
    assert [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()] == rows
    assert len(rows) == 800 and len({row["department"] for row in rows}) == 800 / ROWS_OF_EACH


@pytest.mark.slow
@pytest.mark.integration
def test_tiny_overfits_and_answers_questions_that_it_has_not_seen(train_py, tmp_path):
    """The loss falls, turns and rises; of 80 held-out questions 90 % get thinking that is closed, an answer that
    ends by itself, and the right department."""
    out = tmp_path / "tiny"
    done = train_py("tiny", "--output-dir", out, timeout=1800, OMP_NUM_THREADS=None)
    assert "已早停" in done.stdout and status_of(out)["status"] == "early_stopped"
    losses = [row["eval/loss"] for row in metrics_of(out) if "eval/loss" in row]
    best = losses.index(min(losses))
    assert losses[0] > 7 and losses[best] < 0.3 and best == len(losses) - 4 and losses[-1] > losses[best] * 1.005
    # Whether it is called overfitting depends on the error, which over 80 rows is about as large as the rise.
    steps = {30 * best, 30 * (len(losses) - 1)}
    before, after = (read_tables(out / "eval_rows.jsonl", steps)[step] for step in sorted(steps))
    rise, error = rise_of(before, after, {"think": 1.0, "answer": 1.0})
    said = "**是。** 评估损失在" if rise > 2 * error else "**尚不明显。** 评估损失在"
    report = (out / "report.md").read_text(encoding="utf-8")
    assert said in report and f"{rise:.4f} ± {error:.4f}（按 80 条配对，± 为标准误）" in report

    rows = [json.loads(line) for line in (out / "data/val.jsonl").read_text(encoding="utf-8").splitlines()]
    system = json.loads((out / "run.json").read_text(encoding="utf-8"))["system_prompt"]
    model, tokenizer = load_for_generation(str(out / "best"), torch.device("cpu"))
    asked = [
        tokenizer.apply_chat_template(read_row(row, system).messages[:-1], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    replies = reply_to(model, tokenizer, asked, max_new_tokens=256)
    rates = format_rates(replies)
    right = [row["department"] in reply.answer for row, reply in zip(rows, replies, strict=True)]
    assert len(rows) == 80 and sum(right) / len(right) >= 0.9, (rates, right)
    assert min(rates["closed"], rates["answered"], rates["stopped"]) >= 0.9 and rates["empty_think"] <= 0.1, rates
    trained = {json.loads(line)["question"] for line in (out / "data/train.jsonl").read_text("utf-8").splitlines()}
    assert not trained & {row["question"] for row in rows}
