"""Rewritten questions in the data: which wording an epoch trains, and that no held-out question comes in with one."""

import json
import math

import pytest
from conftest import good_row, load, settings
from ranks import run

from data.dataset import load_data
from data.encode import encode_rows
from data.reading.formats import read_row
from data.reading.rows import Row
from model.qwen3 import tiny_tokenizer

REWRITES = {5: ["甲5？", "乙5？"], 7: ["甲7？"], 11: ["甲11？", "乙11？", "丙11？"]}


def rows(rewrites: dict[int, list[str]], number: int = 20) -> list[dict]:
    return [good_row(i) | ({"rewrites": rewrites[i]} if i in rewrites else {}) for i in range(number)]


def read(path, **changes):
    return load_data(settings(dataset=(str(path),), **changes), tiny_tokenizer, 0, 1)


def questions(data, step: int, config) -> list[str]:
    """In the order of the batch."""
    ids = [micro_batch.inputs["input_ids"][0] for micro_batch in data.batch(step, config).micro_batches]
    text = "".join(data.tokenizer.decode(part) for part in ids)
    return [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]


def test_each_epoch_trains_one_wording_of_each_row_and_all_of_them_in_turn(jsonl):
    """As many rows and steps as without rewrites; the order of rows is the same, and the wording that of its place."""
    config = settings(gradient_accumulation_steps=4, micro_batch_tokens=0)
    plain, data = read(jsonl(rows({}), "plain.jsonl")), read(jsonl(rows(REWRITES)))
    steps = data.steps_per_epoch(config)
    assert steps == plain.steps_per_epoch(config) == math.ceil(len(data.train) / 4)
    place = {row.asked[0]: number for number, row in enumerate(data.split.train)}
    wordings = {row.asked[0]: [row.asked[0], *row.rewrites] for row in data.split.train}
    assert sum(len(found) > 1 for found in wordings.values()) >= 2  # are not held out
    for epoch in range(6):
        order = [q for step in range(epoch * steps, (epoch + 1) * steps) for q in questions(plain, step, config)]
        found = [q for step in range(epoch * steps, (epoch + 1) * steps) for q in questions(data, step, config)]
        assert found == [wordings[q][(place[q] + epoch) % len(wordings[q])] for q in order]


def test_the_reply_stays_and_only_the_question_is_another(jsonl):
    data = read(jsonl(rows(REWRITES)))
    rewrites = data.wordings.rewrites
    row = next(row for row in data.split.train if row.rewrites)
    by_hand = [
        Row("", {}, [{**m, "content": text} if m["role"] == "user" else m for m in row.messages])
        for text in row.rewrites
    ]
    expected, _ = encode_rows(by_hand, data.tokenizer, 512, "error")
    place = next(n for n in range(len(data.train)) if data.train[n].location == row.location)
    assert [rewrites[n].input_ids.tolist() for n in data.wordings.numbers[place]] == [
        example.input_ids.tolist() for example in expected
    ]
    own = data.train[place]
    for example in expected:
        assert own.input_ids[own.prompt_length :].tolist() == example.input_ids[example.prompt_length :].tolist()
    assert data.wordings.lengths[place] == max(map(len, [own, *expected]))


def test_validation_and_split_are_those_without_rewrites(jsonl):
    """Also of rows that have some and are held out."""
    all_rows = {i: [f"改{i}？"] for i in range(20)}
    plain, data = load(jsonl(rows({}), "plain.jsonl")), load(jsonl(rows(all_rows)))
    assert [row.messages for row in data.val] == [row.messages for row in plain.val]
    assert [row.messages for row in data.train] == [row.messages for row in plain.train]
    assert data.report["rewrites"] == data.report["rewritten_rows"] == len(data.train) == 18


def test_a_rewrite_that_is_held_out_is_removed(jsonl, tmp_path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": "考试题目？", "answer": "A"}) + "\n")
    val = jsonl([good_row(100)], "val.jsonl")
    given = jsonl(rows({0: ["第100个 问题？", "考试题目", "甲0？"]}))
    split = load(given, val_dataset=(str(val),), exclude=(str(exam),))
    row = next(row for row in split.train if row.rewrites)
    assert row.rewrites == ("甲0？",) and split.report["rewrites"] == 1 and len(split.train) == 20
    removed = [problem for problem in split.report["problems"] if problem["action"] == "rewrite removed"]
    assert [problem["problem"] for problem in removed] == [
        "a rewrite is also a validation question (val.jsonl:1)",
        "a rewrite is in a file of --exclude or --exam",
    ]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["甲？", " 甲？ ", "", "问？"], ("甲？",)),  # blank ones, repeats and the question itself are none
        ('["甲？", "乙？"]', ("甲？", "乙？")),  # as a table holds a list
        ("甲？", ("甲？",)),
        (None, ()),
        ([], ()),
    ],
)
def test_rewrites_of_a_row(value, found):
    row = read_row({"question": "问？", "answer": "答。", "rewrites": value})
    assert row.rewrites == found and not row.unused


def test_rewrites_that_cannot_be_used():
    given = ["甲？", "x<|im_end|>\n<|im_start|>assistant\n", "None"]
    row = read_row({"question": "问？", "answer": "答。", "rewrites": given})
    assert row.rewrites == ("甲？",)
    assert row.notes == [
        ("a rewrite has the chat marker <|im_end|> inside its text", "rewrite not used"),
        ("a rewrite `rewrites` is 'None', as pandas writes an empty cell", "rewrite not used"),
    ]
    assert read_row({"question": "问？", "answer": "答。", "rewrites": "[女，28岁] 怎么办？"}).rewrites == (
        "[女，28岁] 怎么办？",
    )
    with pytest.raises(ValueError, match="`rewrites` is not a list of texts"):
        read_row({"question": "问？", "answer": "答。", "rewrites": [1]})
    turns = [{"role": role, "content": f"{role}{i}"} for i in range(2) for role in ("user", "assistant")]
    row = read_row({"messages": turns, "rewrites": ["甲？"]})
    assert row.rewrites == () and row.notes == [
        ("has rewrites of a dialogue with several questions", "rewrites not used")
    ]


@pytest.mark.integration
def test_a_run_says_what_it_trains_and_goes_on_with_nothing_else(jsonl, tmp_path):
    args = ["tiny", "--max-steps", 2, "--num-samples", 0, "--output-dir", tmp_path / "run", "--dataset"]
    done = run([*args, jsonl(rows(REWRITES))], log=tmp_path / "log")
    said = "6 other wordings of 3 questions, one wording in each epoch"
    assert done.codes == [0] and said in done.output and "`rewrites` → rewrites (3 rows)" in done.output, done.output
    assert "rewrites" in (tmp_path / "run/report.md").read_text(encoding="utf-8")
    done = run([*args, jsonl(rows({}), "other.jsonl"), "--resume"], log=tmp_path / "log")
    assert done.codes == [2] and "train_rows" in done.output, done.output
