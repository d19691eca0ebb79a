"""Chat templates that are not Qwen3's: what is trained is what inference sends, and what comes back is split."""

import json

import pytest
import torch
from conftest import load
from ranks import run
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from data.base.errors import UserError
from data.encode import encode_rows
from data.reading.rows import Row
from data.template import generation_prompt
from model.generate import split_reply
from model.qwen3 import generation_config, load_tokenizer
from model.tiny import tiny_tokenizer

# As DeepSeek-R1-Distill does it: no thinking in any reply that it renders, and a prompt that opens the block.
DISTILL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# As Qwen2.5 does it: ChatML, a system prompt of its own, and no thinking.
PLAIN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"question": f"第{i}天头痛怎么办？", "think": f"先想{i}。\n\n再想：多半是紧张。", "answer": f"多休息{i}天。"}
    for i in range(12)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small qwen2 models with these templates: name -> folder."""
    folder = tmp_path_factory.mktemp("models")
    texts = [text for row in ROWS for text in row.values()]
    names = {
        "distill": {"<|endoftext|>": BEGIN, "<|im_start|>": "<｜User｜>", "<|im_end|>": END},
        "plain": {"<think>": "<a>", "</think>": "<b>"},
    }
    for name, renamed in names.items():
        words = tiny_tokenizer(texts).backend_tokenizer.to_str()
        for old, new in renamed.items():
            words = words.replace(f'"{old}"', f'"{new}"')
        source = folder / f"{name}.json"
        source.write_text(words, encoding="utf-8")
        tokenizer = tiny_tokenizer(texts)
        tokenizer._tokenizer = Tokenizer.from_str(words)
        tokenizer.chat_template = DISTILL if name == "distill" else PLAIN
        tokenizer.eos_token = END if name == "distill" else "<|im_end|>"
        tokenizer.bos_token = BEGIN if name == "distill" else None
        tokenizer.pad_token = END if name == "distill" else "<|endoftext|>"
        config = Qwen2Config(vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                             tie_word_embeddings=True, use_sliding_window=False)  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in names}


def messages(*turns, thinking=True):
    dialogue = []
    for question, answer in turns:
        dialogue.append({"role": "user", "content": question})
        dialogue.append({"role": "assistant", "content": answer} | ({"reasoning_content": "想。"} if thinking else {}))
    return dialogue


def test_the_block_that_the_prompt_opens(folders):
    tokenizer = load_tokenizer(str(folders["distill"]))
    rows = [
        Row("1", {}, messages(("头痛？", "休息。"), ("还痛？", "看医生。"))),
        Row("2", {}, messages(("头痛？", "休息。"), thinking=False)),
    ]
    first, second, plain = encode_rows(rows, tokenizer, 512, "error")[0]
    prompt = f"{BEGIN}<｜User｜>头痛？<｜Assistant｜><think>\n"
    history = prompt.removesuffix("<think>\n") + f"休息。{END}"
    parts = [(first, prompt), (second, f"{history}<｜User｜>还痛？<｜Assistant｜><think>\n")]
    for example, asked in parts:
        ids = example.input_ids.tolist()
        assert tokenizer.decode(ids[: example.prompt_length]) == asked
        assert tokenizer.decode(ids[example.prompt_length : example.answer_start]) == "想。\n</think>"
    assert tokenizer.decode(first.input_ids[first.answer_start :]) == f"\n\n休息。{END}"
    assert tokenizer.decode(plain.input_ids) == f"{prompt}\n</think>\n\n休息。{END}"
    assert plain.answer_start == plain.prompt_length and plain.num_think_targets == 0

    ends = [tokenizer.eos_token_id]
    whole = split_reply(first.input_ids[first.prompt_length :].tolist(), tokenizer, ends, prompt)
    assert whole == ("想。", "休息。", True, True)
    unfinished = split_reply(tokenizer("想")["input_ids"], tokenizer, ends, prompt)
    assert unfinished == ("想", "", False, False)
    no_thinking = generation_prompt(rows[1].messages[:-1], tokenizer, thinking=False)
    assert split_reply(tokenizer(f"休息。{END}")["input_ids"], tokenizer, ends, no_thinking) == (
        "",
        "休息。",
        True,
        True,
    )


def test_thinking_that_is_shortened_keeps_its_first_token(folders):
    tokenizer = load_tokenizer(str(folders["distill"]))
    dialogue = messages(("？", "好。"))
    dialogue[1]["reasoning_content"] = "甲乙丙丁" * 20
    (example,), problems = encode_rows([Row("1", {}, dialogue)], tokenizer, 64, "truncate")
    thinking = tokenizer.decode(example.input_ids[example.prompt_length : example.answer_start])
    assert thinking.startswith("甲乙丙") and thinking.endswith("\n</think>") and len(example) <= 64
    assert problems[0]["action"] == "thinking shortened"


def test_chatml_without_thinking_learns_the_form_of_qwen3(folders, capsys):
    tokenizer = load_tokenizer(str(folders["plain"]))
    assert "leaves thinking out" in capsys.readouterr().out
    (example,), _ = encode_rows([Row("1", {}, messages(("头痛？", "休息。")))], tokenizer, 512, "error")
    text = "<|im_start|>user\n头痛？<|im_end|>\n<|im_start|>assistant\n<think>\n想。\n</think>\n\n休息。<|im_end|>"
    assert tokenizer.decode(example.input_ids) == text
    assert tokenizer.decode(example.input_ids[example.prompt_length]) == "<think>"


def test_a_template_without_a_place_for_thinking_is_refused(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["distill"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "config.json").write_text((folders["distill"] / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no place for thinking"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["distill", "plain"])
def test_qwen2_trains_and_its_export_stands_alone(folders, name, jsonl, tmp_path):
    out = tmp_path / "out"
    args = ["tiny", "--model", folders[name], "--dataset", jsonl(ROWS), "--max-steps", "2", "--eval-steps", "1",
            "--sample-max-new-tokens", "4", "--val-fraction", "0.2", "--output-dir", out]  # fmt: skip
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and "Traceback" not in outcome.output, outcome.output
    best = out / "best"
    tokenizer, model = AutoTokenizer.from_pretrained(best), AutoModelForCausalLM.from_pretrained(best)
    ends = [END] if name == "distill" else ["<|im_end|>", "<|endoftext|>"]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(ends)
    assert generation_config(model, tokenizer).eos_token_id == tokenizer.convert_tokens_to_ids(ends)
    assert (best / "Modelfile").exists() == (name == "plain")
    parser = "deepseek_r1" if name == "distill" else "qwen3"
    assert f"--reasoning-parser {parser}" in (best / "README.md").read_text()
    prompt = tokenizer.apply_chat_template(messages(("头痛？", ""))[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<｜Assistant｜><think>\n" if name == "distill" else "<|im_start|>assistant\n")
    (example,), _ = encode_rows([Row("1", {}, messages(("头痛？", "休息。")))], tokenizer, 512, "error")
    again = load_tokenizer(str(best))
    (same,), _ = encode_rows([Row("1", {}, messages(("头痛？", "休息。")))], again, 512, "error")
    assert example.input_ids.tolist() == same.input_ids.tolist()


def test_sliding_windows_are_refused(folders, jsonl, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders["plain"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    args = ["tiny", "--model", folder, "--dataset", jsonl(ROWS), "--output-dir", tmp_path / "out"]
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [2] and "sliding-window attention" in outcome.output


def test_the_sample_is_read_with_every_template(folders):
    rows = load("sample:40").train
    for folder in folders.values():
        tokenizer = load_tokenizer(str(folder))
        examples, problems = encode_rows(rows, tokenizer, 2000, "error")
        assert len(examples) == len(rows) and not problems
