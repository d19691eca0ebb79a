"""An exported folder in other programs' hands: transformers' own server, and llama.cpp."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.template import generation_prompt
from model.export import system_prompt_of
from model.generate import reply_to

pytestmark = pytest.mark.slow
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")  # the source of llama.cpp, for its converter
QUESTION = "第1个问题？"


def ask(url, **body):
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=300)


def loaded(best):
    model = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(best)


def test_transformers_serve_puts_thinking_apart(best, tmp_path):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    dialogue = [{"role": "system", "content": system_prompt_of(best)}, {"role": "user", "content": QUESTION}]
    model, tokenizer = loaded(best)
    [own] = reply_to(model, tokenizer, [generation_prompt(dialogue, tokenizer)], 256)
    assert own.closed and own.stopped
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", best, "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:  # it listens once the model is loaded
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            try:
                assert json.load(urllib.request.urlopen(f"{url}/health", timeout=5)) == {"status": "ok"}
                break
            except OSError:
                time.sleep(0.2)
        body = {"messages": dialogue, "temperature": 0, "max_tokens": 256}
        choice = json.load(ask(f"{url}/v1/chat/completions", **body))["choices"][0]
        message = choice["message"]
        assert (message["reasoning_content"].strip(), message["content"].strip()) == (own.think, own.answer)
        assert choice["finish_reason"] == "stop"
        streamed = {"reasoning_content": "", "content": ""}
        for line in ask(f"{url}/v1/chat/completions", **body, stream=True):
            if line.startswith(b"data: {"):
                for part in json.loads(line[6:])["choices"]:
                    for name in streamed:
                        streamed[name] += part["delta"].get(name) or ""
        assert {name: text.strip() for name, text in streamed.items()} == {
            "reasoning_content": own.think,
            "content": own.answer,
        }
        # The same as tools.replay asks for it.
        command = [sys.executable, "-m", "tools.replay", best.parent, "--url", f"{url}/v1", "--url-model", best]
        command += ["--num-rows", "3", "--max-new-tokens", "256", "--out", tmp_path / "replay.jsonl"]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
        lines = (tmp_path / "replay.jsonl").read_text(encoding="utf-8").splitlines()
        said = [json.loads(line)["messages"][-1] for line in lines]
        assert len(said) == 3 and all((m["reasoning_content"], m["content"]) == (own.think, own.answer) for m in said)
    finally:
        server.terminate()
        server.wait(30)


CONVERT = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
from pathlib import Path
# The converter knows a tokenizer by the ids of one text, so never one whose vocabulary was made here. GPT-2's
# pre-tokenizer is what ByteLevel with its regex is.
pre = json.loads((Path(sys.argv[1]) / "tokenizer.json").read_text())["pre_tokenizer"]
if pre == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""

TALK = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = sys.argv[1], 1024, 1, False, 0
server = xllamacpp.Server(params)
for line in sys.stdin:
    path, body = json.loads(line)
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    print(json.dumps(json.load(urllib.request.urlopen(request, timeout=300))), flush=True)
"""


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP does not name the source of llama.cpp")
def test_gguf_gives_the_same_ids_and_tokens(best, tmp_path):
    for name in ("xllamacpp", "sentencepiece"):
        pytest.importorskip(name)
    gguf = tmp_path / "model.gguf"
    subprocess.run([sys.executable, "-c", CONVERT, LLAMA_CPP, best, "--outfile", gguf, "--outtype", "f32"], check=True)
    dialogue = [{"role": "system", "content": system_prompt_of(best)}, {"role": "user", "content": QUESTION}]
    model, tokenizer = loaded(best)
    prompt = generation_prompt(dialogue, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    [own] = reply_to(model, tokenizer, [prompt], 256)
    requests = [
        ("/apply-template", {"messages": dialogue}),
        ("/tokenize", {"content": prompt, "parse_special": True}),
        ("/completion", {"prompt": ids, "n_predict": len(new), "temperature": 0, "return_tokens": True}),
        ("/v1/chat/completions", {"messages": dialogue, "temperature": 0, "max_tokens": 256}),
    ]
    talk = subprocess.run(
        [sys.executable, "-c", TALK, gguf],
        input="\n".join(map(json.dumps, requests)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    template, tokenized, completion, chat = map(json.loads, talk.stdout.splitlines()[-4:])
    assert template["prompt"] == prompt
    assert tokenized["tokens"] == ids
    assert completion["tokens"] == new
    message = chat["choices"][0]["message"]
    assert (message["reasoning_content"].strip(), message["content"].strip()) == (own.think, own.answer)
