"""Votes, forms, marks and lines above a reply; what is counted, followed up and taken back."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, good_row
from ranks import run

from data.base.errors import UserError
from data.reading.feedback import append_feedback
from tools import chat, feedback
from tools.page import start, versus
from tools.page.replies import Page, Panel, Replies
from tools.page.show import bubbles, id_from, spoken
from tools.shared import safety
from tools.shared.votes import agreements, kappa, rate, say_forms, say_votes, side

USER, TEXT = {"role": "user", "content": "头晕？"}, chat.TEXTS["zh"]
GRADIO = SimpleNamespace(ChatMessage=lambda content, metadata: SimpleNamespace(
    role="assistant", content=content, metadata=metadata))  # fmt: skip


def vote(verdict: str, rater="张三", question="头晕？", left="a", **more) -> dict:
    replies = [{"role": "assistant", "content": text, "model": text} for text in ("甲", "乙")]
    return {"id": f"{rater}-{question}", "rater": rater, "messages": [{"role": "user", "content": question}],
            "replies": replies, "left": left, "verdict": verdict, **more}  # fmt: skip


def test_win_rates_intervals_and_agreement():
    assert rate(8, 10) == "8 of 10 (80%, 95 %: 49% to 94%)"  # Wilson 1927
    # Cohen's example: 20 both yes, 15 both no, 5 and 10 apart.
    assert kappa([("y", "y")] * 20 + [("n", "n")] * 15 + [("y", "n")] * 5 + [("n", "y")] * 10) == pytest.approx(0.4)
    lines = [vote("b", question=str(n), left="ab"[n % 2], group="心内科" if n < 8 else "儿科") for n in range(12)]
    lines += [vote("a", "李四", str(n)) for n in range(3)] + [vote("both_bad", "李四", "3"), vote("b", "李四", "4")]
    said = say_votes(lines)
    assert said[:2] == ["17 votes, A = 甲, B = 乙", "  A better 3, B better 13, both good 0, both bad 1"]
    assert said[2].startswith("  B wins 13 of 16 (81%")
    for part in ("rater 李四: B wins 1 of 4", "group 心内科: B wins 8 of 8"):
        assert any(part in text for text in said), said
    (agreed,) = agreements(lines)
    assert agreed.startswith("张三 and 李四 agree on 1 of 5 questions, κ = 0.00")
    # A rater who always takes the left side is found out.
    always = [vote("ab"[n % 2], question=str(n), left="ab"[n % 2]) for n in range(10)]
    assert side(always).endswith("p = 0.002: a side was preferred") and "preferred" not in side(lines)
    # The same two models, named the other way round, are one comparison.
    other = vote("a", "王五", "x", left="b") | {"replies": vote("a")["replies"][::-1]}
    assert say_votes([*lines, other])[1] == "  A better 3, B better 14, both good 0, both bad 1"
    forms = [{"form": {"safe": answer}} for answer in ("yes", "yes", "no", "cannot_say")] + [{}]
    assert say_forms(forms) == ["4 forms", f"  safe: {rate(2, 3)}; cannot say 1"]


class Stream:
    """A reply without a model: what the question is, and who answers."""

    def __init__(self, causal_lm, tokenizer, dialogue, thinking, **settings):
        self.pieces = [("think", "想。"), ("answer", f"{causal_lm}{random.random()}")]

    def __iter__(self):
        yield from self.pieces


def votes_page(path: Path, questions=(), max_new_tokens=9, turn=False) -> versus.Versus:
    page = Page("A", TEXT, "系统", True, {"max_new_tokens": max_new_tokens}, 7860, path, "sha-A")
    models = [versus.Model("A", "sha-A", "甲", None, "系统"), versus.Model("B", "sha-B", "乙", None, "系统")]
    models = models[::-1] if turn else models
    return versus.Versus(page, models, [versus.Question(text, "组") for text in questions])


def answer(page: versus.Versus, question) -> tuple[dict, list]:
    now = page.begin(question)
    shown = [[*page.stream(GRADIO, now, side)][-1] for side in (0, 1)]
    return now, shown


def test_a_vote_is_of_the_model_that_stood_there_whatever_the_side(tmp_path, monkeypatch):
    monkeypatch.setattr(versus, "ReplyStream", Stream)
    page, seen = votes_page(tmp_path / "votes.jsonl"), set()
    for number in range(30):
        now, shown = answer(page, versus.Question(f"问题{number}"))
        best = next(side for side in (0, 1) if "甲" in shown[side][-1].content)  # A's reply, whichever side
        assert "A" not in shown[0][-1].content.replace("【AI 生成】", "")  # the name is nowhere
        page.vote(now, ("left", "right")[best], " 更完整 ", "张三", "s1")
        seen.add(best)
    lines = [json.loads(text) for text in (tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["verdict"] for line in lines} == {"a"} and seen == {0, 1}
    assert {line["left"] for line in lines} == {"a", "b"} and lines[0]["reason"] == "更完整"
    assert lines[0]["AIGC"] == {"Label": "1", "ContentProducer": "A / B", "ProduceID": lines[0]["id"]}
    with pytest.raises(LookupError):
        page.vote(page.begin(versus.Question("没有回复")), "left", "", "张三", "")


def test_a_list_is_worked_through_by_each_rater_on_the_same_replies(tmp_path, monkeypatch):
    monkeypatch.setattr(versus, "ReplyStream", Stream)
    path, questions = tmp_path / "votes.jsonl", ("一", "二", "三")
    page, texts = votes_page(path, questions), {}
    for rater in ("张三", "李四", "张三"):
        if rater == "李四":
            page = votes_page(path, questions)  # begun again: what was answered and voted is in the file
        question, done = page.next_for(rater)
        assert done == (1 if question.text == "二" else 0)
        now, _ = answer(page, question)
        found = [reply["content"] for reply in now["replies"]]
        assert texts.setdefault(question.text, found) == found
        page.vote(now, "both_good", "", rater, "")
    assert page.next_for("张三")[0].text == "三" and page.next_for("王五") == (page.questions[0], 0)
    # Voted again by the same person, in another tab say, it is one vote, the last.
    now, _ = answer(page, page.questions[0])
    page.vote(now, "both_bad", "", "张三", "")
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    ids = {line["id"] for line in lines if (line["rater"], line["messages"][-1]["content"]) == ("张三", "一")}
    assert len(lines) == 4 and len(ids) == 1
    # Other settings, and no reply is shown as if it came with them; models the other way round, and all is there.
    assert votes_page(path, questions, max_new_tokens=8).replies == {}
    turned = votes_page(path, questions, turn=True)
    assert [reply["model"] for reply in turned.replies["一"]] == ["B", "A"] and turned.next_for("张三")[0].text == "三"
    page.refused.add("三")
    assert page.next_for("张三") == (None, 3)


def test_marks_and_lines_above_a_reply():
    known = {
        "messages": [{"role": "user", "content": "我爸胸口痛，出冷汗"}],
        "think": "想。",
        "answer": "可以含服硝酸甘油。",
    }
    shown = bubbles(GRADIO, "r1", known, 0.0, TEXT, True)
    assert [message.content for message in shown] == [
        TEXT["emergency"], TEXT["drug"], "想。", "【AI 生成】可以含服硝酸甘油。",
    ]  # fmt: skip
    history = [known["messages"][0], *(vars(message) for message in shown)]
    assert id_from(history, 1) == "r1"
    assert spoken(history, TEXT["mark"]) == [known["messages"][0], {"role": "assistant", "content": known["answer"]}]
    plain = bubbles(GRADIO, "r2", {"messages": [USER], "think": "", "answer": "多休息。"}, 0.0, TEXT, True)
    assert [message.content for message in plain] == ["【AI 生成】多休息。"]


def test_emergencies_that_nobody_made_the_rule_from():
    """Each set of sentences was written apart from the others; set 3 is judged by weights of 1 and 2."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import make_safety

    rows = make_safety.read("emergency")
    own = safety.WEIGHTS["emergency"]
    safety.WEIGHTS["emergency"] = make_safety.fit([row for row in rows if row["set"] != "3"])
    try:
        said = [(row["emergency"], safety.is_emergency(row["text"])) for row in rows if row["set"] == "3"]
    finally:
        safety.WEIGHTS["emergency"] = own
    missed, false = ([now for true, now in said if true is kind].count(not kind) for kind in (True, False))
    assert missed <= 6 and false <= 8  # of 120 each
    for text in ("胸痛，出冷汗", "孩子怎么也叫不醒", "Chest pain with cold sweat", "A child who cannot be woken"):
        assert safety.is_emergency(text), text
    for text in (*TEXT["questions"], *chat.TEXTS["en"]["questions"], "你好", "没有胸痛，也没有出冷汗"):
        assert not safety.is_emergency(text), text


def test_what_tells_who_somebody_is():
    text = "我叫王小明，手机13812345678，身份证110101199003077715，住北京市朝阳区建国路88号，病历号ZY1029384。"
    assert [kind for kind, _ in safety.personal(text)] == ["姓名", "手机号", "身份证号", "地址", "编号"]
    for harmless in ("血压140/90，血糖7.2", "布洛芬每次0.2克", "心内科王医生", "帕金森病", "我爸高血压十年了"):
        assert safety.personal(harmless) == [], harmless


def test_a_form_beside_the_thumb(tmp_path):
    page = Page("m", TEXT, "", True, {}, 1, tmp_path / "f.jsonl", "0", form=start.read_form(chat.FORM, "zh"))
    replies = Replies(page)
    panel, name = Panel(replies), replies.begin([USER], {}, "s1")
    replies.known[name] |= {"answer": "多喝水。", "think": "想。"}
    history = [USER, {"role": "assistant", "content": "x", "metadata": {"id": name}}]
    held, _ = panel.rate(history, 1, True, "张三")
    assert held[5:] == (None,) * 5
    panel.save(history, name, "多喝水。", "想。", "", "yes", "no", None, None, "cannot_say", rater="张三")
    assert panel.fill(name, "张三")[5:] == ("yes", "no", None, None, "cannot_say")
    assert panel.fill(name, "李四")[5:] == (None,) * 5
    panel.save(history, name, "先量血压。", "想。", "", *[None] * 5, rater="李四")
    panel.rate(history, 1, False, "张三")
    lines = [json.loads(text) for text in page.feedback.read_text(encoding="utf-8").splitlines()]
    # A form alone is no correction, and leaves the thumb as it was; what one person wrote is not another's.
    assert [(line["rater"], line["verdict"], "correction" in line) for line in lines] == [
        ("张三", "like", False), ("张三", "like", False), ("李四", "edit", True), ("张三", "dislike", False),
    ]  # fmt: skip
    assert [line["id"] for line in lines] == [name, name, f"{name}-1", name]
    assert lines[1]["form"] == lines[3]["form"] == {"right": "yes", "complete": "no", "clear": "cannot_say"}
    assert "form" not in lines[2] and lines[2]["session"] == "s1"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("m", "--web", "--host", "0.0.0.0"), "needs --web and --password-file"),
        (("m", "--web", "--versus", "b"), "--versus needs --feedback"),
        (("m", "--web", "--form"), "--form needs --feedback"),
        (("m", "--web", "--feedback", "f.jsonl", "--blind"), "--blind needs --versus"),
        (("m", "--web", "--feedback", "f.jsonl", "--versus", "b", "--form"), "are for the page of one model"),
    ],
)
def test_options_of_the_page_that_do_not_go_together(args, said, capsys):
    with pytest.raises(SystemExit):
        chat.parse(list(args))
    assert said in capsys.readouterr().err


def test_files_of_the_page(tmp_path):
    words, form = tmp_path / "words", tmp_path / "form.yaml"
    words.write_text("张三:one:two\n\n李四: three \n", encoding="utf-8")
    words.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        start.read_passwords(words)
    words.chmod(0o600)
    assert start.read_passwords(words) == (("张三", "one:two"), ("李四", "three"))
    words.write_text("张三\n", encoding="utf-8")
    with pytest.raises(UserError, match="NAME:PASSWORD"):
        start.read_passwords(words)
    for text in ("- a", "a: ''", "a: [1]", "{"):
        form.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="--form"):
            start.read_form(form, "zh")
    form.write_text("polite: 有礼貌", encoding="utf-8")
    assert start.read_form(form, "zh") == {"polite": "有礼貌"}
    listed = tmp_path / "q.txt"
    listed.write_text("头晕？\n\n咳嗽？\n头晕？\n", encoding="utf-8")
    assert [question.text for question in start.read_questions(str(listed), "")] == ["头晕？", "咳嗽？"]
    assert start.read_questions("sample:3", "department")[0].group
    with pytest.raises(UserError, match="no such column"):
        start.read_questions("sample:3", "deparment")
    asked = tmp_path / "q.jsonl"
    asked.write_text('{"question": "头晕？", "科室": "内科"}\n', encoding="utf-8")
    assert start.read_questions(str(asked), "科室") == [versus.Question("头晕？", "内科")]


def test_no_text_of_the_page_is_there_twice():
    lines = (ROOT / "tools/page/texts.yaml").read_text(encoding="utf-8").split("\nen:\n")
    for part in lines:
        keys = [line.split(":")[0] for line in part.splitlines() if line.startswith("  ") and line[2] not in " -/"]
        assert len(set(keys)) == len(keys)
    assert chat.TEXTS["zh"].keys() == chat.TEXTS["en"].keys()


# --- what follows ---


@pytest.fixture
def kept(tmp_path):
    """Feedback of two people, of which one left a telephone number, and a run that was trained on it."""
    path = tmp_path / "feedback.jsonl"
    for n in range(24):
        question = f"第{n}个问题？" + ("我叫王小明，电话13812345678" if n == 3 else "")
        reply = {"role": "assistant", "content": "多喝水。", "reasoning_content": "想。"}
        line = {"id": f"id{n}", "rater": ("张三", "李四")[n % 2], "AIGC": {"Label": "1"}, "verdict": "edit",
                "messages": [{"role": "user", "content": question}, reply],
                "correction": {"content": f"第{n}个回答。", "reasoning_content": "想。"}}  # fmt: skip
        append_feedback(path, line)
    return path


def test_the_loop_is_closed_and_can_be_opened_again(kept, tool, monkeypatch, small_folder, tmp_path):
    runs = tmp_path / "outputs"
    args = ["tiny", "--max-steps", 2, "--num-samples", 0, "--model", small_folder, "--dataset", kept, "sample:40"]
    done = run([*args, "--output-dir", runs / "run"], log=tmp_path / "log")
    assert done.codes == [0] and "corrected answers trained" in done.output and "feedback_id" not in done.output
    monkeypatch.chdir(tmp_path)
    code, said = tool(feedback, kept, "--train", runs / "run")
    assert code == 0 and "24 replies: 24 corrected" in said
    assert "24 corrections, as rows beside those of the run:" in said
    assert f"accelerate launch train.py better --dataset {kept} {runs / 'run/data/train.jsonl'}" in said
    assert "feedback.jsonl:4 may tell who somebody is: 姓名 王小明, 手机号 13812345678" in said
    for number in range(30):
        append_feedback(kept, vote("a", question=f"另第{number}个问题？"))
    code, said = tool(feedback, kept, "--train", runs / "run")
    assert "54 pairs, enough for DPO (40)" in said
    command = next(line for line in said.splitlines() if "accelerate launch" in line).split()[3:]
    done = run([*command, "--max-steps", 2, "--num-samples", 0], log=tmp_path / "log")
    assert done.codes == [0] and (tmp_path / "outputs/run-feedback/best").is_dir(), done.output
    assert "pairs trained" in done.output

    code, said = tool(feedback, kept, "--replace", tmp_path / "clean.jsonl")
    clean = (tmp_path / "clean.jsonl").read_text(encoding="utf-8")
    assert "[姓名]" in clean and "[手机号]" in clean and "王小明" not in clean and "in 1 lines" in said

    code, said = tool(feedback, kept, "--rater", "张三", "--copy", tmp_path / "zhang.jsonl", "--delete", "--runs", runs)
    assert code == 0 and "42 lines of 张三 on 42 replies" in said
    for folder in ("run", "run-feedback"):
        assert f"{runs / folder} has seen them" in said, said
    left = [json.loads(text) for text in kept.read_text(encoding="utf-8").splitlines()]
    assert [line["rater"] for line in left] == ["李四"] * 12 and kept.stat().st_mode & 0o777 == 0o600
    copied = (tmp_path / "zhang.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(text)["rater"] for text in copied} == {"张三"} and len(copied) == 42
    assert tool(feedback, kept, "--rater", "张三")[0] != 0


def test_votes_of_several_people_are_one_exported_pair(tool, tmp_path):
    for rater, verdict in (("张三", "a"), ("李四", "b"), ("王五", "a")):
        append_feedback(tmp_path / "votes.jsonl", vote(verdict, rater))
    code, said = tool(feedback, tmp_path / "votes.jsonl", "--export", "trl")
    (pair,) = [json.loads(text) for text in (tmp_path / "votes.trl.jsonl").read_text(encoding="utf-8").splitlines()]
    assert code == 0 and "3 votes" in said and pair["chosen"][0]["content"] == "甲"
    assert "exists" in str(tool(feedback, tmp_path / "votes.jsonl", "--export", "trl"))
    (tmp_path / "votes.jsonl").write_bytes((tmp_path / "votes.jsonl").read_bytes() + "是".encode("gb18030") + b"\n")
    assert "UTF-8" in str(tool(feedback, tmp_path / "votes.jsonl", "--rater", "张三", "--delete"))


def test_exports_carry_the_mark(kept, tool, tmp_path):
    code, _ = tool(feedback, kept, "--export", "trl", "--out", tmp_path / "pairs.jsonl")
    pairs = [json.loads(text) for text in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert code == 0 and len(pairs) == 24 and all(pair["AIGC"] == {"Label": "1"} for pair in pairs)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(good_row(1)) + "\n")
    assert "no line of feedback" in tool(feedback, rows)[1] + str(tool(feedback, rows)[0])
