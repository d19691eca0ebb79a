"""What is trained on: the bytes, the targets, the rows, their order."""

import copy
import csv
import json
import random
import re
from collections import Counter

import pytest
from conftest import REAL, ROOT, SYSTEM, good_row, load
from transformers import AutoTokenizer

from data.base.errors import UserError
from data.batches import collate, rank_batches, step_batch, step_indices, steps_per_epoch
from data.encode import encode_rows
from data.reading.formats import read_row
from data.reading.rows import Row
from data.split import split_files, to_format

USER = {"role": "user", "content": "头痛怎么办？"}
THOUGHT = {"role": "assistant", "content": "多休息。", "reasoning_content": "先排除危险信号。"}
PLAIN = {"role": "assistant", "content": "多喝水。"}
TURNS = {
    "one": [USER, THOUGHT],
    "one, no thinking": [USER, PLAIN],
    "two": [USER, THOUGHT, USER, THOUGHT],
    "two, last without thinking": [USER, THOUGHT, USER, PLAIN],
    "three": [USER, PLAIN, USER, THOUGHT, USER, THOUGHT],
}


def real_tokenizer():
    if not REAL.exists():
        pytest.skip("the real tokenizer is not here")
    return AutoTokenizer.from_pretrained(REAL / "qwen3_tokenizer")


def with_qwen3_template(tokenizer):
    """With the chat template of Qwen3-1.7B, as published under Apache-2.0."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (ROOT / "tests/qwen3_chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(params=["tiny", "tiny with Qwen3's template", "real"])
def any_tokenizer(request, tokenizer):
    if request.param == "real":
        return real_tokenizer()
    return tokenizer if request.param == "tiny" else with_qwen3_template(tokenizer)


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("name", TURNS)
def test_training_bytes_are_what_inference_renders(any_tokenizer, name, system):
    messages = read_row({"messages": TURNS[name]}, system).messages
    examples, _ = encode_rows([Row("row", {}, messages)], any_tokenizer, 512, "error")
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(examples) == len(ends)
    for example, end in zip(examples, ends, strict=True):
        reply, ids = messages[end], example.input_ids.tolist()
        thinks = "reasoning_content" in reply
        prompt = any_tokenizer.apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
        )
        block = f"<think>\n{reply['reasoning_content']}\n</think>" if thinks else ""
        answer = ("\n\n" if thinks else "") + reply["content"] + "<|im_end|>"
        assert any_tokenizer.decode(ids[: example.prompt_length]) == prompt
        assert any_tokenizer.decode(ids[example.prompt_length : example.answer_start]) == block
        assert any_tokenizer.decode(ids[example.answer_start :]) == answer
        whole = any_tokenizer.apply_chat_template(messages[: end + 1], tokenize=False)
        assert any_tokenizer.decode(ids) + "\n" == whole


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("thinking", [True, False])
def test_tiny_template_renders_as_qwen3(tokenizer, name, thinking):
    messages, qwen3 = read_row({"messages": TURNS[name]}, SYSTEM).messages, with_qwen3_template(tokenizer)
    for part, prompt in ((messages, False), (messages[:-1], True)):
        options = {"tokenize": False, "add_generation_prompt": prompt, "enable_thinking": thinking}
        assert tokenizer.apply_chat_template(part, **options) == qwen3.apply_chat_template(part, **options)


def test_targets_of_real_rows():
    tokenizer = real_tokenizer()
    split = load(REAL / "delicate_medical_r1_120.jsonl")
    examples, problems = encode_rows(split.train, tokenizer, 2048, "truncate")
    assert len(examples) == len(split.train) == 108 and not problems
    for row, example in zip(split.train, examples, strict=True):
        target = tokenizer.decode(example.input_ids[example.prompt_length :])
        think, answer = row.columns["think"].strip(), row.columns["answer"].strip()
        assert target == f"<think>\n{think}\n</think>\n\n{answer}<|im_end|>"
        assert example.input_ids[-1] == 151645 and example.input_ids[example.answer_start - 1] == 151668


@pytest.mark.parametrize("limit", [85, 95, 105])
def test_truncation_keeps_the_answer_and_the_end(split, any_tokenizer, limit):
    whole, _ = encode_rows(split.train, any_tokenizer, 10_000, "error")
    examples, problems = encode_rows(split.train, any_tokenizer, limit, "truncate")
    too_long = sum(len(example) > limit for example in whole)
    actions = Counter(problem["action"] for problem in problems)
    assert too_long == len(problems) > 0
    assert len(examples) == len(whole) - actions["dropped"]
    by_place = {example.location: example for example in whole}
    for example in examples:
        before = by_place[example.location]
        assert len(example) <= limit
        answer = example.input_ids[example.answer_start :].tolist()
        assert answer == before.input_ids[before.answer_start :].tolist()
        text, full = (any_tokenizer.decode(e.input_ids[e.prompt_length : e.answer_start]) for e in (example, before))
        assert full.startswith(text.removesuffix("\n</think>").rstrip()) and text.endswith("\n</think>")
        assert len(text) > len("<think>\n\n</think>")


def test_overlong_drop_and_error(split, tokenizer):
    examples, problems = encode_rows(split.train, tokenizer, 90, "drop")
    assert len(examples) + len(problems) == len(split.train)
    assert all(len(example) <= 90 for example in examples)
    with pytest.raises(UserError, match=r"rows are too long.*sample.jsonl:\d+ has \d+ tokens.*--max-length"):
        encode_rows(split.train, tokenizer, 90, "error")


def test_split_is_the_original_one(jsonl):
    rows = [good_row(index) for index in range(57)]
    split = load(jsonl(rows))
    random.seed(42)
    random.shuffle(rows)
    cut = int(57 * 0.9)
    assert [row.columns for row in split.train] == rows[:cut]
    assert [row.columns for row in split.val] == rows[cut:]


def test_split_files_are_those_of_the_source(jsonl):
    for answer in ("旧", "新"):
        rows = [{**good_row(index), "answer": answer, "extra": index} for index in range(20)]
        split = load(jsonl(rows))
        files = split_files(split)
    lines = [json.loads(line) for line in files["train.jsonl"]]
    assert [line["answer"] for line in lines] == ["新"] * 18 and {"extra", "think"} <= lines[0].keys()
    line = json.loads(next(iter(files["val_format.jsonl"])))
    val = split.val[0].columns
    assert line == {
        "instruction": SYSTEM,
        "input": val["question"],
        "output": f"<think>\n{val['think'].strip()}\n</think>\n\n新",
    }
    assert len(to_format(Row("", {}, read_row({"messages": TURNS["three"]}, SYSTEM).messages))) == 3


BAD_ROWS = {
    "has no answer": {"question": "问", "think": "想"},
    "has no question": {"think": "想", "answer": "答"},
    "`answer` is 'nan', as pandas": {"question": "问", "think": "想", "answer": "nan"},
    "`question` is empty": {"question": " \n", "think": "想", "answer": "答"},
    "`answer` is not text but int": {"question": "问", "think": "想", "answer": 3},
    "`think` is not text but list": {"question": "问", "think": ["想"], "answer": "答"},
    "has the chat marker </think> inside": {"question": "问", "think": "想</think>想", "answer": "答"},
    "has the chat marker <\\|im_end\\|> inside": {"question": "问<|im_end|>", "think": "想", "answer": "答"},
    "is not an object but list": ["问"],
    "is not valid JSON": b'{"question": "half',
    "is not valid UTF-8": b'{"question": "\xff\xfe"}',
    "half a character": b'{"question": "\\ud800", "think": "a", "answer": "b"}',
    "roles must be user, assistant in turn": {"messages": [USER, USER]},
    "`messages` is not a list": {"messages": "你好"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_named_and_skipped(jsonl, reason):
    path = jsonl([good_row(index) for index in range(14)] + [BAD_ROWS[reason]] + [good_row(20)])
    split = load(path, val_fraction=0.2)
    (problem,) = split.report["problems"]
    assert problem["location"] == "rows.jsonl:15" and problem["action"] == "skipped"
    assert re.search(reason, problem["problem"])
    assert len(split.train) + len(split.val) == 15


def test_too_many_bad_rows_stop_the_run(jsonl):
    path = jsonl([good_row(index) for index in range(8)] + [{"question": "问"}])
    with pytest.raises(UserError, match=r"1 of 9 rows are unusable.*rows.jsonl:9 has no answer"):
        load(path, val_fraction=0.2)
    with pytest.raises(UserError, match="nothing left to train on"):
        load(jsonl([good_row(1)]), val_fraction=0.5)


def test_repeats_and_leaks(jsonl):
    rows = [good_row(index) for index in range(30)]
    clean = load(jsonl(rows), val_fraction=0.2)
    held_out, trained = clean.val[0].columns, clean.train[0].columns
    index = rows.index(clean.train[1].columns)
    rows[index] = {**rows[index], "question": f" {held_out['question']}\n"}  # a leak, whitespace aside
    rows[rows.index(clean.train[2].columns)] = trained  # the same row twice
    split = load(jsonl(rows), val_fraction=0.2)
    assert (split.report["train_val_overlap"], split.report["duplicates"]) == (1, 1)
    assert len(split.train) == len(clean.train) - 2
    assert [row.columns for row in split.val] == [row.columns for row in clean.val]
    assert not {row.questions[-1] for row in split.train} & {row.questions[-1] for row in split.val}


def test_every_file_type_reads_alike(jsonl, tmp_path):
    import pyarrow.parquet

    rows = [good_row(index) for index in range(20)]
    paths = [jsonl(rows), tmp_path / "rows.json", tmp_path / "rows.csv", tmp_path / "rows.parquet"]
    paths[1].write_text(json.dumps(rows))
    with paths[2].open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    splits = [load(path) for path in paths]
    assert all([row.messages for row in split.train] == [row.messages for row in splits[0].train] for split in splits)


def test_inline_thinking_and_a_system_message_of_its_own():
    inline = {"role": "assistant", "content": "<think>\n先排除危险信号。\n</think>\n\n多休息。"}
    own = {"role": "system", "content": "你是护士。"}
    assert read_row({"messages": [USER, inline]}, "").messages == [USER, THOUGHT]
    assert read_row({"messages": [own, USER, THOUGHT]}, SYSTEM).messages[0] == own


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_an_epoch_in_an_order_of_its_own(examples, world_size):
    """54 rows, 8 a step: six whole steps and a short one of 6 rows, which 3 ranks cannot share evenly in 4s."""
    examples = examples[:54]
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(7 * epoch, 7 * epoch + 7):
            shares = [
                step_batch(
                    step,
                    examples,
                    batch_size=2,
                    micro_batch_tokens=0,
                    rows_per_step=8,
                    seed=1,
                    rank=rank,
                    world_size=world_size,
                )
                for rank in range(world_size)
            ]
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert shares[0].num_tokens == sum(
                len(examples[i]) for i in step_indices(step, num_examples=54, rows_per_step=8, seed=1)
            )
            targets = sum(len(m.is_think) for share in shares for m in share.micro_batches)
            rows = shares[0].rows
            by_place = {example.location: example for example in examples}
            assert targets == sum(len(by_place[row]) - by_place[row].prompt_length for row in rows)
            seen += rows
        assert Counter(seen) == Counter(example.location for example in examples)
        assert shares[0].epoch == epoch + 1
        orders.append(seen)
    assert orders[0] != orders[1] and steps_per_epoch(54, 8) == 7


def test_a_micro_batch_has_no_padding(examples):
    (batch,) = rank_batches([examples[3], examples[5]], batch_size=2)
    first, second = examples[3], examples[5]
    batch, is_think = batch.inputs, batch.is_think
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, len(first) + len(second))
    assert batch["cu_seqlens"].tolist() == [0, len(first), len(first) + len(second)]
    assert batch["max_seqlen"] == max(len(first), len(second))
    assert batch["position_ids"][0].tolist() == [*range(len(first)), *range(len(second))]
    next_ids = batch["input_ids"][0][batch["target_positions"] + 1]
    assert next_ids.tolist() == batch["target_ids"].tolist()
    expected = [i for e in (first, second) for i in e.input_ids[e.prompt_length :].tolist()]
    assert batch["target_ids"].tolist() == expected
    assert is_think.sum() == sum(e.answer_start - e.prompt_length for e in (first, second))
    assert collate([first]).inputs["target_positions"].min() == first.prompt_length - 1


@pytest.mark.parametrize("overlong", ["truncate", "drop", "error"])
def test_rows_around_the_longest_length(tokenizer, overlong):
    """Each length around the limit, with and without thinking, alone and after other turns: what is kept fits and ends
    as it should, what is not is listed, and thinking alone is shortened."""
    think, limit, close = "想" * 40, 64, tokenizer.convert_tokens_to_ids("</think>")
    rows = []
    for length in (1, 20, *range(28, 60), 200):
        for thinking in (None, "想", think):
            for turns in (1, 2):
                reply = {"role": "assistant", "content": "水" * length}
                last = reply | ({"reasoning_content": thinking} if thinking else {})
                before = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}] * (turns - 1)
                messages = [*before, {"role": "user", "content": "问"}, last]
                rows.append(Row(f"{length}/{thinking}/{turns}", {}, messages))
    try:
        examples, problems = encode_rows(rows, tokenizer, limit, overlong)
    except UserError as error:
        assert overlong == "error" and "more than max_length 64" in str(error)
        return
    assert overlong != "error" and all(len(example) <= limit for example in examples)
    wanted = sum(message["role"] == "assistant" for row in rows for message in row.messages)
    assert len(examples) + sum(problem["action"] == "dropped" for problem in problems) == wanted
    assert (overlong == "truncate") == any(problem["action"] == "thinking shortened" for problem in problems)
    for example in examples:
        ids = example.input_ids.tolist()
        answer = tokenizer.decode(ids[example.answer_start :]).strip().removesuffix("<|im_end|>")
        length, _, _ = example.location.split("/")
        assert answer in ("水" * int(length), "答")
        assert (ids[example.answer_start - 1] == close) == (
            example.num_think_targets > 0
        ) or not example.num_think_targets


def test_a_text_that_spells_a_control_token_is_dropped_and_told(tokenizer):
    """Of the tokenizer's own, whatever they look like."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<｜end▁of▁sentence｜>"], special_tokens=True)
    reply = {"role": "assistant", "content": "答"}
    asked = {"a": "问<｜end▁of▁sentence｜>", "b": "问"}
    rows = [Row(name, {}, [{"role": "user", "content": text}, reply]) for name, text in asked.items()]
    examples, problems = encode_rows(rows, tokenizer, 64, "error")
    assert [example.location for example in examples] == ["b"]
    assert problems == [{"location": "a", "action": "dropped",
                         "problem": "has the control token <｜end▁of▁sentence｜> inside its text"}]  # fmt: skip


NOTHING = "\u200b\u2060\ufeff\u00ad\u3164\u2800\u200e \u3000\x00"


def test_a_text_that_shows_nothing_is_no_text():
    for role in ("question", "answer"):
        with pytest.raises(ValueError, match=f"`{role}` is empty"):
            read_row({"question": "问", "answer": "答"} | {role: NOTHING})
    row = read_row({"question": "问", "think": NOTHING, "answer": f"{NOTHING}<think>想</think>答"})
    assert row.messages[-1] == {"role": "assistant", "content": "答", "reasoning_content": "想"}


@pytest.mark.parametrize(
    "value", ["文字", 3, 2.5, True, {"text": "文字"}, {"甲": 1}, ["文字"], [3], [{"text": "文字"}], [[]]]
)
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "think", "reasoning_details", "content",
                                 "name", "loss", "weight"])  # fmt: skip
def test_a_known_key_of_a_message_is_read_in_each_form_or_named(key, value):
    reply = {"role": "assistant", "content": "答", key: value}
    try:
        row = read_row({"messages": [{"role": "user", "content": "问"}, reply]})
    except ValueError as reason:
        assert str(reason)
        return
    said = json.dumps(row.messages, ensure_ascii=False)
    text = value if isinstance(value, str) else "文字" if "文字" in json.dumps(value, ensure_ascii=False) else None
    is_named = any(key in unused for unused in row.unused)
    assert is_named or (text is not None and text in said) or (key in ("loss", "weight") and value in (0, 1))
