"""LoRA beside frozen weights in 4 bits: the arithmetic, what is exported, ranks and resume."""

import pytest
import torch
from conftest import peaks, settings
from ranks import run, uninterrupted
from runs import assert_same_end, metrics_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.batches import make_batch
from loop.step import train_step
from model.export import export
from model.lora import add_lora, merged
from model.nf4 import BLOCK, LEVELS, NF4Linear
from model.qwen3 import load_model

STRATEGIES = ["one", "ddp2", "fsdp2"]


@pytest.mark.parametrize("shape", [(128, 192), (64, 48), (3, 50)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_nearest_levels(shape, bias):
    """Against a plain loop over blocks; (3, 50) ends in the middle of one."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=bias)
    layer = NF4Linear(linear)
    weight, levels = layer.weight_in(torch.float32), torch.tensor(LEVELS)
    scales = (layer.scales.float() * layer.groups[:, None] + layer.middle).flatten()
    for number, block in enumerate(linear.weight.detach().flatten().split(BLOCK)):
        nearest = (block[:, None] / scales[number] - levels).abs().argmin(1)
        assert torch.equal(weight.flatten()[number * BLOCK :][: len(block)], levels[nearest] * scales[number])
        assert (scales[number] - block.abs().max()).abs() <= 0.51 * layer.groups.max()  # 8 bits of a scale

    x = torch.randn(5, shape[1], requires_grad=True)
    again, up = x.detach().clone().requires_grad_(), torch.randn(5, shape[0])
    (layer(x) * up).sum().backward()
    (torch.nn.functional.linear(again, weight, linear.bias) * up).sum().backward()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, linear.bias))
    assert torch.equal(x.grad, again.grad)


def test_4_bits_err_as_much_as_is_published():
    """NF4's relative error of a normal weight; that of bitsandbytes 0.50 is 0.0920, too."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(2048, 1024, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    layer = NF4Linear(linear)
    error = (layer.weight_in(torch.float32) - linear.weight).norm() / linear.weight.norm()
    assert 0.090 < error < 0.093
    large = [buffer.nbytes for name, buffer in layer.named_buffers() if name != "pairs"]
    assert 8 * sum(large) / linear.weight.numel() == pytest.approx(4.127, abs=0.002)


@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_updates_are_trained_and_kept_in_fp32(make_model, examples, accelerator, autocast):
    model = make_model()
    add_lora(model.causal_lm, 4, "tiny", "nf4")
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert not any("base_layer" in name and "bias" not in name for name in model.state_dict())
    optimizers = peaks([torch.optim.AdamW(trained.values(), lr=1e-2)])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        batch = make_batch(examples[:3], batch_size=3)
        losses = [train_step(model, optimizers, batch, accelerator, 1.0, settings()).think_loss_sum for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers())


def test_updates_are_merged_into_the_weights_as_they_were(make_model, examples, accelerator, tokenizer, tmp_path):
    """Base + update, rounded to bf16 once; those of 4 bits are in nothing that is written."""
    model, base = make_model(), make_model().causal_lm.bfloat16().float()
    model.causal_lm.load_state_dict(base.state_dict())
    add_lora(model.causal_lm, 4, "tiny", "nf4")
    optimizers = peaks([torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)])
    for _ in range(3):
        train_step(model, optimizers, make_batch(examples[:3], batch_size=3), accelerator, 1.0, settings())
    weights = model.causal_lm.state_dict()
    full = {}
    for name, weight in base.state_dict().items():
        layer, _, kind = name.rpartition(".")
        full[f"{layer}.base_layer.{kind}" if f"{layer}.lora_A.default.weight" in weights else name] = weight.clone()
    updates = {name: weight for name, weight in weights.items() if ".lora_" in name}
    expected = {name: weight.bfloat16() for name, weight in merged(full | updates, 2.0)}
    export(model.causal_lm, weights, tokenizer, tmp_path / "best", base=base)
    found = load_file(tmp_path / "best/model.safetensors")
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[name], load_model("tiny", tokenizer, False).state_dict()[name].bfloat16())


def test_what_a_step_file_thaws_is_exported_and_other_weights_are_noticed(make_model, tokenizer, tmp_path):
    """Norms, embeddings and biases that are trained beside the updates; a base that was replaced meanwhile."""
    model, base = make_model(), make_model().causal_lm
    add_lora(model.causal_lm, 4, "tiny", "nf4")
    weights = model.causal_lm.state_dict()
    names = [name for name in weights if "norm" in name or "embed" in name or "lm_head" in name]
    for name in names:
        weights[name] = weights[name] + 0.5
    export(model.causal_lm, weights, tokenizer, tmp_path / "best", base=base)
    found = load_file(tmp_path / "best/model.safetensors")
    assert found.keys() == base.state_dict().keys() - {"lm_head.weight"}  # tied
    assert all(torch.equal(found[name], weights[name].bfloat16()) for name in names if name in found)
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"have changed since the run began: model\.layers\.1\.mlp\.down_proj"):
        export(model.causal_lm, weights, tokenizer, tmp_path / "other", base=base)


@pytest.mark.parametrize("rows", [768, 6144])
def test_the_4_bits_do_not_depend_on_the_number_of_threads(rows):
    torch.manual_seed(0)
    linear, found = torch.nn.Linear(2048, rows, bias=False), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append({name: tensor.clone() for name, tensor in NF4Linear(linear).named_buffers()})
    torch.set_num_threads(1)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


@pytest.fixture(scope="module")
def command(small_folder):
    def arguments(strategy: str, model=small_folder) -> list:
        args = ["tiny", "--lora-rank", "4", "--frozen", "nf4", "--model", model, "--dataset", "sample:40",
                "--max-steps", "6", "--eval-steps", "3", "--save-steps", "1", "--logging-steps", "1",
                "--learning-rate", "1e-3", "--sample-max-new-tokens", "8"]  # fmt: skip
        return [*args, "--gradient-accumulation-steps", "4" if strategy == "one" else "2"]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return uninterrupted(lambda strategy, out: [*command(strategy), "--output-dir", out], tmp_path_factory)


@pytest.mark.integration
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_resumed_it_ends_with_the_same_bits_on_any_launch(strategy, command, whole, tmp_path):
    args = [*command(strategy), "--output-dir", tmp_path / "run", "--resume"]
    assert -9 in run(args, strategy, "kill_in_step(4)", tmp_path / "log").codes
    outcome = run(args, strategy, log=tmp_path / "log")
    assert set(outcome.codes) == {0}, outcome.output
    assert_same_end(tmp_path / "run", whole(strategy))
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(whole("one")), strict=True):
        for name in ours.keys() & {"train/loss", "eval/loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.integration
def test_a_resume_with_other_weights_and_a_run_without_lora_are_refused(command, small_folder, tmp_path):
    out = ["--output-dir", tmp_path / "run", "--num-samples", "0"]
    assert run([*command("one"), *out], fault="signal_in_step(4)", log=tmp_path / "log").codes == [0]
    other = tmp_path / "other"
    causal_lm = AutoModelForCausalLM.from_pretrained(small_folder)
    with torch.no_grad():
        causal_lm.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    causal_lm.save_pretrained(other)
    AutoTokenizer.from_pretrained(small_folder).save_pretrained(other)
    again = run([*command("one", other), *out, "--resume"], log=tmp_path / "log")
    assert again.codes == [2] and "does not have the weights" in again.output, again.output
    full = run(["tiny", "--frozen", "nf4", "--output-dir", tmp_path / "full"], log=tmp_path / "log")
    assert full.codes == [2] and "lora_rank" in full.output
    qwen3_5 = ["tiny", "--model", "tiny-qwen3.5", "--lora-rank", "4", "--frozen", "nf4", "--output-dir", tmp_path / "x"]
    refused = run(qwen3_5, log=tmp_path / "log")
    assert refused.codes == [2] and "4 bits" in refused.output
