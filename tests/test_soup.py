"""Mixtures of two models: weights, losses and the folder, each against an independent computation."""

import functools
import json
import shutil

import pytest
import torch
from conftest import ROOT
from runs import metrics_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.reading.formats import read_row
from model.export import export, system_prompt_of
from model.qwen3 import load_model, load_tokenizer
from tools import soup

EXAM = "id,question,A,B,C,D,answer\n" + "".join(
    f"{i},第{i}题,甲{i},乙{i},丙{i},丁{i},{'ABCD'[i % 4]}\n" for i in range(20)
)


@pytest.fixture(scope="module")
def base(best, tmp_path_factory):
    """A model with other weights and the tokenizer of `best`."""
    tokenizer = load_tokenizer(str(best))
    torch.manual_seed(5)
    model = load_model("tiny", tokenizer, gradient_checkpointing=False)
    folder = tmp_path_factory.mktemp("base") / "base"
    export(model, model.state_dict(), tokenizer, folder)
    return folder


@pytest.fixture
def mix(tool):
    return functools.partial(tool, soup)


def loss_by_transformers(folder, val) -> float:
    """Row by row, with transformers' own attention and loss, in the precision of the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, system = AutoTokenizer.from_pretrained(folder), system_prompt_of(folder)
    total = count = 0
    for line in val.read_text(encoding="utf-8").splitlines():
        messages = read_row(json.loads(line), system).messages
        for n in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
            ask = {"tokenize": False, "enable_thinking": "reasoning_content" in messages[n]}
            prompt = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, **ask)
            text = tokenizer.apply_chat_template(messages[: n + 1], **ask).removesuffix("\n")
            skip = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            labels = ids.clone()
            labels[:, :skip] = -100
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * (ids.shape[1] - skip)
            count += ids.shape[1] - skip
    return total / count


def test_weights_and_losses_are_those_of_an_independent_mixture(base, best, mix, tmp_path):
    exam = tmp_path / "exam.csv"
    exam.write_text(EXAM, encoding="utf-8")
    out, val = tmp_path / "soup", best.parent / "data/val.jsonl"
    code, said = mix(base, best, "--weights", 0.3, 0.9, "--out", out, "--exam", exam)
    assert code == 0, said
    theirs, ours, mixed = (load_file(folder / "model.safetensors") for folder in (base, best, out))
    assert mixed.keys() == ours.keys()
    for name, weight in mixed.items():
        expected = 0.1 * theirs[name].double() + 0.9 * ours[name].double()
        torch.testing.assert_close(weight.double(), expected, rtol=2**-8, atol=1e-9)  # rounded to bf16
    # The run evaluated fp32 weights; its best/ is rounded to bf16.
    losses = {line.split()[1].rstrip(":"): float(line.split()[3]) for line in said.splitlines() if line[:6] == "weight"}
    own = [row["eval/loss"] for row in metrics_of(best.parent) if "eval/loss" in row]
    assert losses["1"] == pytest.approx(min(own), rel=0.02) and losses["0"] > losses["0.3"] > losses["0.9"]
    for weight, folder in (("0", base), ("0.9", out), ("1", best)):
        shutil.copy(best / "README.md", folder / "README.md") if weight == "0" else None
        assert losses[weight] == pytest.approx(loss_by_transformers(folder, val), rel=0.02)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert system_prompt_of(out) == system_prompt_of(best) and "的 0.9 和" in card and "| 0.3 |" in card
    assert "exam" in said and card.count("%") >= 4
    assert json.loads((out / "config.json").read_text()) == json.loads((best / "config.json").read_text())
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, said = mix(base, best, "--out", out)
    assert code == 2 and f"{out} exists already" in said
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_models_of_other_shapes_or_tokenizers_are_refused(base, best, small_folder, mix, tmp_path):
    code, _ = mix(small_folder, best, "--out", tmp_path / "soup")
    assert code.startswith("tools.soup: these models have different tokenizers: "), code
    fewer = tmp_path / "fewer"
    shutil.copytree(base, fewer)
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    weights = load_file(fewer / "model.safetensors")
    cut = {
        name: weight[:32] if "gate" in name or "up_proj" in name else weight[:, :32] if "down_proj" in name else weight
        for name, weight in weights.items()
    }
    save_file(
        {name: weight.contiguous() for name, weight in cut.items()}, fewer / "model.safetensors", {"format": "pt"}
    )
    code, _ = mix(fewer, best, "--out", tmp_path / "soup")
    assert "these models have different shapes: model.layers.0.mlp.down_proj.weight is [64, 32] in the base" in code
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", 1.5], "between 0"),
        (["--weights", 0], "between 0"),
        (["--dataset", "none.jsonl"], "there is no dataset file 'none.jsonl'"),
        (["--exam", "none.csv"], "none.csv"),
    ],
)
def test_mistakes(flags, message, base, best, mix, tmp_path):
    code, said = mix(base, best, "--out", tmp_path / "soup", *flags)
    assert code and message in f"{code}{said}" and not (tmp_path / "soup").exists()
    code, said = mix(base, base)
    assert code == 2 and "is not the best/ of a run" in said
    code, said = mix(ROOT / "nothing", best, "--out", tmp_path / "soup")
    assert "there is no model folder" in code
