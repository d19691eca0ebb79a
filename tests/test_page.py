"""The chat's page: a text is shown as it is, and what is saved belongs together, whatever the order of clicks."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import pytest
from ranks import free_port

from data.reading.feedback import correction_of, problem_of
from tools.page.replies import Page, Panel, Replies
from tools.page.show import bubbles, spoken

PIECES = (
    "每日3~5次", "7~10天", "2*3*4 mg", "_下划线_", "**粗**", "`码`", "a <b and c> d", "AST<ULN", "<b>粗</b>",
    "</think>", "<用药>", "<script>document.title='x'</script>", "<img src=x onerror=alert(1)>", "&lt;5", "AT&amp;T",
    "A&B", "$x^2$", "\\(w/h^2\\)", "# 井号", "- 项", "1986. 年", "[链](http://a.b)", "![图](c)", "|a|b|", "<!-- 注 -->",
    ":smile:", "~~删~~", "==亮==", "5 < 6 > 4", "\n", "\n\n", "  ", "。", "\\*", "http://www.a.com/a_b_c",
    "<a href='x'>y",
    "&#60;", "e\u0301", "\u202e", "😷",
)  # fmt: skip


def replies(number: int) -> list[str]:
    chance = random.Random(7)
    texts = ("".join(chance.choices(PIECES, k=chance.randint(1, 9))).strip() for _ in range(10**6))
    return [text for text, _ in zip(filter(None, texts), range(number), strict=False)]


def test_300_replies_are_shown_character_by_character():
    """In a browser; what it selects and copies is that text."""
    gradio = pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    from tools.page.show import plain_chatbot

    said, port = replies(300), free_port()
    history = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    with gradio.Blocks() as blocks:
        chatbot = plain_chatbot(gradio, group_consecutive_messages=False)
        chatbot.render()
        blocks.load(lambda: history, None, chatbot)
    blocks.launch(server_port=port, prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_function("() => document.querySelectorAll('.message-content').length >= 300")
        time.sleep(1)
        shown = page.eval_on_selector_all(".message-content", "all => all.map(one => one.textContent)")
        title = page.title()
        browser.close()
    blocks.close(verbose=False)
    assert [text.strip() for text in shown] == said and title != "x"


def test_what_is_saved_belongs_together_in_every_order_of_clicks(tmp_path):
    """Two tabs of one page; the panel shows the question of the reply that its correction is saved for."""
    assert sum(click_around(seed, tmp_path / f"{seed}.jsonl") for seed in range(40)) > 100


def click_around(seed: int, path) -> int:
    """Checks what 150 clicks have saved; returns the number of corrections."""
    chance = random.Random(seed)
    made = Replies(Page("m", {}, "", True, {}, 1, path, "0"))
    panel, gradio = Panel(made), SimpleNamespace(ChatMessage=lambda content, metadata: vars_of(content, metadata))
    tabs = [{"history": [], "fields": Panel.EMPTY} for _ in range(2)]
    expected, count = {}, 0

    def ask(tab, text):
        nonlocal count
        count += 1
        name = made.begin([*spoken(tab["history"], "【AI 生成】"), {"role": "user", "content": text}], {})
        answer, think = f"答{count}", chance.choice(["", f"想{count}"])
        made.known[name] |= {"answer": chance.choice([answer, answer, ""]), "think": think}
        shown = bubbles(
            gradio, name, made.known[name], 0.0, {"thought": "思考", "thinking": "思考中", "mark": "【AI 生成】"}, True
        )
        tab["history"] = [*tab["history"], {"role": "user", "content": text}, *shown]
        tab["fields"] = Panel.EMPTY  # the event of a new question

    for _ in range(150):
        tab = chance.choice(tabs)
        action = chance.choice(["ask", "ask", "like", "open", "open", "save", "save", "save", "clear", "undo", "retry"])
        last = max((n for n, m in enumerate(tab["history"]) if m["role"] == "user"), default=0)
        try:
            if action == "ask":
                ask(tab, f"问{count}")
            elif action == "like" and tab["history"]:
                at, verdict = chance.randrange(len(tab["history"])), chance.choice([True, False, ""])
                tab["fields"], _ = panel.rate(tab["history"], at, verdict)
            elif action == "open":
                tab["fields"] = panel.open(tab["history"], tab["fields"][0]) or tab["fields"]
            elif action == "save":
                name, question, *_ = tab["fields"]
                fixed = f"改{chance.random()}"
                tab["fields"] = panel.save(tab["history"], name, fixed, "", "")
                expected[name] = question, fixed
            elif action in ("clear", "undo", "retry"):
                text = tab["history"][last]["content"] if tab["history"] else None
                tab["history"] = [] if action == "clear" else tab["history"][:last]
                tab["fields"] = Panel.EMPTY
                if action == "retry" and text:
                    ask(tab, text)
        except LookupError:
            pass
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    saved = {line["id"]: line for line in lines}
    assert all(problem_of(line) is None for line in lines)
    for name, (question, fixed) in expected.items():
        *_, asked, reply = saved[name]["messages"]
        assert asked["content"] == question and correction_of(saved[name])["content"] == fixed
        assert reply["content"].removeprefix("答") == made.known[name]["answer"].removeprefix("答") != ""
    return len(expected)


def vars_of(content, metadata):
    return {"role": "assistant", "content": content, "metadata": metadata}
