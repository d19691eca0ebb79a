"""Methods written from the documentation alone: against plain PyTorch over transformers' logits, under every launch,
killed and resumed."""

import copy
import dataclasses
import json
import re
import shutil

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, good_row, settings
from ranks import run
from runs import assert_same_end, metrics_of, newest, weights_and_moments
from safetensors.torch import load_file, save_file

from data.batches import make_batch
from loop.config import Resolved
from loop.reference import copy_of
from loop.start.step_file import load_step_file
from model.lora import add_lora
from model.loss import Reference

SECTION = (ROOT / "docs/method.md").read_text(encoding="utf-8").split("\n## A loss of your own\n")[1].split("\n## ")[0]
NAMES = ("smoothing", "entropy", "divergence", "row means", "freezing")
METHODS = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL), strict=True))


@pytest.fixture
def step_file(tmp_path):
    def write(code: str, name: str = "own.py"):
        path = tmp_path / name
        path.write_text(code, encoding="utf-8")
        return path

    return write


def test_each_is_at_most_twelve_lines():
    for name, code in METHODS.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 12, name


def plain_loss(name: str, causal_lm, before, rows) -> torch.Tensor:
    """Over padded rows with transformers' own attention, written apart from the loop."""
    length = max(map(len, rows))
    ids = torch.stack([F.pad(row.input_ids.long(), (0, length - len(row))) for row in rows])
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    targets = [(n, slice(row.prompt_length - 1, len(row) - 1)) for n, row in enumerate(rows)]
    logits = causal_lm(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    with torch.no_grad():
        old = before(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    by_row = []
    for (n, place), row in zip(targets, rows, strict=True):
        log_p, log_old = logits[n, place], old[n, place]
        losses = F.nll_loss(log_p, row.input_ids[row.prompt_length :].long(), reduction="none")
        entropy = -(log_p.exp() * log_p).sum(-1).detach()
        by_row.append(
            {
                "smoothing": 0.9 * losses - 0.1 * log_p.mean(-1),
                "entropy": losses * entropy,
                "divergence": losses + 0.1 * F.kl_div(log_p, log_old, reduction="none", log_target=True).sum(-1),
                "row means": losses,
                "freezing": losses,
            }[name]
        )
    if name == "row means":
        return torch.stack([one.mean() for one in by_row]).mean()
    return torch.cat(by_row).mean()


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_method_of_the_documentation_has_the_gradient_of_plain_pytorch(
    name, lora, make_model, examples, accelerator, step_file
):
    """However rows are packed, and with a chunk of few targets."""
    method, rows = load_step_file(str(step_file(METHODS[name]))), examples[:4]
    model = make_model(loss_chunk=50)
    if lora:
        add_lora(model.causal_lm, 4, "tiny")
    before = copy.deepcopy(model.causal_lm)
    if method.REFERENCE:
        own = Reference(model.causal_lm) if lora else copy_of(model.causal_lm, Resolved(mixed_precision="no"))
        model.reference = (own,)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.02 * torch.randn(p.shape, generator=generator)  # it has been trained
    method.make_optimizers(model, settings())
    plain = copy.deepcopy(model.causal_lm)
    for causal_lm in (plain, before):
        causal_lm.set_attn_implementation("sdpa")
    plain_loss(name, plain, before, rows).backward()
    expected = {key: p.grad for key, p in plain.named_parameters()}
    scale = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for batch_size in (1, 3, 4):
        model.zero_grad(set_to_none=True)
        method.forward_backward(model, make_batch(rows, batch_size=batch_size), accelerator, settings())
        for key, p in model.causal_lm.named_parameters():
            assert (p.grad is None) == (expected[key] is None), key
            if p.grad is not None:
                assert (p.grad - expected[key]).abs().max() <= 1e-5 * scale, (key, batch_size)
    if name == "freezing":
        kept = [key for key, gradient in expected.items() if gradient is None and ".lora_" not in key]
        assert any("embed_tokens" in key for key in kept) and any("layers.0." in key for key in kept)


@pytest.mark.parametrize("name", ["kl", "rho", "eaft", "dft", "label_smoothing", *NAMES])
def test_a_rank_without_rows_adds_nothing(name, make_model, examples, accelerator, step_file):
    """Three rows on two ranks: the last micro-batch of one has no target, and every parameter a gradient."""
    own = step_file(METHODS[name]) if name in METHODS else ROOT / f"recipes/{name}.py"
    method, model = load_step_file(str(own)), make_model()
    rows = [dataclasses.replace(row, reference=torch.ones(row.num_targets)) for row in examples[:3]]
    if method.REFERENCE == "logits":
        model.reference = (copy_of(model.causal_lm, Resolved(mixed_precision="no")),)
    method.make_optimizers(model, settings())
    both = [make_batch(rows, batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    (batch,) = [one for one in both if not one.micro_batches[-1].rows]
    empty = batch.micro_batches[-1]
    assert len(batch.micro_batches) == 2 and len(empty.row) == len(empty.reference) == 0
    loss, losses = method.micro_batch_loss(model, empty, batch, settings())
    loss.backward()
    assert loss == 0 and len(losses) == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


def test_a_function_that_writes_to_the_logits_leaves_the_losses_alone(make_model, examples):
    inputs = make_batch(examples[:2], batch_size=2).micro_batches[0].inputs

    @torch.no_grad()
    def halved(logits, ids):
        return logits.div_(2)[:, 0]

    model, gradients = make_model(), []
    for losses in (model(**inputs), model(**inputs, of_logits=halved)[0]):
        gradients.append(torch.autograd.grad(losses.sum(), list(model.parameters())))
        gradients[-1] += (losses,)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_function_gets_the_same_random_numbers_in_the_backward(make_model, examples):
    model, seen = make_model(loss_chunk=20), []

    def noisy(logits, ids):
        seen.append(torch.rand(len(ids)))
        return seen[-1] * logits.logsumexp(-1), ids * 2

    losses, noise, doubled = model(**make_batch(examples[:2], batch_size=2).micro_batches[0].inputs, of_logits=noisy)
    assert not losses.eq(0).any() and doubled.dtype == torch.int64
    state = torch.get_rng_state()
    noise.sum().backward()
    number = len(seen) // 2
    assert number > 1 and all(torch.equal(a, b) for a, b in zip(seen[:number], seen[number:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


LOSS = "def micro_batch_loss(model, micro_batch, batch, config):\n"
LOGITS = "    losses, _ = model(**micro_batch.inputs, of_logits=lambda logits, ids: logits)\n"
LOGITS += "    return losses.sum(), losses\n"
IN_PLACE = LOGITS.replace("ids: logits)", "ids: logits.div_(2)[:, 0])")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"REFERENCE = 'logit'\n{LOSS}{LOGITS}", "REFERENCE is"),
        (LOSS + LOGITS, "own.py, line 2: ValueError: of_logits gave [4, 2048] for 4 targets"),
        (f"REFERENCE = 'logits'\n{LOSS}{LOGITS}", "own.py, line 3: TypeError"),
        (LOSS + IN_PLACE, "own.py, line 2: ValueError: of_logits: a leaf Variable that requires grad"),
        (f"{LOSS}    return model(**micro_batch.inputs).sum()\n", "micro_batch_loss in own.py returns (loss, losses)"),
        (
            f"{LOSS}    losses = model(**micro_batch.inputs)\n    return losses.sum().detach(), losses\n",
            "(loss, losses)",
        ),
        (f"{LOSS}    return 2 * (model(**micro_batch.inputs),)\n", "micro_batch_loss in own.py returns (loss, losses)"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused_before_a_weight_is_loaded(code, message, step_file, tmp_path):
    args = ["tiny", "--dataset", "sample:20", "--step-file", step_file(code), "--output-dir", tmp_path / "run"]
    outcome = run(args, "one", "kill_in_loading()", tmp_path / "log")
    assert outcome.codes == [2] and message in outcome.output and "Traceback" not in outcome.output, outcome.output


EVERYTHING = """
from loop.step import make_optimizers as plain_optimizers, part_weights

REFERENCE = "logits"

def three(logits, ids, *before):
    log_q = logits.log_softmax(-1)
    log_p = before[0].log_softmax(-1) if before else log_q.detach()
    return -log_q.mean(-1), -(log_q.exp() * log_q).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)

def make_optimizers(model, config):
    model.causal_lm.model.layers[0].requires_grad_(False)
    return plain_optimizers(model, config)

def micro_batch_loss(model, micro_batch, batch, config):
    losses, uniform, entropy, kl = model(**micro_batch.inputs, of_logits=three)
    if micro_batch.reference is not None:
        kl = losses - micro_batch.reference
    batch.log("kl", kl)
    batch.log("row", micro_batch.by_row(kl))
    if batch.step % 2:
        batch.log("odd", batch.step)
    each = (0.9 * losses + 0.1 * uniform + 0.1 * kl) * (0.1 + entropy.detach()) * part_weights(micro_batch, config)
    by_row = micro_batch.by_row(each)
    return (by_row / by_row.new_tensor(micro_batch.num_targets)).sum() / batch.num_rows, losses
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("more", "strategies"),
    [
        ([], ["one", "ddp2", "fsdp2"]),
        (["--lora-rank", 4], ["one", "fsdp2"]),
        (["--step-set", "REFERENCE=losses"], ["one", "ddp2"]),
    ],
    ids=["all", "lora", "losses"],
)
def test_all_of_it_at_once_is_the_same_under_every_launch_and_after_a_kill(more, strategies, step_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    args = ["tiny", "--dataset", rows, "--max-steps", 8, "--val-fraction", 0.3, "--eval-steps", 4, "--save-steps", 3]
    args += ["--logging-steps", 2, "--max-length", 192, "--num-samples", 0, "--learning-rate", 1e-3, "--resume", *more]
    args += ["--step-file", step_file(EVERYTHING), "--answer-weight", 2, "--early-stopping-patience", 0]
    args += ["--micro-batch-tokens", 0]  # a row each, so a rank short of rows has a micro-batch without targets
    curves = {}
    for strategy in strategies:
        own = [*args, "--gradient-accumulation-steps", 4 if strategy == "one" else 2, "--output-dir"]
        whole, cut = tmp_path / f"{strategy}-whole", tmp_path / f"{strategy}-cut"
        for out, fault in ((whole, ""), (cut, "kill_in_step(5)"), (cut, "")):
            outcome = run([*own, out], strategy, fault, tmp_path / "log")
            assert -9 in outcome.codes if fault else set(outcome.codes) == {0}, outcome.output
        assert "resumed from" in outcome.output
        for out in (whole, cut):
            (out / "samples.jsonl").touch()
        assert_same_end(cut, whole)
        curves[strategy] = metrics_of(whole)
    train = [row for row in curves["one"] if "train/loss" in row]
    assert [row["method/odd"] for row in train] == [1, 3, 5, 7]
    assert all(row["method/kl"] != 0 and row["method/row"] != row["method/kl"] for row in train[1:])
    for strategy in strategies[1:]:
        for ours, theirs in zip(curves[strategy], curves["one"], strict=True):
            for name in ours:
                if not name.startswith(("perf/", "memory/")):
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (strategy, name)
    weights = [weights_and_moments(newest(tmp_path / f"{s}-whole")) for s in ("one", strategies[-1])]
    assert not any("reference" in name for name in weights[0]["model"])
    assert not any(name.startswith("causal_lm.model.layers.0.") for name in weights[0]["optimizer"])
    for name, weight in weights[0]["model"].items():
        torch.testing.assert_close(weights[1]["model"][name], weight, rtol=0, atol=2e-5)
    run_json = json.loads((tmp_path / "one-whole/run.json").read_text())
    launch = run_json["launches"][-1]
    assert 0 < launch["num_trainable_parameters"] < launch["num_parameters"]
    assert "parameters; the others are frozen" in outcome.output
    assert f"{launch['num_trainable_parameters']:,}" in (tmp_path / "one-whole/report.md").read_text(encoding="utf-8")
    if "REFERENCE=losses" in more:
        kept = numpy.load(tmp_path / "one-whole/data/reference.npy")
        other = numpy.load(tmp_path / "ddp2-whole/data/reference.npy")
        assert kept.dtype == numpy.float32 and abs(kept - other).max() < 1e-5


def test_a_layer_is_frozen_and_trained_again_on_resume(step_file, tmp_path):
    args = ["tiny", "--dataset", "sample:20", "--max-steps", 6, "--num-samples", 0, "--save-steps", 1]
    args += ["--save-total-limit", 9, "--output-dir", tmp_path / "run", "--resume"]
    freezing = ["--step-file", step_file(METHODS["freezing"])]
    for more, fault in (([], "signal_in_step(1)"), (freezing, "signal_in_step(3)"), ([], "")):
        outcome = run([*args, *more], "one", fault, tmp_path / "log")
        assert outcome.codes == [0], outcome.output
    name = "causal_lm.model.layers.0.mlp.up_proj.weight"
    at = {n: weights_and_moments(tmp_path / f"run/checkpoints/step-{n:08}") for n in (1, 2, 3, 4, 6)}
    assert [name in at[n]["optimizer"] for n in at] == [True, True, False, False, True]
    weights = {n: at[n]["model"][name] for n in at}
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[4], weights[6])
    assert torch.equal(weights[2], weights[3]) and torch.equal(weights[3], weights[4])


def test_another_model_than_the_one_that_the_run_began_with_is_refused(small_folder, step_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small_folder, model)
    own = step_file(METHODS["divergence"])
    args = [
        "tiny",
        "--dataset",
        "sample:20",
        "--model",
        model,
        "--step-file",
        own,
        "--max-steps",
        4,
        "--num-samples",
        0,
    ]
    args += ["--save-steps", 1, "--output-dir", tmp_path / "run", "--resume"]
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/reference.json").write_text("{}")  # of a run that never began
    assert run(args, "one", "signal_in_step(1)", tmp_path / "log").codes == [0]
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused = run(args, log=tmp_path / "log")
    assert refused.codes == [2] and "not have the weights that this run began" in refused.output, refused.output
    shutil.rmtree(model)
    shutil.copytree(small_folder, model)
    assert run(args, log=tmp_path / "log").codes == [0]
