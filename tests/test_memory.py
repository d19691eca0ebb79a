"""Memory profiles: what is predicted is what is there, and what does not fit is refused."""

import functools
import json

import pytest
import torch
from conftest import good_row, settings
from ranks import run
from runs import assert_same_end, metrics_of, newest, weights_and_moments
from transformers import AutoModelForCausalLM, Qwen3Config

import loop.start.resolve
from data.base.errors import UserError
from loop.config import Resolved
from loop.start.activations import KEPT, kept_in_layer
from loop.start.memory import GIB, PROFILES, choose, memory_table, plan_all, predict
from loop.start.trial import try_step
from loop.step import make_optimizers
from model.attention import PACKED

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(scope="module")
def qwen3():
    """Qwen3-1.7B without weights."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@functools.cache
def plans(qwen3, lengths=(2048, 1100, 800, 700), shards=1, names=tuple(PROFILES), **settings):
    return plan_all(Resolved(**settings), qwen3, list(lengths), CARD, shards, names)


def test_each_profile_fits_its_card_at_2048_tokens(qwen3):
    assert sum(p.numel() for p in qwen3.parameters()) == 1_720_574_976
    totals = {name: plan.total / GIB for name, plan in plans(qwen3).items()}
    assert totals["32g"] < 31 and totals["24g"] < 23 and totals["16g"] < 15
    assert totals["speed"] > totals["32g"] > totals["24g"] > totals["16g"]


def test_auto_is_the_fastest_that_computes_the_same_and_fits(qwen3, capsys):
    for gib, name in ((139, "speed"), (79, "speed"), (44, "speed"), (42, "32g"), (31, "32g")):
        assert choose(plans(qwen3), "auto", CARD, gib * GIB).name == name
    for gib, advice in ((23.5, "--memory 24g"), (15.5, "--memory 16g"), (7, "no profile fits")):
        with pytest.raises(UserError, match=advice):
            choose(plans(qwen3), "auto", CARD, gib * GIB)
    assert choose(plans(qwen3), "speed", CARD, 40 * GIB).name == "speed"  # asked for by name: a warning
    assert "--memory 32g needs" in capsys.readouterr().err
    table = memory_table(plans(qwen3), "32g", CARD, 31 * GIB)
    assert "32g:" in table and "moments in 8 bits" in table and "stochastically" in table
    assert choose(plans(qwen3, shards=8), "auto", CARD, 31 * GIB).name == "speed"
    with pytest.raises(UserError, match="one GPU or DDP"):
        choose(plans(qwen3, shards=8), "24g", CARD, 31 * GIB)


def test_settings_take_the_place_of_the_profiles(qwen3):
    plan = plans(qwen3, names=("32g",), gradient_checkpointing="off", micro_batch_tokens=3000)["32g"]
    assert not plan.profile.gradient_checkpointing and plan.profile.micro_batch_tokens == 3000
    by_tokens = [
        plans(qwen3, names=("speed",), micro_batch_tokens=n)["speed"].total for n in (0, 2048, 3000, 10_000, 99_999)
    ]
    assert by_tokens[0] == by_tokens[1] < by_tokens[2] and by_tokens[3] == by_tokens[4]
    # With several micro-batches gradients are there when a backward begins.
    several, one = (plans(qwen3, names=("speed",), micro_batch_tokens=n)["speed"].needs for n in (4647, 4648))
    assert "gradients" in several and "gradients" not in one
    # Compiled layers keep less, and 40 GiB are then enough.
    assert choose(plans(qwen3, names=("speed", "32g"), compile="on"), "auto", CARD, 39.5 * GIB).name == "speed"


def test_auto_compiles_where_it_can_and_pays(monkeypatch):
    def compiled(tokens=3_000_000, device=CARD, compilers=("cc", "g++"), vocabulary=151936, **changes):
        monkeypatch.setattr(loop.start.resolve, "which", lambda name: name if name in compilers else None)
        return loop.start.resolve.what_to_compile(Resolved(**changes), device, tokens, vocabulary)

    monkeypatch.setattr(loop.start.resolve, "compiles", lambda: True)
    assert compiled() == "on" and compiled(device=CPU) == "loss"
    assert compiled(tokens=100_000) == "off" and compiled(tokens=100_000, device=CPU, vocabulary=2048) == "off"
    for device in (CARD, CPU):
        assert compiled(device=device, mixed_precision="no") == compiled(device=device, compilers=()) == "off"
        assert compiled(device=device, compile="off") == "off" and compiled(device=device, compile="on") == "on"
        with pytest.raises(UserError, match="compiler; install"):
            compiled(device=device, compile="on", compilers=())
    monkeypatch.setattr(loop.start.resolve, "compiles", lambda: False)  # a compiler without headers, say
    assert compiled(device=CPU) == "off"
    assert compiled(device=CPU, dry_run=True) == "loss"  # which compiles nothing


# In fp32 what autograd keeps can be counted; under autocast temporaries of the CPU kernels come and go.
@pytest.mark.parametrize(
    ("autocast", "dtype", "tolerance"),
    [(False, torch.float32, 0.02), (True, torch.float32, 0.1), (True, torch.bfloat16, 0.1)],
)
def test_activations_are_as_many_as_autograd_keeps(autocast, dtype, tolerance):
    sizes = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=768)
    config = Qwen3Config(vocab_size=64, num_hidden_layers=1, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(length: int) -> int:
        storages, alive = {}, []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        hidden = torch.randn(1, length, 256, dtype=dtype, requires_grad=True)
        positions = model.model.rotary_emb(hidden, torch.arange(length)[None])
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            model.model.layers[0](
                hidden * 1, position_embeddings=positions, attention_mask=None,
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length,
            )  # fmt: skip
        return sum(storages.values())

    predicted = 1000 * kept_in_layer(config, model.model.layers[0], KEPT[dtype.itemsize, 2 if autocast else 4, False])
    assert (kept(1200) - kept(200)) == pytest.approx(predicted, rel=tolerance)


def test_8_bit_moments_take_the_bytes_that_are_predicted():
    pytest.importorskip("torchao")
    config = Qwen3Config(vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=32, intermediate_size=128)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = make_optimizers(model, settings(optim="adamw_8bit"))[0]
    states = [optimizer._new_buffer(p, signed) for p in model.parameters() for signed in (True, False)]
    size = sum(
        sum(part.nbytes for part in (state.codes, state.scale)) if hasattr(state, "codes") else state.nbytes
        for state in states
    )
    trial = try_step(model, Resolved(optim="adamw_8bit"), torch.float32)
    predicted = predict(PROFILES["24g"], Resolved(), model, 100, False, CPU, trial)["optimizer states"]
    assert size == pytest.approx(predicted, rel=0.02)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(good_row(i)) + "\n" for i in range(16)), encoding="utf-8")
    return ["tiny", "--dataset", rows, "--max-steps", "6", "--eval-steps", "3", "--save-steps", "3",
            "--logging-steps", "1", "--max-length", "192", "--val-fraction", "0.3",
            "--sample-max-new-tokens", "8"]  # fmt: skip


def test_what_does_not_fit_is_refused_before_a_weight_is_loaded(command, tmp_path):
    args = [*command, "--output-dir", tmp_path / "run"]
    outcome = run(args, "one", "(card_of(0.5), kill_in_loading())", tmp_path / "log")
    assert outcome.codes == [2] and "Traceback" not in outcome.output, outcome.output
    assert "cpu has 0.5 GiB" in outcome.output and "no profile fits" in outcome.output
    outcome = run([*args, "--dry-run"], "one", "card_of(0.5)", tmp_path / "log")
    assert outcome.codes == [0] and "no profile fits" in outcome.output and "--memory 16g" in outcome.output
    outcome = run([*args, "--dry-run"], log=tmp_path / "log")
    assert outcome.codes == [0] and "speed:" in outcome.output and "optimizer states" in outcome.output


@pytest.fixture(scope="module")
def exact(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "run"
    assert run([*command, "--output-dir", out], log=out.parent / "log").codes == [0]
    return out


@pytest.mark.parametrize("memory", ["24g", "16g"])
def test_small_cards_learn_the_same_and_resume_to_the_bit(command, exact, memory, tmp_path):
    pytest.importorskip("torchao")
    outcome = run([*command, "--memory", memory, "--output-dir", tmp_path / "whole"], log=tmp_path / "log")
    assert outcome.codes == [0], outcome.output
    start, end = metrics_of(exact)[0]["eval/loss"], metrics_of(exact)[-2]["eval/loss"]
    assert start - end > 0.3
    assert abs(metrics_of(tmp_path / "whole")[-2]["eval/loss"] - end) < 0.1 * (start - end)
    args = [*command, "--memory", memory, "--output-dir", tmp_path / "run", "--resume"]
    assert run(args, "one", "kill_in_step(4)", tmp_path / "log").codes == [-9]
    outcome = run(args, log=tmp_path / "log")
    assert outcome.codes == [0] and "resumed from" in outcome.output, outcome.output
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    dtype = torch.bfloat16 if memory == "16g" else torch.float32
    assert weights_and_moments(newest(tmp_path / "run"))["model"]["causal_lm.model.norm.weight"].dtype == dtype
    refusal = run([*args, "--memory", "32g"], log=tmp_path / "log")
    assert refusal.codes == [2] and ("weights: " if memory == "16g" else "other optimizers") in refusal.output


def test_fsdp2_keeps_no_whole_gradient_between_micro_batches(command, tmp_path):
    args = [*command, "--memory", "speed", "--micro-batch-tokens", "0", "--num-samples", "0"]
    args += ["--output-dir", tmp_path / "run"]
    outcome = run(args, "fsdp2", "gradients_are_shared_out()", tmp_path / "log")
    assert outcome.codes == [0, 0], outcome.output
