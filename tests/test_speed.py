"""What makes a step fast computes what the plain step computes."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import settings
from runs import assert_same, weights_and_moments
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from data.batches import pack, rank_batches, share_out
from loop.distributed import prepare
from loop.record.checkpoint_writer import CheckpointWriter
from loop.state import TrainState
from loop.step import make_optimizers
from model.attention import PACKED
from model.head import HeadLoss

# --- the cut of a step --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_get_all_rows_once_and_near_equal_tokens(examples, ranks):
    for start in range(0, 96, 12):
        rows = examples[start : start + 12]
        shares = share_out(rows, ranks)
        assert sorted(row.location for share in shares for row in share) == sorted(row.location for row in rows)
        assert {len(share) for share in shares} == {12 // ranks}
        tokens = [sum(map(len, share)) for share in shares]
        assert max(tokens) - min(tokens) <= max(map(len, rows)) / 2


@pytest.mark.parametrize("budget", [1, 300, 700, 100_000])
def test_micro_batches_are_as_few_as_their_tokens_allow(examples, budget):
    rows = examples[:12]
    batches = pack(rows, 1, budget)
    assert sorted(row.location for batch in batches for row in batch) == sorted(row.location for row in rows)
    assert all(sum(map(len, batch)) <= budget or len(batch) == 1 for batch in batches)
    for one, other in itertools.pairwise(batches):  # no two could be one
        assert sum(map(len, one)) + sum(map(len, other)) > budget
    assert [len(batch) for batch in pack(rows, 5, 0)] == [5, 5, 2]


def test_every_rank_makes_as_many_micro_batches_as_the_others(examples):
    shares = [
        rank_batches(examples[:7], batch_size=1, micro_batch_tokens=400, rank=rank, world_size=3) for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    targets = sum(len(batch.is_think) for share in shares for batch in share)
    assert targets == sum(len(row) - row.prompt_length for row in examples[:7])


# --- the head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
@pytest.mark.parametrize(("chunk", "compiled"), [(1000, False), (300, True), (300, False), (299, True), (7, False)])
def test_the_head_in_chunks_is_cross_entropy(dtype, tolerance, chunk, compiled):
    """300 targets: in one chunk whose logits are kept, and in chunks made again; each target with its own weight."""
    torch.manual_seed(1)
    hidden = torch.randn(300, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    ids, scales = torch.randint(0, 50, (300,)), torch.rand(300, dtype=dtype)
    expected = F.cross_entropy(hidden @ weight.T, ids, reduction="none")
    wanted = torch.autograd.grad((expected * scales).sum(), (hidden, weight))
    losses, _ = HeadLoss.apply(hidden, weight, ids, chunk, compiled, True, False)
    assert (losses - expected).abs().max() <= tolerance * expected.max()
    for keep in (True, False):  # a second backward is as good as the first
        found = torch.autograd.grad((losses * scales).sum(), (hidden, weight), retain_graph=keep)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_chunks_change_neither_loss_nor_gradients(make_model, examples):
    (batch,) = rank_batches(examples[:4], batch_size=4)
    results = []
    for chunk in (10**6, 100, 33):
        model = make_model(loss_chunk=chunk)
        loss = model(**batch.inputs)
        results.append((loss, torch.autograd.grad(loss.sum(), list(model.parameters()))))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        assert_gradients_close(gradients, results[0][1])


def assert_gradients_close(ours, theirs, tolerance=1e-5) -> None:
    scale = max(gradient.abs().max() for gradient in theirs)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) <= tolerance * scale


# --- compiled layers ----------------------------------------------------------------------------------


def masked_attention(module, query, key, value, attention_mask, *, scaling, cu_seqlens, **_):
    """All rows at once under a mask; one operator to the compiler, as the varlen kernel is on CUDA."""
    row = torch.bucketize(torch.arange(query.shape[2]), cu_seqlens, right=True)
    mask = (row[:, None] == row[None, :]).tril()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize(
    ("attention", "checkpointing"), [("row by row", False), ("one operator", False), ("one operator", True)]
)
def test_compiled_layers_compute_the_same(make_model, examples, attention, checkpointing, monkeypatch):
    """In one graph for all lengths, where attention is one operator."""
    torch._dynamo.reset()
    counters.clear()
    if attention == "one operator":
        monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, masked_attention)
    plain, compiled = make_model(checkpointing), make_model(checkpointing, compile=True)
    if attention == "one operator":  # the same graphs, without a minute of a C++ compiler
        for layer in compiled.causal_lm.model.layers:
            layer.compile(dynamic=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    # Below 1,024 tokens: beyond that inductor makes other code for sums on a CPU, and so a second graph.
    for rows in ([0], [1, 2], [3, 4, 5], [6]):
        (batch,) = rank_batches([examples[row] for row in rows], batch_size=9)
        ours, theirs = compiled(**batch.inputs), plain(**batch.inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        gradients = [torch.autograd.grad(loss.sum(), list(m.parameters()))
                     for loss, m in ((ours, compiled), (theirs, plain))]  # fmt: skip
        assert_gradients_close(*gradients)
    if attention == "one operator":
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# --- checkpoints behind the training ------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(make_model, examples, tmp_path, monkeypatch):
    """The write is held back; the training goes on meanwhile, and the next save waits for it."""
    import loop.record.checkpoint_writer

    accelerator = Accelerator()
    model = make_model()
    model, optimizers = prepare(accelerator, model, make_optimizers(model, settings(learning_rate=1e-2)))
    optimizer = optimizers[0]
    batches = rank_batches(examples[:2], batch_size=2)

    def update() -> None:
        model(**batches[0].inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {names[p]: {key: value.clone() for key, value in kept.items()} for p, kept in optimizer.state.items()}
    release, write = threading.Event(), loop.record.checkpoint_writer.write_checkpoint
    monkeypatch.setattr(loop.record.checkpoint_writer, "write_checkpoint", lambda *args: (release.wait(), write(*args)))
    with CheckpointWriter(tmp_path / "checkpoints", 2, torch.device("cpu")) as writer:
        state = TrainState("id", step=1)
        writer.save(model, optimizers, state)
        assert not (tmp_path / "checkpoints").exists()
        update()
        state.step = 2
        asked = threading.Thread(target=writer.save, args=(model, optimizers, state))
        asked.start()
        asked.join(0.3)
        assert asked.is_alive()  # for the first is not written yet
        release.set()
        asked.join()
        writer.wait(is_last=True)
    first, second = (weights_and_moments(tmp_path / f"checkpoints/step-0000000{step}") for step in (1, 2))
    for name, weight in before.items():
        assert torch.equal(first["model"][name], weight)
    assert_same(first["optimizer"], moments)
    name = "causal_lm.model.norm.weight"
    assert torch.equal(second["model"][name], model.state_dict()[name]) and not torch.equal(
        second["model"][name], first["model"][name]
    )
