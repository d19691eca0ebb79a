"""Rewriting and replay with a model behind an endpoint, which fails in every way that endpoints do, and with a local
one."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ANSWER, THINK, good_row, load

from data.encode import encode_rows
from data.reading.rows import Row
from tools import augment, replay

TURNS = [{"role": role, "content": f"{role}{i}"} for i in range(2) for role in ("user", "assistant")]


@pytest.fixture
def endpoint():
    """A chat endpoint; `reply` makes an answer of the last message, `seen` is what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append(asked)
            text = asked["messages"][-1]["content"]
            reply = server.judge(text) if "问的是同一件事吗" in text else server.reply(text)
            if isinstance(reply, int):
                status, body = reply, b"{}"
            elif isinstance(reply, bytes):
                status, body = 200, reply
            else:
                message = {"role": "assistant", **(reply if isinstance(reply, dict) else {"content": reply})}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                status, body = 200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    server.judge = lambda text: "是"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """Failed requests are given up at once, and no loss of an answer decides."""
    monkeypatch.setattr("tools.shared.ask.RETRIES", 0)
    monkeypatch.setattr(augment.Augment, "by_answer", lambda self, pairs: [])


@pytest.fixture
def served(endpoint, best):
    return ["--model", best, "--url", endpoint.url, "--url-model", "m"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reworded(asked: str) -> str:
    return f"请问{asked.split(chr(10))[-1]}急吗"


def test_each_question_is_rewritten_and_what_means_another_is_dropped(endpoint, tool, quick, jsonl, tmp_path, served):
    rows = [
        {"question": f"我头疼了{i}天，没有发烧，怎么办？", "think": "想。", "answer": "休息。"} for i in range(2, 22)
    ]
    wrong = {
        "2天": "我头疼了9天，没有发烧，咋办？",
        "3天": "我头疼了3天，还有发烧，咋办？",
        "4天": "我头疼了4天 没有发烧 怎么办？",
        "5天": "",
    }
    endpoint.judge = lambda text: "否。" if "还有发烧" in text else "是"

    def reply(asked):
        question = asked.split("\n")[-1]
        return next((text for days, text in wrong.items() if f"了{days}" in question), f"已经头疼{question[4:]}谢谢")

    endpoint.reply = reply
    path, out = jsonl([*rows, rows[0], {"messages": TURNS}]), tmp_path / "out.jsonl"
    code, said = tool(augment, path, *served, "--rewrites", 1, "--out", out)
    assert code == 0 and "16 rewrites of 20 questions; dropped in this launch: " in said, said
    assert "1 dialogues of several questions are left out" in said
    for reason in ("other digits 1", "another question 1", "the same words 1", "no question 1"):
        assert reason in said
    found = lines(out)
    assert [line["of"] for line in found] == [row["question"] for row in rows[4:]]
    _, asked, reply = found[0]["messages"]  # a row as any other: the reply stays, the question is another
    assert asked["content"] == "已经头疼6天，没有发烧，怎么办？谢谢"
    assert reply == {"role": "assistant", "content": "休息。", "reasoning_content": "想。"}
    assert load(out).train[0].messages[-1] == reply
    assert endpoint.seen[0]["model"] == "m" and len(endpoint.seen) == 20 + 17
    code, said = tool(augment, path, *served, "--out", out)
    assert code == f"tools.augment: {out} exists already; --resume goes on with it, --out names another file"
    assert lines(out) == found


@pytest.mark.parametrize("failure", [500, b"<html>busy</html>", {"content": None}, "哈哈哈哈"])
def test_what_was_made_before_the_endpoint_failed_is_kept_and_gone_on_with(
    failure, endpoint, tool, quick, jsonl, tmp_path, served, monkeypatch
):
    """It dies, or answers nonsense: at the end all questions are there once, those asked in vain were asked again."""
    monkeypatch.setattr("tools.shared.ask.MAX_USELESS", 16)
    path, out = jsonl([good_row(i) for i in range(50)]), tmp_path / "out.jsonl"
    args = [augment, path, *served, "--rewrites", 1, "--out", out]
    endpoint.reply = lambda asked: reworded(asked) if int(re.findall(r"第(\d+)个", asked)[-1]) <= 20 else failure
    code, said = tool(*args)
    assert code and str(code).startswith("tools.augment: ") and "--resume goes on" in str(code), (code, said)
    made = lines(out)
    assert len(made) == (16 if failure == 500 else 21)
    with out.open("a") as file:
        file.write('{"messages": "cut o')  # as a kill leaves it
    # Refusals of single requests, as a filter of contents makes them, stop nothing.
    endpoint.reply = lambda asked: 400 if "第30个" in asked else reworded(asked)
    code, said = tool(*args, "--resume")
    found = lines(out)
    assert code == 0 and found[: len(made)] == made and "refused a request" in said, said
    assert [line["of"] for line in found] == [good_row(i)["question"] for i in range(50) if i != 30]
    other = jsonl([good_row(i + 70) for i in range(50)], "other.jsonl")
    code, _ = tool(augment, other, *args[2:], "--resume")
    assert "was made from other rows" in code and lines(out) == found


def test_an_endpoint_that_is_not_there(tool, quick, jsonl, tmp_path, best):
    path, out = jsonl([good_row(i) for i in range(5)]), tmp_path / "out.jsonl"
    args = ["--model", best, "--out", out, "--url", "http://127.0.0.1:9/v1", "--url-model", "m"]
    for module in (augment, replay):
        code, _ = tool(module, path, *args)
        assert code.startswith(f"tools.{module.__name__[6:]}: http://127.0.0.1:9/v1 does not answer: ")
        assert "--resume goes on" in code and not out.read_bytes()
        out.unlink()
    for flags, message in ((["--url", "http://x"], "come together"), (["--columns", "question=nothing"], "nothing")):
        code, _ = tool(augment, path, "--model", best, "--out", out, *flags)
        assert message in str(code) and "Traceback" not in str(code)
    code, _ = tool(augment, path)
    assert "name the model with --model and a file with --out" in code


@pytest.mark.parametrize(
    "text", ['[{"a": 1}]', '{"question": "x"}\n{"question": "y"}', "[1]\n", '"x"\n', '{"messages": null}\n', "x\n\n"]
)
def test_a_file_of_something_else_is_left_as_it_is(text, tool, jsonl, tmp_path, best):
    other = tmp_path / "other.jsonl"
    other.write_text(text, encoding="utf-8")
    url = ["--url", "http://127.0.0.1:9/v1", "--url-model", "m"]
    for module in (augment, replay):
        args = [module, jsonl([good_row(1), good_row(2)]), "--model", best, "--out", other, *url]
        for flags in ([], ["--resume"]):
            code, _ = tool(*args, *flags)
            assert code.startswith(f"tools.{module.__name__[6:]}: {other} ") and other.read_text("utf-8") == text


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "http://h:abc/v1", "ftp://h/v1"])
def test_an_address_that_is_none(url, tool, jsonl, tmp_path, best):
    code, _ = tool(
        replay, jsonl([good_row(1)]), "--model", best, "--url", url, "--url-model", "m", "--out", tmp_path / "o.jsonl"
    )
    assert code == f"tools.replay: --url {url!r} is no http address"


def test_the_judges_of_a_local_model_are_its_own_likelihoods(best, capsys):
    """Against transformers, one text at a time: of yes and no after the request, and of the answer after questions."""
    rows = [Row(str(i), {}, [{"role": "user", "content": f"第{i}个问题？"},
                             {"role": "assistant", "content": ANSWER}]) for i in range(20, 28)]  # fmt: skip
    args = type("args", (), {"model": str(best), "rewrites": 1, "url": None})
    judge = augment.Augment(rows, 512, args)
    model, tokenizer = judge.model.causal_lm.eval(), judge.tokenizer
    pairs = [(n, f"请问第{20 + n}个问题") for n in range(4)] + [(n, "头晕吗") for n in range(4)]

    def loss(prompt: str, text: str) -> float:
        begin, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, prompt + text))
        logits = model_logits(model, ids).log_softmax(-1)
        return -sum(logits[i - 1, ids[i]].item() for i in range(len(begin), len(ids))) / (len(ids) - len(begin))

    def asked(question: str) -> str:
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("是", "否")]
    different = []
    for n, text in pairs:
        prompt = asked(augment.SAME["zh"].format(judge.questions[n], text))
        yes, no = model_logits(model, tokenizer(prompt, add_special_tokens=False)["input_ids"])[-1][first].tolist()
        different += [(n, text)] if no > yes else []
    assert judge.by_likelihood(pairs) == different
    lost = []
    for n, text in pairs:
        questions = judge.questions[n], judge.questions[(n + 4) % 8], text
        own, other, rewritten = (loss(asked(question), f"{ANSWER}<|im_end|>") for question in questions)
        lost += [(n, text)] if other > own and rewritten - own > 0.5 * (other - own) else []
    assert judge.by_answer(pairs) == lost
    judge.by_likelihood = lambda pairs: pairs[1:]
    judge.say_if_no_judge()
    assert "says of 1 of 4 pairs of different questions that they ask the same" in capsys.readouterr().err


def model_logits(model, ids: list[int]):
    import torch

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    model.set_attn_implementation("packed")
    return logits


def test_replay_keeps_the_models_own_replies_and_they_are_trained_as_any_row(
    endpoint, tool, quick, tmp_path, best, jsonl
):
    """Of a run's questions, each once, a tenth; a reply without an end or an answer is dropped."""
    run = best.parent

    def reply(asked):
        number = int(re.search(r"\d+", asked).group())
        return {"content": f"答：{asked}", "reasoning_content": f"想：{asked}"} if number % 3 else ""

    endpoint.reply, out = reply, tmp_path / "replay.jsonl"
    args = [replay, run, "--url", endpoint.url, "--url-model", "m", "--out", out, "--num-rows", 9]
    code, said = tool(*args)
    found = lines(out)
    dropped = 9 - len(found)
    assert (
        code == 0
        and f"{len(found)} replies to 9 questions; dropped in this launch: without an answer {dropped}" in said
    )
    assert 0 < dropped < 9 == len(endpoint.seen) and f"--val-dataset {run}/data/val.jsonl" in said
    for line in found:
        *before, said = line["messages"]
        question = before[-1]["content"]
        assert [{"role": m["role"], "content": m["content"]} for m in before] in [s["messages"] for s in endpoint.seen]
        assert said == {"role": "assistant", "content": f"答：{question}", "reasoning_content": f"想：{question}"}
        assert all(m.get("loss") is False for m in before if m["role"] == "assistant")
    assert len({json.dumps(line) for line in found}) == len(found)
    code, said = tool(*args, "--resume")
    assert code == 0 and lines(out) == found
    code, _ = tool(replay, jsonl([good_row(1)]), *args[2:], "--model", best, "--resume")
    assert "was made from other rows" in code


def test_a_local_model_answers_for_itself(tool, tmp_path, best, tokenizer):
    """One that knows one reply: its replay has that reply, as tokens too, and it rewrites nothing."""
    out = tmp_path / "replay.jsonl"
    code, said = tool(replay, best.parent, "--model", best, "--out", out, "--num-rows", 4, "--max-new-tokens", 64)
    assert code == 0 and "4 replies to 4 questions" in said, said
    for line in lines(out):
        assert line["messages"][-1] == {"role": "assistant", "content": ANSWER, "reasoning_content": THINK}
    code, _ = tool(augment, best.parent, "--model", best, "--out", tmp_path / "none.jsonl", "--rewrites", 1)
    assert "nothing could be used of the replies to the last" in code and not (tmp_path / "none.jsonl").read_text()
    rows = [Row("", {}, lines(out)[0]["messages"])]
    assert encode_rows(rows, tokenizer, 512, "error")[0][0].num_think_targets > 2
