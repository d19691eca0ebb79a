"""Feedback: kept whole, read as the dialogues that it teaches, exported as pairs."""

import json
import multiprocessing
import sys

import pytest
from conftest import SYSTEM, good_row, load

from data.base.errors import UserError
from data.encode import encode_rows
from data.reading.feedback import append_feedback, correction_of, newest, take_feedback
from tools.feedback import main as feedback
from tools.feedback import pairs
from tools.page.replies import Page, Replies

QUESTION = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "头晕？"}]
REPLY = {"role": "assistant", "content": "多喝水。", "reasoning_content": "想一想。"}


def line(name: str, verdict: str, **more) -> dict:
    return {"id": name, "messages": [*QUESTION, REPLY], "verdict": verdict, **more}


def write_many(path, writer: int) -> None:
    for number in range(50):
        append_feedback(path, {"id": f"{writer}-{number}", "text": "长" * 3000})


def test_no_line_is_lost_if_two_pages_write_at_once(tmp_path):
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(b'{"id": "cut off by a ki')
    processes = [multiprocessing.get_context("spawn").Process(target=write_many, args=(path, w)) for w in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first == '{"id": "cut off by a ki'
    assert {json.loads(text)["id"] for text in lines} == {f"{w}-{n}" for w in range(2) for n in range(50)}


def test_a_new_file_is_its_owners_alone(tmp_path):
    page = Page("tiny/best", {}, SYSTEM, True, {"max_new_tokens": 9}, 7860, tmp_path / "feedback.jsonl", "abc")
    replies = Replies(page)
    name = replies.begin(QUESTION, {"thinking": True, "temperature": 0.6})
    assert replies.find(name) is None  # nothing has come yet
    replies.known[name] |= {"think": "想一想。", "answer": "多喝水。"}
    replies.rate(name, "edit", "张三", reason="少了检查", correction={"content": "先量血压。"})
    assert page.feedback.stat().st_mode & 0o777 == 0o600
    kept = json.loads(page.feedback.read_text(encoding="utf-8"))
    assert kept.pop("time").endswith("+00:00") and kept.pop("id") == name
    assert kept.pop("AIGC") == {"Label": "1", "ContentProducer": "tiny/best", "ProduceID": name}
    assert kept == {
        "rater": "张三",
        "session": "",
        "model": "tiny/best",
        "model_sha256": "abc",
        "settings": {"thinking": True, "temperature": 0.6},
        "messages": [*QUESTION, REPLY],
        "verdict": "edit",
        "correction": {"content": "先量血压。"},
        "reason": "少了检查",
    }


@pytest.fixture
def kept(jsonl):
    """Every kind of line: a correction with thinking after a dislike, one without, an empty one, a like, a dislike, and
    one of a second turn."""
    earlier = [*QUESTION, {"role": "assistant", "content": "早先的回答。"}, {"role": "user", "content": "还晕？"}]
    return jsonl(
        [
            line("a", "dislike"),
            line("a", "edit", correction={"content": "先量血压。", "reasoning_content": "血压最要紧。"}),
            line("b", "edit", correction={"content": "去医院。", "reasoning_content": " "}),
            line("c", "edit", correction={"content": "  "}),
            line("d", "like") | {"messages": [*QUESTION[:1], {"role": "user", "content": "咳嗽？"}, REPLY]},
            line("e", "dislike"),
            line("f", "edit", correction={"content": "再量一次。"}) | {"messages": [*earlier, REPLY]},
        ],
        "feedback.jsonl",
    )


@pytest.mark.parametrize("train_liked", [False, True])
def test_what_is_trained_of_a_file(kept, jsonl, tokenizer, train_liked):
    rows = jsonl([good_row(index) for index in range(20)])
    split = load(rows, kept, val_dataset=(str(jsonl([good_row(99)], "val.jsonl")),), train_liked=train_liked)
    taught = {row.messages[-1]["content"]: row for row in split.train if row.dataset == "feedback"}
    assert taught.keys() == {"先量血压。", "去医院。", "再量一次。"} | ({"多喝水。"} if train_liked else set())
    assert taught["先量血压。"].messages[-1]["reasoning_content"] == "血压最要紧。"
    assert "reasoning_content" not in taught["去医院。"].messages[-1]
    second = encode_rows([taught["再量一次。"]], tokenizer, 512, "error")[0]
    assert len(second) == 1  # the reply of the first turn is the model's own
    text = tokenizer.decode(second[0].input_ids[second[0].prompt_length :])
    assert text == "再量一次。<|im_end|>"
    (note,) = split.report["datasets"][1]["notes"]
    liked = "1 liked answers trained" if train_liked else "1 liked answers not trained (--train-liked trains them)"
    assert note == (
        f"feedback: 3 corrected answers trained, {liked}, 1 disliked answers without a correction not trained "
        "(recipes/kto.py learns from them), "
        "1 empty corrections not trained, 1 lines replaced by later ones"
    )
    assert split.report["unusable"] == 0


def test_a_file_of_dislikes_alone_teaches_nothing(jsonl):
    with pytest.raises(UserError, match="nothing left to train on"):
        load(jsonl([line("a", "dislike")]), val_dataset=(str(jsonl([good_row(1)], "val.jsonl")),))


@pytest.mark.parametrize("form", ["trl", "swift"])
def test_pairs(kept, form, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools.feedback", str(kept), "--export", form])
    feedback()
    said = capsys.readouterr().out
    assert "6 replies: 3 corrected, 1 liked, 1 disliked without a correction, 1 empty correction" in said
    out = kept.with_name(f"feedback.{form}.jsonl")
    first, *_, last = found = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 3
    chosen = {"role": "assistant", "content": "<think>\n血压最要紧。\n</think>\n\n先量血压。"}
    rejected = "<think>\n想一想。\n</think>\n\n多喝水。"
    if form == "trl":
        assert first == {
            "prompt": QUESTION,
            "chosen": [chosen],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        assert [message["role"] for message in last["prompt"]] == ["system", "user", "assistant", "user"]
    else:
        assert first == {"messages": [*QUESTION, chosen], "rejected_response": rejected}
    with pytest.raises(SystemExit, match="exists; name another file with --out"):
        feedback()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([good_row(1)], "has no line of feedback"), ([line("a", "like")], "no reply has a correction")],
)
def test_a_file_without_pairs_is_told(jsonl, rows, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools.feedback", str(jsonl(rows)), "--export", "trl"])
    with pytest.raises(SystemExit, match=message):
        feedback()


def test_a_thumb_after_a_correction_leaves_it(tmp_path):
    replies = Replies(Page("m", {}, "", True, {"max_new_tokens": 9}, 7860, tmp_path / "feedback.jsonl"))
    name = replies.begin(QUESTION, {})
    replies.known[name]["answer"] = "多喝水。"
    replies.rate(name, "edit", correction={"content": "先量血压。"})
    for verdict in ("like", "withdrawn"):
        replies.rate(name, verdict)
        lines = [json.loads(text) for text in replies.page.feedback.read_text(encoding="utf-8").splitlines()]
        rows, _ = take_feedback([(str(number), row) for number, row in enumerate(lines)], False)
        assert [row["messages"][-1]["content"] for _, row in rows] == ["先量血压。"]


def test_lines_without_an_id_stand_for_themselves():
    lines = [(str(n), line(name, "edit", correction={"content": "好"})) for n, name in enumerate(("", None, ["x"], 5))]
    assert len(newest(lines)) == 4


def test_hostile_lines():
    for correction in (None, 3, [], {}, {"content": None}, {"content": 5, "reasoning_content": []}):
        correction_of({"correction": correction})
    rows = [3, *({"verdict": "like", "messages": messages} for messages in ("no", [], [3], None, [{}]))]
    assert len(take_feedback([(str(number), row) for number, row in enumerate(rows)], True)[0]) == len(rows)
    assert pairs([{"messages": [{}], "verdict": "edit", "correction": {"content": "好"}}], "trl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verdict": "up"}, "has the verdict 'up'"),
        ({"verdict": "Edit", "correction": {"content": "改"}}, "has the verdict 'Edit'"),
        ({"verdict": None, "correction": {"content": "改"}}, "has the verdict None"),
        ({"verdict": "edit", "correction": "改"}, "its correction is not an object"),
        ({"verdict": "edit", "correction": {"content": ["改"]}}, "its correction is not an object"),
        ({"verdict": "like", "messages": QUESTION}, "do not end with a reply"),
        ({"verdict": "like", "messages": "问"}, "has no list of messages"),
    ],
)
def test_a_line_that_cannot_be_understood_is_neither_trained_nor_counted(change, reason, jsonl, tool):
    from tools import feedback as module

    more = [line(str(n), "dislike") for n in range(30)]
    fixed = line("a", "edit", correction={"content": "对。"})
    path = jsonl([*more, fixed, {**line("b", "edit"), **change}, b'{"id": "cut of'], "feedback.jsonl")
    split = load(jsonl([good_row(n) for n in range(30)], "rows.jsonl"), path,
                 val_dataset=(str(jsonl([good_row(99)], "val.jsonl")),))  # fmt: skip
    taught = [row.messages[-1]["content"] for row in split.train if row.dataset == "rows"]
    assert len(split.train) == 31 and REPLY["content"] not in [row.messages[-1]["content"] for row in split.train], (
        taught
    )
    code, said = tool(module, path)
    assert code == 0 and "31 replies: 1 corrected" in said and reason in said and "is not valid JSON" in said


def test_a_correction_takes_the_place_of_the_answers_to_its_question(jsonl):
    """And one of a validation question is counted as what it is: left out."""
    rows = [good_row(n) for n in range(20)]

    def corrected(name, row):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        return {"id": name, "messages": messages, "verdict": "edit", "correction": {"content": f"改{name}。"}}

    val = [good_row(n) for n in (50, 51)]
    path = jsonl([corrected("a", rows[3]), corrected("b", val[0]), corrected("c", good_row(77))], "feedback.jsonl")
    split = load(jsonl(rows), path, val_dataset=(str(jsonl(val, "val.jsonl")),))
    answers = {row.asked[0]: row.messages[-1]["content"] for row in split.train}
    assert len(split.train) == len(answers) == 21 and answers[rows[3]["question"]] == "改a。"
    assert [problem["action"] for problem in split.report["problems"]].count("replaced") == 1
    (note,) = split.report["datasets"][1]["notes"]
    assert note == "feedback: 2 corrected answers trained (1 left out, see below)"
