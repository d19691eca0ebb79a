"""Talking to a model: the generator, the terminal, the browser."""

import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ANSWER, ROOT, THINK
from ranks import run
from runs import newest

from model.export import card, system_prompt_of
from model.generate import ReplyError, ReplyStream, load_for_generation, reply_to
from tools.chat import main, parse, sampling


@pytest.fixture
def chat(monkeypatch, capsys):
    """Calls tools.chat with arguments, on a pipe; returns (exit status, stdout, stderr)."""

    def call(*args, stdin: str = ""):
        monkeypatch.setattr(sys, "argv", ["tools.chat", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main()
        except SystemExit as end:
            print(end.code, file=sys.stderr)  # as Python does with a message
            status = end.code if isinstance(end.code, int) else 1
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


# --- the generator --------------------------------------------------------------------------------------


class Scripted:
    """Stands for a model: it replies with given tokens, one at a time."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=200)

    def __init__(self, tokenizer, text: str):
        self.ids = tokenizer(text)["input_ids"]
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def generate(self, input_ids, streamer, stopping_criteria, max_new_tokens, **_):
        streamer.put(input_ids)
        for token in self.ids[:max_new_tokens]:
            streamer.put(torch.tensor([token]))
            if stopping_criteria[0](input_ids, None).all():
                return
        streamer.end()


QUESTION = [{"role": "user", "content": "头晕？"}]


@pytest.mark.parametrize(
    ("text", "parts", "closed", "stopped"),
    [
        ("<think>\n想🙂\n\n再\n</think>\n\n答\n<|im_end|>", [("think", "想🙂\n\n再"), ("answer", "答")], True, True),
        ("<think>\n\n</think>\n\n答<|im_end|>", [("answer", "答")], True, True),
        ("<think>\n想到一半", [("think", "想到一半")], False, False),
        ("只有答<|im_end|>", [("answer", "只有答")], False, True),
    ],
)  # fmt: skip
def test_a_stream_is_the_reply_in_pieces(tokenizer, text, parts, closed, stopped):
    stream = ReplyStream(Scripted(tokenizer, text), tokenizer, QUESTION)
    joined = {}
    for part, piece in stream:
        assert piece and "�" not in piece
        joined[part] = joined.get(part, "") + piece
    assert list(joined.items()) == parts
    whole = {"think": "", "answer": "", **joined}
    assert stream.reply == (whole["think"], whole["answer"], closed, stopped)


def test_leaving_a_stream_ends_the_generation(tokenizer):
    stream = ReplyStream(Scripted(tokenizer, "答" * 100), tokenizer, QUESTION)
    for _ in stream:
        break
    stream.stop()
    assert not stream.thread.is_alive()


def test_a_dialogue_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(ReplyError, match=r"the dialogue has \d+ tokens and the model takes 200"):
        ReplyStream(Scripted(tokenizer, "答"), tokenizer, [{"role": "user", "content": "长" * 500}])


def test_a_model_that_fails_is_told(tokenizer):
    model = Scripted(tokenizer, "答")
    model.generate = lambda **_: 1 / 0
    with pytest.raises(ReplyError, match="the model failed: division by zero"):
        list(ReplyStream(model, tokenizer, QUESTION))


def test_streamed_and_batched_replies_agree(best):
    model, tokenizer = load_for_generation(best, torch.device("cpu"))
    dialogue = [{"role": "system", "content": system_prompt_of(best)}, {"role": "user", "content": "第5个问题？"}]
    stream = ReplyStream(model, tokenizer, dialogue, max_new_tokens=100, do_sample=False)
    list(stream)
    prompt = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert stream.reply == reply_to(model, tokenizer, [prompt], 100)[0] == (THINK, ANSWER, True, True)


def test_sampling_is_the_models_own_unless_asked_for():
    assert sampling(parse(["folder"])) == {}
    assert sampling(parse(["folder", "--temperature", "0"]))["do_sample"] is False
    assert sampling(parse(["folder", "--top-k", "5"])) == {"do_sample": True, "top_k": 5}


# --- the terminal ---------------------------------------------------------------------------------------


def test_one_question(best, chat):
    assert chat(best, "--question", "第3个问题？", "--temperature", "0")[:2] == (0, ANSWER + "\n")
    reply = json.loads(chat(best, "--question", "第3个问题？", "--temperature", "0", "--json")[1])
    assert (reply["think"], reply["answer"], reply["closed"], reply["stopped"]) == (THINK, ANSWER, True, True)
    assert reply["tokens"] > 10 and reply["seconds"] > 0
    status, out, err = chat(best, "--question", "第3个问题？", "--max-new-tokens", "4")
    assert (status, out) == (1, "\n") and "思考没写完" in err


def test_questions_on_a_pipe(best, chat):
    lines = "第1个问题？\n第2个问题？\n/nothink\n第3个问题？\n/clear\n/what\n"
    _, said, _ = chat(best, "--temperature", "0", stdin=lines)
    assert said.count(ANSWER) == 3 and said.count(THINK) == 2 and said.count("词元，") == 3
    assert "已关闭思考" in said and "/system 文本" in said


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *args):
        self.process, self.text = None, ""
        self.main, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "tools.chat", *map(str, args)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
        )
        os.close(side)

    def until(self, text: str, seconds: float = 60) -> str:
        """What came up to and with text."""
        end = time.monotonic() + seconds
        os.set_blocking(self.main, False)
        while text not in self.text:
            assert time.monotonic() < end, f"no {text!r} in {self.text!r}"
            try:
                self.text += os.read(self.main, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        before, _, self.text = self.text.partition(text)
        return before + text

    def type(self, line: str) -> None:
        os.write(self.main, line.encode())


def test_a_dialogue_in_a_terminal(best):
    terminal = Terminal(best, "--temperature", "0")
    terminal.until("不构成医疗建议")
    terminal.until("\n> ")
    terminal.type("第1个问题？\n")
    reply = terminal.until("词元，")
    assert f"\x1b[2m{THINK[0]}" in reply and "──" in reply and reply.index("──") < reply.index(ANSWER[0])
    terminal.until("> ")
    terminal.type("第2个问题？\n")
    terminal.until("词元，")
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(20) == 0


def test_ctrl_c_ends_a_reply_and_not_the_chat(best, tmp_path):
    """A model that never ends its reply."""
    endless = tmp_path / "endless"
    shutil.copytree(best, endless)
    settings = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 7}))
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100000}))
    terminal = Terminal(endless, "--temperature", "0", "--max-new-tokens", "90000")
    terminal.until("\n> ")
    terminal.type("第1个问题？\n")
    terminal.until("──")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert "Traceback" not in terminal.until("中断）", 20)
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def test_mistakes_are_told_in_one_line(best, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(best, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    for args, message in {
        (tmp_path,): "has no config.json",
        (best.parent,): f"did you mean {best}?",
        (tmp_path / "nowhere",): "there is no model folder",
        (best, "--question", " "): "--question is empty",
        (best, "--json"): "--json needs --question",
        (best, "--top-p", "3"): "--top-p in (0, 1]",
        (best, "--web", "--port", "70000"): "--port is a number from 1 to 65535",
        (broken, "--question", "?"): "cannot load",
        (best, "--question", "长" * 3000): "the model takes 1024",
    }.items():
        monkeypatch.setattr(sys, "argv", ["tools.chat", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr().err + str(end.value)
        assert end.value.code not in (0, None) and message in told, (args, told)


def test_whoever_reads_may_leave(best):
    command = f"{sys.executable} -m tools.chat {best} --question 第1个问题？ --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr


# --- what stands beside the weights -----------------------------------------------------------------------


def test_the_card_keeps_the_system_prompt(best):
    assert system_prompt_of(best) == "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。"
    text, modelfile = (best / "README.md").read_text(), (best / "Modelfile").read_text()
    metrics = [json.loads(line) for line in (best.parent / "metrics.jsonl").read_text().splitlines()]
    assert f"{[row for row in metrics if 'eval/loss' in row][-1]['eval/loss']:.4f}" in text
    assert str(best.parent.parent) not in text  # a dataset's name, not where it lies
    assert 'SYSTEM """你是一个医学专家' in modelfile and "PARAMETER stop <|im_end|>" in modelfile
    assert "modelscope.cn/models" not in text  # a model that is on no hub has no page there


@pytest.mark.parametrize("language", ["zh", "en"])
def test_no_text_of_a_card_is_missing(language, best, tmp_path):
    facts = {"system_prompt": "", "model": "Qwen/Qwen3-1.7B", "dataset": "owner/name", "run_name": "run", "step": 5}
    facts |= {
        "num_train": 1,
        "num_val": 1,
        "learning_rate": 1e-4,
        "rows_per_step": 4,
        "max_length": 9,
        "max_steps": 7,
        "lora_rank": 0,
    }
    facts |= {"loss": 1.5, "deciding_loss": 1.5, "think_loss": 1.0, "answer_loss": 2.0, "perplexity": 4.5}
    own = load_for_generation(best, torch.device("cpu"))[0].generation_config
    texts = card(facts, language, own)
    for prompt in ("", "规则：\n---\n先想再答。", "先想再答---"):
        (tmp_path / "README.md").write_text(card({**facts, "system_prompt": prompt}, language, own)["README.md"])
        assert system_prompt_of(tmp_path) == prompt
    assert "Qwen/Qwen3-1.7B" in texts["README.md"] and "1.5000" in texts["README.md"]
    assert "SYSTEM" not in texts["Modelfile"] and "temperature 0.6" in texts["Modelfile"]


# --- the browser ------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_history_as_a_browser_and_as_a_client_send_it():
    from tools.page.web import spoken

    def blocks(text):
        return [{"type": "text", "text": text}]

    history = [
        {"role": "user", "content": blocks("一")},
        {"role": "assistant", "content": blocks("想"), "metadata": {"title": "思考"}},
        {"role": "assistant", "content": blocks("答")},
        {"role": "user", "content": "没有回答的问题"},
    ]
    expected = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "答"}]
    assert spoken(history) == expected
    flat = [
        {**m, "content": m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]} for m in history
    ]
    assert spoken(flat) == expected


@pytest.fixture
def open_page(best):
    """Opens the chat's page in a headless Chromium; arguments are those of tools.chat."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    port, servers = free_port(), []

    def open_one(*args):
        command = [sys.executable, "-m", "tools.chat", str(best), "--web", "--temperature", "0", "--port", str(port)]
        proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # leads nowhere
        server = subprocess.Popen(
            [*command, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, **proxy},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        servers.append(server)
        end = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < end, server.stderr.read()
            time.sleep(0.2)
        page = browser.new_page(locale="zh-CN")
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(f"http://127.0.0.1:{port}")
        return page

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield open_one
        browser.close()
    for server in servers:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=20)
        assert f"ssh -L {port}:127.0.0.1:{port} HOST" in said and "share" not in said


def ask(page, question: str, turn: int = 1) -> None:
    box = page.locator("textarea").nth(int(page.get_by_label("评价人").is_visible()))  # that one stands above
    box.fill(question)
    box.press("Enter")
    page.wait_for_function(
        "([answer, turn]) => document.body.innerText.split(answer).length - 1 === turn", arg=[ANSWER, turn]
    )
    page.get_by_role("button", name="发送").wait_for()  # while the model replies there is `stop` in its place


def test_a_dialogue_in_the_browser(open_page):
    """A question is typed, the thinking folds, the answer shows, a second turn works; nothing leaves the machine."""
    page = open_page()
    page.get_by_text("不构成医疗建议").wait_for()
    for place in (page.get_by_placeholder("请输入您的问题"), page.get_by_text("tiny/best")):
        place.wait_for()
    for turn, question in enumerate(["第1个问题？", "第2个问题？"], start=1):
        ask(page, question, turn)
    page.wait_for_timeout(1000)
    if picture := os.environ.get("SCREENSHOT"):
        page.screenshot(path=picture)
    assert page.inner_text("body").count(ANSWER) == 2
    assert not page.get_by_text(THINK).first.is_visible()
    page.get_by_text("思考").first.click()
    page.wait_for_timeout(500)
    assert page.get_by_text(THINK).first.is_visible()
    page.get_by_text("设置").click()
    page.get_by_label("先思考再回答").uncheck()
    ask(page, "第3个问题？", 3)
    page.wait_for_timeout(500)
    assert len(re.findall(r"\(\d[\d.]*m?s\)", page.inner_text("body"))) == 2  # the third reply did not think
    assert page.get_by_text("评价与更正").count() == 0  # nothing is kept unless a file was named
    assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in page.requested), page.requested


def test_a_correction_in_the_browser_is_trained_and_comes_back(open_page, best, chat, tmp_path):
    """Ask, dislike, correct, like another reply; train on the file; ask again."""
    kept, corrected = tmp_path / "feedback.jsonl", "注意休息，多喝水。"
    dialogues = [json.loads(line).get("messages", []) for line in (best.parent / "data/train.jsonl").open()]
    question, other = [messages[0]["content"] for messages in dialogues if len(messages) == 2][:2]
    page = open_page("--feedback", kept)
    page.get_by_text("会保存在本机的 feedback.jsonl").wait_for()
    ask(page, question)
    page.get_by_title("踩").last.click()
    page.wait_for_function("answer => [...document.querySelectorAll('textarea')].some(t => t.value === answer)",
                           arg=ANSWER)  # fmt: skip
    page.get_by_label("更正后的回答").fill(" ")
    page.get_by_role("button", name="保存更正").click()
    page.get_by_text("更正后的回答不能为空").wait_for()
    page.get_by_label("更正后的回答").fill(corrected)
    page.get_by_label("理由").fill("没有让他量血压")
    page.get_by_role("button", name="保存更正").click()
    page.wait_for_timeout(1000)
    ask(page, other, 2)
    page.get_by_title("赞").last.click()
    page.wait_for_timeout(1000)
    if picture := os.environ.get("SCREENSHOT"):
        page.screenshot(path=picture)
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [line["verdict"] for line in lines] == ["dislike", "edit", "like"] and lines[0]["id"] == lines[1]["id"]
    assert lines[1]["messages"][-2:] == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWER, "reasoning_content": THINK},
    ]
    assert lines[1]["correction"] == {"content": corrected, "reasoning_content": THINK}
    assert lines[1]["reason"] == "没有让他量血压" and lines[1]["settings"]["do_sample"] is False
    sums = subprocess.run(["sha256sum", best / "model.safetensors"], capture_output=True, text=True).stdout
    assert {line["model_sha256"] for line in lines} == {sums.split()[0]}
    out = tmp_path / "run"
    args = ["tiny", "--model", best, "--dataset", kept, "--val-dataset", best.parent / "data/val.jsonl"]
    args += [
        "--lr-scheduler-type",
        "constant",
        "--max-steps",
        40,
        "--eval-steps",
        40,
        "--num-samples",
        0,
        "--learning-rate",
        "1e-3",
        "--output-dir",
        out,
    ]
    done = run(args, log=tmp_path / "log")
    assert done.codes == [0] and "feedback: 1 corrected answers trained, 1 liked answers not trained" in done.output
    status, answer, _ = chat(newest_model(out), "--question", question, "--temperature", "0")
    assert status == 0 and answer.strip() == corrected


def newest_model(out):
    """The weights of the last step as a model: best/ may be an earlier one."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from model.export import export
    from model.qwen3 import load_model, load_tokenizer

    folder, checkpoint = out / "last", newest(out)
    dcp_to_torch_save(checkpoint / "state", out / "state.pt")
    state = torch.load(out / "state.pt", weights_only=True)["model"]
    tokenizer = load_tokenizer(str(out / "best"))
    model = load_model(str(out / "best"), tokenizer, gradient_checkpointing=False)
    model.load_state_dict({name.removeprefix("causal_lm."): tensor for name, tensor in state.items()})
    export(model, model.state_dict(), tokenizer, folder, {"README.md": (out / "best/README.md").read_text()})
    return folder


def test_a_port_in_use_is_told(best, chat):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = chat(best, "--web", "--port", taken.getsockname()[1])
    assert status == 1 and "choose another with --port" in err
