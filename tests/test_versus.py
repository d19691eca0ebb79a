"""The page in a real browser: two people at once, a form, ten blind votes, and the model that is trained on them."""

import json
import os

import psutil
import pytest
from conftest import ANSWER
from ranks import run
from test_chat import ask, chat, open_page  # noqa: F401  (a fixture)

from tools import feedback


def lines_of(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            page.screenshot(path=f"{folder}/{name}-{width}.png", full_page=True)
        page.set_viewport_size({"width": 1280, "height": 900})


def log_in(page, name: str, word: str) -> None:
    page.locator("input").nth(0).fill(name)
    page.locator("input").nth(1).fill(word)
    page.get_by_role("button").last.click()
    page.get_by_text("不构成医疗建议").first.wait_for()


def test_two_people_at_one_time(open_page, tmp_path):  # noqa: F811
    """Each sees their own dialogue, is known by the name that they logged in with, and nothing leaves the machine."""
    kept, words = tmp_path / "feedback.jsonl", tmp_path / "words"
    words.write_text("张三:one\n李四:two\n", encoding="utf-8")
    words.chmod(0o600)
    first = open_page("--feedback", kept, "--form", "--keep-all", "--password-file", words)
    assert "第1个问题" not in first.inner_text("body")
    log_in(first, "张三", "one")
    second = first.context.browser.new_page(locale="zh-CN")
    second.goto(first.url)
    log_in(second, "李四", "two")
    ask(first, "第1个问题？")
    ask(second, "我爸胸口痛，出冷汗")
    ask(first, "第2个问题？", 2)
    assert "胸口痛" not in first.inner_text("body") and "第1个问题" not in second.inner_text("body")
    assert "拨打 120" in second.inner_text("body") and "拨打 120" not in first.inner_text("body")
    second.get_by_title("踩").last.click()
    second.wait_for_timeout(500)
    second.get_by_label("否", exact=True).first.check()
    screenshot(second, "form")
    second.get_by_role("button", name="保存更正与评分").click()
    second.get_by_text("已保存").first.wait_for()
    second.wait_for_timeout(500)
    lines = lines_of(kept)
    by = {line["messages"][-2]["content"]: line for line in lines}
    assert {question: line["rater"] for question, line in by.items()} == {
        "第1个问题？": "张三", "第2个问题？": "张三", "我爸胸口痛，出冷汗": "李四",
    }  # fmt: skip
    assert [line["verdict"] for line in lines if line["rater"] == "李四"] == ["shown", "dislike", "dislike"]
    assert by["我爸胸口痛，出冷汗"]["form"] == {"right": "no"} and "AIGC" in lines[0]
    assert len({line["session"] for line in lines}) == 2
    # The earlier reply is in the dialogue without its mark.
    assert [m["content"] for m in by["第2个问题？"]["messages"] if m["role"] == "assistant"] == [ANSWER, ANSWER]
    server = next(p for p in psutil.Process().children() if "tools.chat" in p.cmdline())
    reached = {c.raddr.ip for c in server.net_connections() if c.raddr}
    assert reached <= {"127.0.0.1"} and all("//127.0.0.1" in url for url in first.requested)


@pytest.fixture
def other(small_folder, tmp_path):
    """A model that has learned another reply."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"第{n}个问题？", "answer": "随便。"}) + "\n" for n in range(20, 60))
    )
    args = ["tiny", "--model", small_folder, "--dataset", rows, "--max-steps", 40, "--num-samples", 0]
    done = run([*args, "--output-dir", tmp_path / "other"], log=tmp_path / "log")
    assert done.codes == [0], done.output
    return tmp_path / "other/best"


@pytest.fixture
def votes(open_page, best, other, tmp_path):  # noqa: F811
    """Ten questions, on which somebody votes for the reply of `best`."""
    path, questions = tmp_path / "votes.jsonl", tmp_path / "questions.txt"
    questions.write_text("".join(f"第{n}个问题？\n" for n in range(10)), encoding="utf-8")
    args = ["--versus", other, "--feedback", path, "--questions", questions, "--max-new-tokens", "24", "--nothink"]
    page = open_page(*args)
    page.get_by_label("评价人").fill("张三")
    for number in range(10):
        page.get_by_role("button", name="下一题").click()
        wait_for_field(page, f"第 {number + 1} 题，共 10 题")
        page.wait_for_function(
            "() => [...document.querySelectorAll('button')].some(b => b.innerText === '左边更好' && !b.disabled)"
        )
        assert "tiny/best" not in page.inner_text("body")  # the name of both
        left, right = (page.locator(".message-wrap").nth(side).inner_text() for side in (0, 1))
        assert (ANSWER in left) != (ANSWER in right)
        if number == 0:
            screenshot(page, "versus")
        page.get_by_role("button", name="左边更好" if ANSWER in left else "右边更好").click()
        page.wait_for_function(
            "() => [...document.querySelectorAll('button')].some(b => b.innerText === '左边更好' && b.disabled)"
        )
    page.get_by_role("button", name="下一题").click()
    wait_for_field(page, "全部完成")
    return path


def wait_for_field(page, text: str) -> None:
    inside = "text => [...document.querySelectorAll('input,textarea')].some(field => field.value.includes(text))"
    page.wait_for_function(inside, arg=text)


def test_ten_votes_become_a_figure_and_a_model(votes, chat, other, tool, tmp_path):  # noqa: F811
    lines = lines_of(votes)
    assert [line["messages"][-1]["content"] for line in lines] == [f"第{n}个问题？" for n in range(10)]
    assert {line["verdict"] for line in lines} == {"a"} and {line["rater"] for line in lines} == {"张三"}
    code, said = tool(feedback, votes)
    assert code == 0 and "B wins 0 of 10 (0%, 95 %: 0% to 28%)" in said and "the left side wins" in said
    args = ["preference", "--model", other, "--dataset", votes, "--mixed-precision", "no", "--num-samples", 0]
    args += ["--max-length", 256, "--learning-rate", "1e-4", "--max-steps", 6, "--eval-steps", 3]
    done = run([*args, "--output-dir", tmp_path / "run"], log=tmp_path / "log")
    assert done.codes == [0] and "9 pairs trained (1 held out for validation)" in done.output, done.output
    rows = lines_of(tmp_path / "run/metrics.jsonl")
    figures = [row["eval/preference/margin"] for row in rows if "eval/preference/margin" in row]
    assert figures[0] == 0 and figures[-1] > 1
    _, answer, _ = chat(
        tmp_path / "run/best", "--question", "第3个问题？", "--max-new-tokens", "8", "--nothink", "--json"
    )
    assert json.loads(answer)["AIGC"]["Label"] == "1"
