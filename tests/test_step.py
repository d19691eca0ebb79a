"""The step is exact: against plain PyTorch, against the Hugging Face Trainer, however it is cut."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import peaks, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batches import collate, make_batch, rank_batches, step_batch
from data.encode import encode_rows
from loop.distributed import prepare
from loop.evaluate import losses
from loop.score import score
from loop.step import lr_multiplier, make_optimizers, train_step


class KeepGradients(torch.optim.Optimizer):
    """Updates nothing and remembers the gradients it was given."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})

    def step(self):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.fixture(scope="module")
def short(examples):
    """The 60 shortest rows, in the order of the data."""
    longest = sorted(map(len, examples))[59]
    return [example for example in examples if len(example) <= longest]


def gradients_of(model, examples, batch_size, max_grad_norm=0):
    accelerator = Accelerator()
    optimizer = KeepGradients(model.parameters())
    batch = make_batch(examples, batch_size=batch_size)
    metrics = train_step(model, peaks([optimizer]), batch, accelerator, 1.0, settings(max_grad_norm=max_grad_norm))
    return optimizer.gradients, metrics


def plain_gradients(model, examples):
    """One full-batch backward over padded rows with transformers' own attention, written apart from the loop."""
    causal_lm = model.causal_lm
    causal_lm.set_attn_implementation("sdpa")
    length = max(len(example) for example in examples)
    ids = torch.stack([F.pad(example.input_ids, (0, length - len(example))) for example in examples])
    mask = torch.stack([torch.arange(length) < len(example) for example in examples]).long()
    labels = ids.clone()
    for row, example in enumerate(examples):
        labels[row, : example.prompt_length] = -100
        labels[row, len(example) :] = -100
    logits = causal_lm(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], loss.item()


# In fp64 what is left is transformers' RMSNorm, which computes in fp32 whatever it is given.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-7)])
def test_gradient_is_that_of_a_plain_full_batch(make_model, short, dtype, tolerance):
    rows = short[:4]
    assert len({len(example) - example.prompt_length for example in rows}) > 1  # unequal, or means would do
    expected, loss = plain_gradients(make_model(dtype=dtype), rows)
    scale = max(gradient.abs().max() for gradient in expected)
    for batch_size in (1, 2, 3, 4):
        for checkpointing in (False, True):
            gradients, metrics = gradients_of(make_model(checkpointing, dtype), rows, batch_size)
            for gradient, reference in zip(gradients, expected, strict=True):
                assert (gradient - reference).abs().max() / scale <= tolerance
            num_tokens = metrics.num_think_tokens + metrics.num_answer_tokens
            assert num_tokens == sum(len(example) - example.prompt_length for example in rows)
            assert (metrics.think_loss_sum + metrics.answer_loss_sum) / num_tokens == pytest.approx(loss, rel=tolerance)


def test_a_rank_without_rows_adds_nothing(make_model, short):
    """Three rows on two ranks: the second rank's last micro-batch is empty; together they are the whole gradient."""
    shares = [rank_batches(short[:3], batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    expected, _ = gradients_of(make_model(dtype=torch.float64), short[:3], 1)
    optimizer = KeepGradients((model := make_model(dtype=torch.float64)).parameters())
    batch = make_batch(short[:3], batch_size=1)._replace(micro_batches=shares[0] + shares[1])
    train_step(model, peaks([optimizer]), batch, Accelerator(), 1.0, settings(max_grad_norm=0))
    for gradient, reference in zip(optimizer.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-14)


def test_clipping_sees_the_whole_gradient(make_model, short):
    free, metrics = gradients_of(make_model(), short[:4], 1)
    norm = torch.stack([gradient.double().norm() for gradient in free]).norm().item()
    assert metrics.grad_norm == pytest.approx(norm, rel=2e-5)
    clipped, _ = gradients_of(make_model(), short[:4], 1, max_grad_norm=norm / 4)
    for gradient, reference in zip(clipped, free, strict=True):
        torch.testing.assert_close(gradient, reference / 4, rtol=1e-4, atol=1e-9)


def test_non_finite_gradients_reach_neither_weights_nor_moments(make_model, short):
    model, accelerator = make_model(), Accelerator()
    (optimizer,) = optimizers = peaks(make_optimizers(model, settings()))
    batch = make_batch(short[:4], batch_size=1)
    assert train_step(model, optimizers, batch, accelerator, 1.0, settings()).finite
    before = [p.clone() for p in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    for bad in (math.nan, math.inf):
        handle = model.causal_lm.model.norm.weight.register_hook(lambda gradient, bad=bad: gradient * bad)
        metrics = train_step(model, optimizers, batch, accelerator, 1.0, settings())
        handle.remove()
        assert not metrics.finite
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        after = [value for state in optimizer.state.values() for value in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert train_step(model, optimizers, batch, accelerator, 1.0, settings()).finite


def test_ten_steps_have_the_losses_of_the_hugging_face_trainer(make_model, short, tmp_path):
    from transformers import Trainer, TrainingArguments

    config = settings(learning_rate=3e-3, lr_scheduler_type="linear", weight_decay=0.1)
    rows = [short[i] for s in range(10) for i in order_of_step(short, s)]

    ours, model, accelerator = [], make_model(), Accelerator()
    optimizers = peaks(make_optimizers(model, config))
    for step in range(10):
        batch = step_batch(step, short, batch_size=1, rows_per_step=4, seed=3)
        metrics = train_step(model, optimizers, batch, accelerator, lr_multiplier(step, 10, config), config)
        num_tokens = metrics.num_think_tokens + metrics.num_answer_tokens
        ours.append((metrics.think_loss_sum + metrics.answer_loss_sum) / num_tokens)

    causal_lm = make_model().causal_lm
    causal_lm.set_attn_implementation("sdpa")
    trainer = Trainer(
        model=causal_lm,
        train_dataset=[
            {
                "input_ids": row.input_ids,
                "labels": torch.where(torch.arange(len(row)) < row.prompt_length, -100, row.input_ids),
            }
            for row in rows
        ],
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=10,
            logging_steps=1,
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            weight_decay=0.1,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = "AdamW is compared here: with another method in loop/step.py this test fails"
    assert len(theirs) == 10 and ours[0] - ours[-1] > 0.4, expected
    assert ours == pytest.approx(theirs, abs=1e-4), expected


def order_of_step(examples, step):
    from data.batches import step_indices

    return step_indices(step, num_examples=len(examples), rows_per_step=4, seed=3)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("linear", "linear"), ("cosine", "cosine"), ("constant_with_warmup", "constant")]
)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_learning_rates_are_those_of_transformers(theirs, ours, warmup_steps):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=20)
    for step in range(20):
        config = settings(lr_scheduler_type=ours, warmup_ratio=warmup_steps / 20)
        assert 2e-4 * lr_multiplier(step, 20, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_rows_packed_together_are_blind_to_each_other(make_model, examples):
    """Loss of each row and all gradients, packed and apart, to the bit of fp64 rounding."""
    model, rows = make_model(dtype=torch.float64), examples[:3]

    def sums(rows) -> torch.Tensor:
        micro_batch = collate(rows)
        losses, is_think = model(**micro_batch.inputs), micro_batch.is_think
        return torch.stack([losses[is_think].sum(), losses[~is_think].sum()])

    losses = torch.stack([sums([row]) for row in rows])
    together = sums(rows)
    torch.testing.assert_close(together, losses.sum(dim=0), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(losses.sum(), list(model.parameters()))
    found = torch.autograd.grad(together.sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    # Another first row changes nothing for the rows behind it.
    behind = sums([examples[7], *rows[1:]]) - sums([examples[7]])
    torch.testing.assert_close(behind, losses[1] + losses[2], rtol=1e-12, atol=0)


def test_evaluation_does_not_depend_on_its_batch_size(make_model, split, tokenizer):
    examples, _ = encode_rows(split.val, tokenizer, 512, "error")
    model, rows = make_model(dtype=torch.float64).train(), sorted(examples, key=len)[:7]
    results = [losses(score(model, rows, Accelerator(), batch_size=size)) for size in (1, 3, 7, -1)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-12)
    _, loss = plain_gradients(make_model(dtype=torch.float64), rows)
    assert results[0]["loss"] == pytest.approx(loss, rel=1e-12)
    assert results[0]["perplexity"] == pytest.approx(math.exp(loss))
    assert model.training


def test_norms_do_not_decay_and_matrices_do(make_model):
    model = make_model()
    decay = {p: group["weight_decay"] for o in make_optimizers(model, settings(weight_decay=0.1)) for group in
             o.param_groups for p in group["params"]}  # fmt: skip
    assert decay == {p: 0.0 if "norm" in name else 0.1 for name, p in model.named_parameters()}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_no_fp64_on_the_device(make_model, short, mixed_precision):
    """Apple's MPS has no fp64, nor have Ascend's collectives."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found.extend(str(function) for t in tree_leaves(out) if getattr(t, "dtype", None) == torch.float64)
            return out

    AcceleratorState._reset_state()
    accelerator, model = Accelerator(mixed_precision=mixed_precision), make_model()
    model, optimizers = prepare(accelerator, model, make_optimizers(model, settings()))
    batch = make_batch(short[:4], batch_size=2)
    with Watch():
        train_step(model, optimizers, batch, accelerator, 1.0, settings())
        score(model, short[:4], accelerator)
        assert not found, found
        torch.ones(1, dtype=torch.float64)
    assert found
    AcceleratorState._reset_state()
