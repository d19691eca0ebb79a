"""LoRA through the same loop: what is trained, what is written, what it costs."""

import json

import pytest
import torch
from conftest import peaks, settings
from ranks import run
from runs import assert_same_end, curve, files_of, metrics_of
from safetensors.torch import load_file

from data.batches import make_batch
from loop.config import Resolved
from loop.start.memory import PROFILES, predict
from loop.start.trial import try_step
from loop.step import train_step
from model.export import export
from model.lora import add_lora, merged
from model.qwen3 import load_model, meta_model

LORA = ["tiny", "--lora-rank", "4", "--max-steps", "8", "--eval-steps", "4", "--sample-max-new-tokens", "8"]


@pytest.fixture
def trained(make_model, examples, accelerator):
    """(model, its base's weights) after some steps that moved every update."""
    model = make_model()
    base = {name: weight.clone() for name, weight in model.causal_lm.state_dict().items()}
    add_lora(model.causal_lm, 4, "tiny")
    optimizers = peaks([torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)])
    for _ in range(4):
        train_step(model, optimizers, make_batch(examples[:3], batch_size=3), accelerator, 1.0, settings())
    return model, base


def test_only_the_updates_are_trained(trained):
    model, base = trained
    now = model.causal_lm.state_dict()
    frozen = {name.replace(".base_layer", ""): w for name, w in now.items() if ".lora_" not in name}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    assert {name for name, p in model.causal_lm.named_parameters() if p.requires_grad} == {
        f"model.layers.{layer}.{part}.lora_{ab}.default.weight"
        for layer in range(model.causal_lm.config.num_hidden_layers)
        for ab in "AB"
        for part in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    }


def test_merging_is_pefts_own(trained, tmp_path, tokenizer, examples):
    """The merged weights are those of peft's merge_and_unload, and the adapter alone gives the same logits."""
    from peft import PeftModel

    model, base = trained
    weights = model.causal_lm.state_dict()
    ours = dict(merged(weights, 2.0))
    export(model.causal_lm, weights, tokenizer, tmp_path / "best")
    plain = load_model("tiny", tokenizer, gradient_checkpointing=False)
    plain.load_state_dict(base)
    plain.set_attn_implementation("sdpa")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "best/adapter").eval()
    ids = examples[0].input_ids[None]
    with torch.no_grad():
        logits = adapted(ids).logits
        whole = adapted.merge_and_unload()
        assert ours.keys() == whole.state_dict().keys() == base.keys()
        for name, weight in whole.state_dict().items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(whole(ids).logits, logits, rtol=1e-4, atol=1e-4)
    exported = load_file(tmp_path / "best/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], ours[name].bfloat16()) and not torch.equal(exported[name], base[name].bfloat16())


def test_a_resumed_lora_run_ends_alike_on_one_process_and_on_shards(tmp_path):
    for strategy in ("one", "fsdp2"):
        args = [*LORA, "--gradient-accumulation-steps", "4" if strategy == "one" else "2", "--output-dir"]
        assert set(run([*args, tmp_path / strategy], strategy, log=tmp_path / "log").codes) == {0}
        again = [*args, tmp_path / f"{strategy}-resumed"]
        assert set(run(again, strategy, "signal_in_step(5)", tmp_path / "log").codes) == {0}
        assert set(run([*again, "--resume"], strategy, log=tmp_path / "log").codes) == {0}
        assert_same_end(tmp_path / f"{strategy}-resumed", tmp_path / strategy)
    for ours, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "fsdp2"), strict=True):
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5) for name in ours)
    evaluations = [row["eval/loss"] for row in metrics_of(tmp_path / "one") if "eval/loss" in row]
    assert evaluations[-1] < evaluations[0]
    best = files_of(tmp_path / "one/best")
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= best.keys()
    assert json.loads(best["adapter/adapter_config.json"])["r"] == 4 and "LoRA" in best["README.md"].decode()


def test_the_rank_is_part_of_what_the_run_is(tmp_path):
    args = [*LORA, "--max-steps", "1", "--num-samples", "0", "--output-dir", tmp_path / "run"]
    assert run(args, log=tmp_path / "log").codes == [0]
    refusal = run([*args, "--lora-rank", "8", "--resume"], log=tmp_path / "log")
    assert refusal.codes == [2] and "lora_rank: 4 -> 8" in refusal.output


def test_memory_is_predicted_for_what_is_trained(tokenizer):
    """Gradients and moments of the updates alone; nothing for the gradient of the head."""
    plain, lora = meta_model("tiny", tokenizer), meta_model("tiny", tokenizer)
    add_lora(lora, 4, "tiny")
    device = torch.device("cuda")
    trials = [try_step(m, Resolved(), torch.float32) for m in (plain, lora)]
    needs = [
        predict(PROFILES["speed"], Resolved(), m, 100, True, device, trial)
        for m, trial in zip((plain, lora), trials, strict=True)
    ]
    num_trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert needs[1]["gradients"] == 4 * num_trained
    assert needs[1]["optimizer states"] == pytest.approx(8 * num_trained, rel=0.02)  # and step counts
    assert needs[1]["weights"] == needs[0]["weights"] + 4 * num_trained
    head = "the head's gradient, and its copy in bf16"
    assert needs[0][head] - needs[1][head] == 4 * lora.lm_head.weight.numel()
