"""Every family of models through the same loop: rows laid end to end stay apart, on any number of processes, through a
kill, and in what is exported. Qwen3, Qwen2.5, DeepSeek-R1-Distill and Qwen3.5, small and random."""

import copy
import json

import pytest
import torch
from conftest import good_row, load, settings
from ranks import run, uninterrupted
from runs import assert_same, assert_same_end, metrics_of
from test_template import folders  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration

import model.attention
import model.recurrent
from data.base.errors import UserError
from data.batches import make_batch
from data.encode import encode_rows
from data.template import generation_prompt
from loop.start.probe import check_rows_are_apart, rows_reach_each_other
from loop.start.step_file import load_step_file
from model.generate import load_for_generation, reply_to
from model.loss import SFTModel
from model.qwen3 import load_model, load_tokenizer, model_config
from model.recurrent import PackedGatedDeltaNet

FAMILIES = ["tiny", "plain", "distill", "tiny-qwen3.5"]  # qwen3, qwen2 with two templates, qwen3.5
STRATEGIES = ["one", "ddp2", "fsdp2"]


@pytest.fixture
def name_of(folders):  # noqa: F811
    return lambda family: str(folders.get(family, family))


@pytest.fixture
def family_of(name_of):
    """family -> (tokenizer, SFTModel)"""

    def make(family: str):
        rows = load().train
        texts = (m["content"] for row in rows for m in row.messages)
        tokenizer = load_tokenizer(name_of(family), texts)
        torch.manual_seed(0)
        return tokenizer, SFTModel(load_model(name_of(family), tokenizer, False), loss_chunk=10**6)

    return make


def gradients(sft_model, rows, accelerator, **packing) -> torch.Tensor:
    method = load_step_file("loop/step.py", ())
    sft_model.zero_grad()
    method.forward_backward(sft_model, make_batch(rows, **packing), accelerator, settings())
    return torch.cat([p.grad.flatten() for p in sft_model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_gradient_of_transformers_own_rows(family, family_of, accelerator):
    tokenizer, sft_model = family_of(family)
    rows = encode_rows(load().train[:5], tokenizer, 2000, "error")[0]
    packed = gradients(sft_model, rows, accelerator, batch_size=1, micro_batch_tokens=4096)
    apart = gradients(sft_model, rows, accelerator, batch_size=1)

    plain = AutoModelForCausalLM.from_config(copy.deepcopy(sft_model.causal_lm.config), attn_implementation="sdpa")
    plain.load_state_dict(sft_model.causal_lm.state_dict())
    total = sum(row.num_targets for row in rows)
    for row in rows:
        ids = row.input_ids.long()[None]
        labels = ids.masked_fill(torch.arange(len(row)) < row.prompt_length, -100)
        (plain(ids, labels=labels).loss * row.num_targets / total).backward()
    named = dict(plain.named_parameters())
    own = torch.cat([named[n.removeprefix("causal_lm.")].grad.flatten() for n, _ in sft_model.named_parameters()])
    assert (packed - own).abs().max() <= 1e-5 * own.abs().max()
    assert (apart - own).abs().max() <= 1e-5 * own.abs().max()


def ignore_rows(monkeypatch, family: str) -> None:
    """As if nobody had told the layers where a row begins."""
    if family == "tiny-qwen3.5":
        monkeypatch.setattr(model.recurrent, "lengths_of", lambda cu_seqlens: [int(cu_seqlens[-1])])
    else:
        own = model.attention.attend_row_by_row

        def as_one_row(query, key, value, cu_seqlens, *rest):
            return own(query, key, value, cu_seqlens[[0, -1]], *rest)

        monkeypatch.setattr(model.attention, "attend_row_by_row", as_one_row)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_sees_rows_that_reach_each_other(family, family_of, accelerator, monkeypatch):
    _, sft_model = family_of(family)
    assert not rows_reach_each_other(sft_model, accelerator)
    ignore_rows(monkeypatch, family)
    assert rows_reach_each_other(sft_model, accelerator)
    with pytest.raises(UserError, match="reach each other"):
        check_rows_are_apart(sft_model, accelerator)


def kernels(keep_apart: bool):
    """In the place of causal-conv1d's and flash-linear-attention's, which need a GPU: they read packed rows."""
    conv, rule = model.recurrent.convolve, model.recurrent.recur

    def convolve(x, *args, seq_idx=None, **kwargs):
        is_packed = keep_apart and seq_idx is not None
        lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist() if is_packed else [x.shape[2]]
        return torch.cat([conv(part, *args, **kwargs) for part in x.split(lengths, dim=2)], dim=2)

    def recur(q, k, v, *, g, beta, cu_seqlens=None, seq_idx=None, **kwargs):
        lengths = cu_seqlens.diff().tolist() if keep_apart and cu_seqlens is not None else [q.shape[1]]
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
        return torch.cat([rule(*p[:3], g=p[3], beta=p[4], **kwargs)[0] for p in parts], dim=1), None

    return convolve, recur


@pytest.mark.parametrize("keep_apart", [True, False])
def test_kernels_get_the_rows_and_are_left_if_they_ignore_them(keep_apart, family_of, accelerator, monkeypatch, capsys):
    tokenizer, sft_model = family_of("tiny-qwen3.5")
    rows = encode_rows(load().train[:5], tokenizer, 2000, "error")[0]
    packing = dict(batch_size=1, micro_batch_tokens=4096)
    own = gradients(sft_model, rows, accelerator, **packing)
    convolve, recur = kernels(keep_apart)
    monkeypatch.setattr(model.recurrent, "convolve", convolve)
    monkeypatch.setattr(model.recurrent, "recur", recur)
    monkeypatch.setattr(PackedGatedDeltaNet, "by_kernels", True)
    assert rows_reach_each_other(sft_model, accelerator) is not keep_apart
    check_rows_are_apart(sft_model, accelerator)
    assert PackedGatedDeltaNet.by_kernels is keep_apart
    assert ("do not keep rows apart" in capsys.readouterr().err) is not keep_apart
    now = gradients(sft_model, rows, accelerator, **packing)
    assert (now - own).abs().max() <= 1e-5 * own.abs().max()


@pytest.fixture(scope="module")
def command(folders, tmp_path_factory):  # noqa: F811
    """(family, strategy) -> the arguments of a run without --output-dir"""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    args = ["tiny", "--dataset", rows, "--val-fraction", "0.3", "--eval-steps", "2", "--save-steps", "1",
            "--logging-steps", "1", "--max-steps", "4", "--learning-rate", "1e-3",
            "--sample-max-new-tokens", "8"]  # fmt: skip

    def arguments(family: str, strategy: str) -> list:
        own = ["--model", folders.get(family, family)]
        return [*args, *own, "--gradient-accumulation-steps", 4 if strategy == "one" else 2]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return {
        family: uninterrupted(
            lambda strategy, out, family=family: [*command(family, strategy), "--output-dir", out], tmp_path_factory
        )
        for family in FAMILIES
    }


def figures(folder) -> dict:
    found = {(row["step"], name): value for row in metrics_of(folder) for name, value in row.items()}
    return {key: value for key, value in found.items() if key[1].startswith(("train/", "eval/"))}


def assert_alike(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():  # torch's fp32 norm of a large matrix on a CPU errs by more
        assert value == pytest.approx(theirs[key], rel=5e-5 if key[1] == "train/grad_norm" else 1e-5), key


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_and_row_by_row_train_alike(strategy, family, command, whole, tmp_path):
    packed = figures(whole[family](strategy))
    one = [*command(family, strategy), "--micro-batch-tokens", "0", "--output-dir", tmp_path / "run"]
    outcome = run(one, strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0}, outcome.output
    assert_alike(packed, figures(tmp_path / "run"))
    assert_alike(packed, figures(whole[family]("one")))


@pytest.mark.integration
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_qwen3_5_ends_with_the_same_bits(strategy, command, whole, tmp_path):
    args = [*command("tiny-qwen3.5", strategy), "--output-dir", tmp_path / "run", "--resume"]
    assert -9 in run(args, strategy, "kill_in_step(3)", tmp_path / "log").codes
    outcome = run(args, strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0} and "resumed from" in outcome.output, outcome.output
    assert_same_end(tmp_path / "run", whole["tiny-qwen3.5"](strategy))


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_answers_as_the_loop_does(family, whole):
    """Greedy tokens of the export, with nothing of this project; and the prompt is the one that was trained."""
    best = whole[family]("one") / "best"
    tokenizer = AutoTokenizer.from_pretrained(best)
    prompts = [
        generation_prompt([{"role": "user", "content": text}], tokenizer) for text in ("头痛？", "第3个问题？多久")
    ]
    assert prompts[0].endswith("<think>\n") == (family in ("distill", "tiny-qwen3.5"))
    plain = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    own = load_model(str(best), load_tokenizer(str(best)), False).eval()
    own.set_attn_implementation("sdpa")
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        greedy = dict(do_sample=False, max_new_tokens=12, temperature=None, top_k=None, top_p=None)
        assert torch.equal(plain.generate(ids, **greedy), own.generate(ids, **greedy))
    together, alone = reply_to(plain, tokenizer, prompts, 12), [reply_to(plain, tokenizer, [p], 12)[0] for p in prompts]
    assert together == alone  # padding on the left does not reach the recurrent state


@pytest.mark.integration
def test_of_a_qwen3_5_with_pictures_the_part_for_text_is_trained(whole, tmp_path):
    """As the hubs have it: the text's weights under another prefix, beside those of the encoder of pictures."""
    source = whole["tiny-qwen3.5"]("one") / "best"
    text = AutoModelForCausalLM.from_pretrained(source)
    sizes = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, num_position_embeddings=16)
    vision = sizes | {"out_hidden_size": text.config.hidden_size}
    config = Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=True)
    both = Qwen3_5ForConditionalGeneration(config)
    both.model.language_model.load_state_dict(text.model.state_dict())
    both.to(torch.bfloat16).save_pretrained(tmp_path / "both")
    text.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "both")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "both")  # of a class of its own
    tokenizer.save_pretrained(tmp_path / "text")

    args = ["tiny", "--dataset", "sample:20", "--max-steps", "1", "--num-samples", "0", "--output-dir"]
    for name in ("both", "text"):
        own = [tmp_path / f"run-{name}", "--model", tmp_path / name]
        outcome = run([*args, *own], log=tmp_path / "log")
        assert outcome.codes == [0], outcome.output
    assert figures(tmp_path / "run-both") == figures(tmp_path / "run-text")
    exported, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"run-{name}" / "best") for name in ("both", "text")
    )
    assert exported.config.model_type == "qwen3_5_text"
    again, said = AutoTokenizer.from_pretrained(tmp_path / "run-both/best"), "头痛\n\n怎么办 42岁  体温38.5℃"
    assert again(said)["input_ids"] == tokenizer(said)["input_ids"]
    assert_same(dict(exported.state_dict()), dict(other.state_dict()))
    model, _ = load_for_generation(tmp_path / "both", torch.device("cpu"))
    assert model.config.max_position_embeddings == text.config.max_position_embeddings


@pytest.mark.integration
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_trained_where_rows_reach_each_other(strategy, command, tmp_path):
    args = [*command("tiny", strategy), "--output-dir", tmp_path / "run"]
    outcome = run(args, strategy, "let_rows_reach_each_other()", tmp_path / "log")
    assert set(outcome.codes) == {2} and "reach each other" in outcome.output, outcome.output
    assert not (tmp_path / "run/metrics.jsonl").exists() and "Traceback" not in outcome.output


def test_other_models_with_pictures_are_refused_by_name(tokenizer, tmp_path):
    """Though their part for text is a Qwen2, whose weights would not be found under its own names."""
    config = {"model_type": "llava", "text_config": {"model_type": "qwen2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a llava model"):
        model_config(str(tmp_path), tokenizer)
