"""What is seen while the model trains: accuracies, weighted parts, samples."""

import json
import math
from copy import deepcopy

import pytest
import torch
from conftest import peaks, settings
from ranks import run
from runs import metrics_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data.batches import make_batch
from data.dataset import Data
from data.encode import encode_rows
from data.reading.formats import read_row
from data.reading.rows import Row
from loop.config import TrainConfig
from loop.evaluate import losses
from loop.record.tracking import Tracker, keep_rows
from loop.samples import Samples, prompts
from loop.score import score
from loop.state import TrainState
from loop.step import train_step
from model.export import export
from model.generate import Reply, format_rates, ready_to_generate, reply_to, split_reply
from tools.reports.record import read_lines


def plain_logits(causal_lm, example):
    with ready_to_generate(causal_lm):
        return causal_lm(example.input_ids[None]).logits[0]


@torch.no_grad()
def test_accuracy_is_the_share_of_likeliest_tokens(examples, make_model, accelerator):
    """Against transformers' own logits, row by row."""
    model = make_model(loss_chunk=50)
    model.causal_lm.lm_head.weight[examples[0].input_ids[-1]] *= 3  # a guess that is right at times
    hits, ends = {"think": [], "answer": []}, {"close": [], "stop": []}
    for example in examples[:8]:
        likeliest = plain_logits(model.causal_lm, example).argmax(-1)[:-1]
        right = likeliest == example.input_ids[1:]
        hits["think"] += right[example.prompt_length - 1 : example.answer_start - 1].tolist()
        hits["answer"] += right[example.answer_start - 1 :].tolist()
        ends["close"].append(right[example.answer_start - 2].item())
        ends["stop"].append(right[-1].item())
    metrics = losses(score(model, examples[:8], accelerator, batch_size=5))
    assert metrics["close_accuracy"] == sum(ends["close"]) / 8 and metrics["stop_accuracy"] == sum(ends["stop"]) / 8
    assert metrics["think_accuracy"] == pytest.approx(sum(hits["think"]) / len(hits["think"]), abs=1e-12)
    assert metrics["answer_accuracy"] == pytest.approx(sum(hits["answer"]) / len(hits["answer"]), abs=1e-12)


def test_accuracy_of_a_model_that_knows_the_row(examples, make_model, accelerator):
    model = make_model()
    optimizers = peaks([torch.optim.AdamW(model.parameters(), lr=3e-3)])
    batch = make_batch(examples[:1], batch_size=1)
    for _ in range(60):
        train_step(model, optimizers, batch, accelerator, 1.0, settings())
    metrics = losses(score(model, examples[:1], accelerator))
    assert metrics["think_accuracy"] > 0.95 and metrics["answer_accuracy"] > 0.95
    assert metrics["close_accuracy"] == metrics["stop_accuracy"] == 1.0


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 1.0), (0.3, 2.0)])
def test_weighted_parts_scale_the_gradient_and_not_the_report(examples, make_model, accelerator, weights):
    """Gradient of sum(weight * loss) / num_tokens, made with transformers' logits; losses as without weights."""
    rows = examples[:3]
    expected = make_model()
    total = torch.zeros(())
    for example in rows:
        losses = cross_entropy(
            plain_logits(expected.causal_lm, example)[example.prompt_length - 1 : -1],
            example.input_ids[example.prompt_length :],
            reduction="none",
        )
        num_think = example.answer_start - example.prompt_length
        total = total + weights[0] * losses[:num_think].sum() + weights[1] * losses[num_think:].sum()
    (total / sum(len(example) - example.prompt_length for example in rows)).backward()

    model, gradients = make_model(), {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    batch = make_batch(rows, batch_size=2)
    config = settings(think_weight=weights[0], answer_weight=weights[1], max_grad_norm=1e9)
    optimizers = peaks([Keep(model.parameters(), lr=0.0)])
    weighted = train_step(model, optimizers, batch, accelerator, 1.0, config)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    plain = make_model()
    optimizers = peaks([torch.optim.SGD(plain.parameters(), lr=0.0)])
    assert train_step(plain, optimizers, batch, accelerator, 1.0, settings(max_grad_norm=1e9))[:4] == weighted[:4]


def test_the_model_in_training_answers_as_transformers_alone(split, tokenizer, make_model):
    """Packed attention, checkpointing and the training mode leave no trace in an answer, nor the answer in them."""
    model = make_model(gradient_checkpointing=True)
    plain = AutoModelForCausalLM.from_config(deepcopy(model.causal_lm.config), attn_implementation="sdpa").eval()
    plain.load_state_dict(model.causal_lm.state_dict())
    plain.generation_config = model.causal_lm.generation_config
    asked, before = prompts(split.val[:3], tokenizer), tokenizer.backend_tokenizer.to_str()
    with ready_to_generate(model.causal_lm):
        ours = reply_to(model.causal_lm, tokenizer, asked, 24, model.generate)
    assert ours == reply_to(plain, tokenizer, asked, 24)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert model.causal_lm.training and model.causal_lm.config._attn_implementation == "packed"


def test_the_form_of_rows_with_and_without_thinking(tokenizer, make_model, accelerator):
    """One row thinks, the next does not, whichever comes first; nothing ends its thinking if none does."""
    rows = [
        Row("", {}, read_row({"question": "头晕？", "think": think, "answer": "多休息。"}).messages)
        for think in ("想", "", "再想")
    ]
    first, plain, last = encode_rows(rows, tokenizer, 512, "error")[0]
    close = tokenizer.convert_tokens_to_ids("</think>")
    for row in (first, plain, last):
        ids = row.input_ids[row.prompt_length :]
        spans = {part: ids[begin:end].tolist() for part, begin, end in row.parts}
        assert spans["stop"] == [tokenizer.eos_token_id] and spans.get("close", [close]) == [close]
        assert ("close" in spans) == ("think" in spans) == (row is not plain)
        assert spans.get("think", []) + spans["answer"] == ids.tolist()
    metrics = losses(score(make_model(), [plain], accelerator))
    assert math.isnan(metrics["close_accuracy"]) and metrics["stop_accuracy"] in (0.0, 1.0)


def test_answers_in_bf16_are_those_of_the_exported_model(split, tokenizer, make_model, tmp_path):
    """Weights are cast once and come back as they were, and the same parameters."""
    model = make_model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    asked = prompts(split.val[:3], tokenizer)
    with ready_to_generate(model.causal_lm, in_bf16=True), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight
        ours = reply_to(model.causal_lm, tokenizer, asked, 24, model.generate)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1]) and parameter.requires_grad
    export(model.causal_lm, model.causal_lm.state_dict(), tokenizer, tmp_path / "best")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype="auto", attn_implementation="sdpa")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert ours == reply_to(exported.eval(), tokenizer, asked, 24)


def test_format_rates():
    replies = [
        Reply("想", "答", closed=True, stopped=True),
        Reply("", "答", closed=True, stopped=True),
        Reply("想", "", closed=True, stopped=True),
        Reply("想", "", closed=False, stopped=False),
    ]
    assert format_rates(replies) == {"closed": 0.75, "answered": 0.5, "stopped": 0.75, "empty_think": 0.25}


def test_a_question_is_asked_as_its_row_was_trained(tokenizer):
    """A row whose reply does not think: the prompt brings the empty block, which counts as the reply's."""
    rows = [
        Row("", {}, read_row({"question": "头晕？", "think": t, "answer": "多休息。"}).messages) for t in ("想", "")
    ]
    examples = encode_rows(rows, tokenizer, 512, "error")[0]
    asked = prompts(rows, tokenizer)
    for prompt, example in zip(asked, examples, strict=True):
        assert tokenizer(prompt)["input_ids"] == example.input_ids[: example.prompt_length].tolist()
    ids, ends = tokenizer("多休息。<|im_end|>")["input_ids"], tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    replies = [split_reply(ids, tokenizer, ends, prompt) for prompt in asked]
    assert replies == [("", "多休息。", False, True), ("", "多休息。", True, True)]


def test_a_full_disk_ends_no_training(split, examples, tokenizer, tmp_path, capsys):
    config = TrainConfig(output_dir=str(tmp_path), swanlab_mode="disabled")
    state = TrainState("id")
    tracker = Tracker(config, state, {})
    samples = Samples(config, Data(split, tokenizer, examples, examples, 0, 1), tracker, state)
    samples.path = tmp_path / "no folder" / "samples.jsonl"
    samples.write([{"step": 1, "model": "training", "question": "?", "think": "", "answer": ""}])
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize("end_of_line", ["\u2028", "\x85"])
def test_other_ends_of_lines_in_a_text_do_not_end_a_row(end_of_line, tmp_path):
    rows = [{"step": step, "question": f"头晕{end_of_line}恶心？", "reference": "nan"} for step in range(4)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_lines(path) == rows
    keep_rows(path, 2)
    assert read_lines(path) == rows[:3]


def test_two_blocks_of_thinking_are_not_one(tokenizer):
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    for text in ("<think>\n一\n</think>\n\n<think>\n二\n</think>\n\n答", "<think>\n一\n</think>\n\n答</think>"):
        assert not split_reply(tokenizer(text)["input_ids"], tokenizer, ends).closed


def test_samples_of_a_run(tmp_path):
    """Three at each evaluation, all of the validation side at the end; none with 0, and then the same training."""
    args = ["tiny", "--max-steps", "4", "--eval-steps", "2", "--sample-max-new-tokens", "8"]
    assert run([*args, "--output-dir", tmp_path / "with"]).codes == [0]
    lines = [json.loads(line) for line in (tmp_path / "with/samples.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["model"]) for line in lines]
    assert steps == [(step, "training") for step in (0, 2, 4) for _ in range(3)] + [(4, "best")] * 12
    rows = [read_row(json.loads(line)).messages for line in (tmp_path / "with/data/val.jsonl").read_text().splitlines()]
    assert [(line["question"], line["reference"]) for line in lines[-12:]] == [
        (row[0]["content"], row[1]["content"]) for row in rows
    ]
    assert all(0 <= row["format/closed"] <= 1 for row in metrics_of(tmp_path / "with") if "eval/loss" in row)
    assert "best_format/closed" in metrics_of(tmp_path / "with")[-1]

    assert run([*args, "--num-samples", "0", "--output-dir", tmp_path / "without"]).codes == [0]
    assert not (tmp_path / "without/samples.jsonl").exists()
    args += ["--num-samples", "2", "--sample-budget", "1e-9"]
    assert run([*args, "--output-dir", tmp_path / "cut"]).codes == [0]
    lines = [json.loads(line) for line in (tmp_path / "cut/samples.jsonl").read_text().splitlines()]
    assert [line.get("cut_at") for line in lines] == [1] * 6 + [None] * 12
    assert not any(name.startswith("format/") for row in metrics_of(tmp_path / "cut") for name in row)
    report = (tmp_path / "cut/report.md").read_text(encoding="utf-8")
    assert "共 3 次评估，每次回答 2 个问题" in report and "其中 3 次在 1 至 1 个词元处截止" in report

    best = [(tmp_path / run / "best/model.safetensors").read_bytes() for run in ("with", "without", "cut")]
    assert best[0] == best[1] == best[2]
