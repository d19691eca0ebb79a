"""Each recipe does what it is for with every memory profile, in fp32 and in bf16, or refuses the profile by name."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, peaks, settings

from data.base.errors import UserError
from data.batches import make_batch
from loop.reference import copy_of
from loop.start.checks import check_optimizers
from loop.start.memory import PROFILES
from loop.start.step_file import load_step_file
from loop.step import forward_backward as plain_gradient
from loop.step import train_step as plain_step
from model.lora import add_lora

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
IN_FP32 = ("l2sp", "muon", "sam", "schedule_free")  # bf16 weights would round away what they do


class Case:
    """A recipe with a profile, on the small model, and a step's batch."""

    def __init__(self, recipe: str, memory: str, make_model, examples, accelerator):
        profile = PROFILES[memory]
        pytest.importorskip("torchao") if profile.optim == "adamw_8bit" else None
        self.method = load_step_file(str(ROOT / f"recipes/{recipe}.py"))
        self.config = settings(memory=memory, optim=profile.optim, weights=str(profile.weights)[6:])
        self.dtype, self.accelerator = profile.weights, accelerator
        self.make_model = lambda: make_model(profile.gradient_checkpointing, profile.weights, loss_chunk=40)
        self.model, self.rows, self.units = self.make_model(), examples[:3], 0
        self.before = [p.detach().clone() for p in self.model.parameters()]

    @property
    def batch(self):
        return make_batch(self.rows, self.units, batch_size=3, seed=7)

    def optimizers(self):
        return peaks(self.method.make_optimizers(self.model, self.config))

    def step(self, optimizers, model=None, method=None):
        step = method or self.method.train_step
        metrics = step(model or self.model, optimizers, self.batch, self.accelerator, 1.0, self.config)
        assert metrics.finite
        return metrics

    def gradients(self, optimizer_type=torch.optim.SGD):
        """What an optimizer is given by the recipe's step."""
        found = []

        class Keep(optimizer_type):
            def step(self, closure=None):
                found.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

        self.step(peaks([Keep(self.model.parameters(), lr=0.0)]))
        return found


def has_gradient(case: Case, loss_of_targets) -> None:
    """The gradient is that of loss_of_targets(losses, logits, ids, micro_batch), over all logits in fp32."""
    (micro_batch,), model = case.batch.micro_batches, case.model
    inputs = {**micro_batch.inputs}
    places, ids = inputs.pop("target_positions"), inputs.pop("target_ids")
    hidden = model.causal_lm.model(**inputs, use_cache=False).last_hidden_state[0][places]
    logits = (hidden @ model.causal_lm.lm_head.weight.T).float()
    losses = F.cross_entropy(logits, ids, reduction="none")
    wanted = torch.autograd.grad(loss_of_targets(losses, logits, ids, micro_batch).mean(), list(model.parameters()))
    case.config = dataclasses.replace(case.config, max_grad_norm=0.0)
    tolerance = 1e-5 if case.dtype == torch.float32 else 0.05
    scale = max(one.abs().max() for one in wanted)
    for ours, theirs in zip(case.gradients(), wanted, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * scale


def label_smoothing(case: Case) -> None:
    has_gradient(
        case, lambda losses, logits, ids, _: F.cross_entropy(logits, ids, reduction="none", label_smoothing=0.1)
    )


def dft(case: Case) -> None:
    has_gradient(
        case, lambda losses, logits, ids, _: losses * logits.softmax(-1).gather(1, ids[:, None])[:, 0].detach()
    )


def eaft(case: Case) -> None:
    def of(losses, logits, ids, _):
        top = logits.detach().sort(-1).values[:, -20:].softmax(-1)
        return losses * torch.distributions.Categorical(top).entropy() / math.log(20)

    has_gradient(case, of)


def kl(case: Case) -> None:
    case.model.reference = (copy_of(case.model.causal_lm, dataclasses.replace(case.config, mixed_precision="no")),)
    other = case.make_model()
    with torch.no_grad():
        for p in case.model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype)

    def of(losses, logits, ids, micro_batch):
        inputs = {name: value for name, value in micro_batch.inputs.items() if not name.startswith("target")}
        with torch.no_grad():
            hidden = other.causal_lm.model(**inputs, use_cache=False).last_hidden_state[0]
            old = other.causal_lm.lm_head(hidden[micro_batch.inputs["target_positions"]]).float()
        divergence = F.kl_div(logits.log_softmax(-1), old.softmax(-1), reduction="none").sum(-1)
        assert divergence.min() > 0.01
        return losses + 0.1 * divergence

    has_gradient(case, of)


def rho(case: Case) -> None:
    numbers = torch.Generator().manual_seed(3)
    case.rows = [
        dataclasses.replace(row, reference=7 + torch.randn(row.num_targets, generator=numbers)) for row in case.rows
    ]

    def of(losses, logits, ids, micro_batch):
        chosen, start = torch.zeros(len(ids)), 0
        for row in case.rows:
            excess = losses[start : start + row.num_targets].detach() - row.reference
            most = excess.argsort(descending=True)[: math.ceil(0.6 * row.num_targets)]
            chosen[start + most] = 1
            start += row.num_targets
        assert 0.55 < chosen.mean() < 0.7
        return losses * chosen

    has_gradient(case, of)


def freeze(case: Case) -> None:
    optimizers = case.optimizers()
    for _ in range(2):
        case.step(optimizers)
    held = {p for optimizer in optimizers for p in optimizer.state}
    kept = 0
    for (name, p), before in zip(case.model.named_parameters(), case.before, strict=True):
        is_frozen = "embed_tokens" in name or "layers.0." in name
        kept += is_frozen
        assert torch.equal(p, before) == is_frozen and (p in held) != is_frozen, name
    assert kept > 1


def layerwise_lr(case: Case) -> None:
    names, top = {p: name for name, p in case.model.named_parameters()}, len(case.model.causal_lm.model.layers) + 1
    optimizers = case.optimizers()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for name in (names[p] for p in group["params"]):
            depth = int(name.split("layers.")[1][0]) + 1 if "layers." in name else 0 if "embed" in name else top
            assert group["lr"] == pytest.approx(1e-3 * 0.9 ** (top - depth)), name
    case.step(optimizers)
    assert not any(torch.equal(p, old) for p, old in zip(names, case.before, strict=True))


def noise(case: Case) -> None:
    """Its norm is a tenth of the clipped gradient's, whatever the size of the model."""
    case.config = dataclasses.replace(case.config, max_grad_norm=0.5)
    noisy = case.gradients()
    case.method = load_step_file("loop/step.py")
    plain = case.gradients()
    difference = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(noisy, plain, strict=True)]).norm()
    assert difference == pytest.approx(0.05, rel=0.05)


def ema(case: Case) -> None:
    optimizers, averages = case.optimizers(), None
    for n in range(1, 4):
        case.step(optimizers)
        now, decay = [p.detach().double() for p in case.model.parameters()], (1 + n) / (10 + n)
        averages = averages or [p.clone() for p in now]
        averages = [decay * old + (1 - decay) * new for old, new in zip(averages, now, strict=True)]
    for state, average in zip((optimizers[0].state[p] for p in case.model.parameters()), averages, strict=True):
        assert state["average"].dtype == torch.float32
        torch.testing.assert_close(state["average"].double(), average, rtol=1e-6, atol=1e-7)
    with case.method.evaluated_weights(case.model, optimizers):
        for p, average in zip(case.model.parameters(), averages, strict=True):
            torch.testing.assert_close(p, average.to(p.dtype), rtol=0.01, atol=1e-6)


def l2sp(case: Case) -> None:
    plain, rate = case.make_model(), 1e-3
    case.step(peaks(load_step_file("loop/step.py").make_optimizers(plain, case.config)), plain, plain_step)
    case.step(case.optimizers())
    for ours, theirs, start in zip(case.model.parameters(), plain.parameters(), case.before, strict=True):
        torch.testing.assert_close(ours, theirs + rate * (start - theirs), rtol=0, atol=1e-7)


def muon(case: Case) -> None:
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    case.step(case.optimizers())
    for name, p in case.model.named_parameters():
        if p.ndim == 2 and "layers." in name:
            update = ((p - before[name]).double() / 1e-3).square().mean().sqrt().item()
            assert update == pytest.approx(0.2, rel=0.5), name


def sam(case: Case) -> None:
    """The gradient within RHO in its own direction; the weights come back."""
    plain_gradient(other := case.make_model(), case.batch, case.accelerator, case.config)
    norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * p.grad / norm
            p.grad = None
    plain_gradient(other, case.batch, case.accelerator, case.config)
    case.config = dataclasses.replace(case.config, max_grad_norm=0.0)
    for ours, p in zip(case.gradients(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, old) for p, old in zip(case.model.parameters(), case.before, strict=True))


def schedule_free(case: Case) -> None:
    """At one rate the evaluated weights are the mean of those that moved, and the gradient lies between them."""
    optimizers, moved = case.optimizers(), []
    first = next(case.model.parameters())
    for _ in range(3):
        case.step(optimizers)
        moved.append(optimizers[0].state[first]["z"].clone())
    mean = torch.stack(moved).mean(0)
    torch.testing.assert_close(first, 0.9 * mean + 0.1 * moved[-1], rtol=1e-5, atol=1e-7)
    with case.method.evaluated_weights(case.model, optimizers):
        torch.testing.assert_close(first, mean, rtol=1e-5, atol=1e-7)


def compared(case: Case, labels: dict[int, tuple[int, ...]]) -> None:
    """labels: unit -> those of its rows. The losses before training are far from those of now."""
    rows, case.units = iter(case.rows), len(labels)
    case.rows = [
        dataclasses.replace(next(rows), label=label, unit=unit) for unit, own in labels.items() for label in own
    ]
    case.rows = [dataclasses.replace(row, reference=torch.full((row.num_targets,), 7.6 if row.label else 0.0))
                 for row in case.rows]  # fmt: skip


def dpo(case: Case) -> None:
    compared(case, {0: (1, -1)})

    def loss(losses, logits, ids, micro_batch):
        good, bad = micro_batch.by_row(micro_batch.reference - losses)
        return -F.logsigmoid(0.1 * (good - bad))

    has_gradient(case, loss)


def kto(case: Case) -> None:
    """The reply to another prompt is less likely than before, so the divergence is taken to be 0."""
    compared(case, {0: (1, 0), 1: (-1,)})

    def loss(losses, logits, ids, micro_batch):
        good, bad = micro_batch.by_row(micro_batch.reference - losses)
        return (1 - torch.sigmoid(0.1 * good) + 1 - torch.sigmoid(-0.1 * bad)) / 2

    has_gradient(case, loss)


@pytest.mark.parametrize("memory", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_does_what_it_is_for(recipe, memory, make_model, examples, accelerator):
    case = Case(recipe, memory, make_model, examples, accelerator)
    if case.dtype == torch.bfloat16 and recipe in IN_FP32:
        with pytest.raises(UserError, match=f"{recipe}.py needs weights in fp32"):
            case.step(case.optimizers())
    else:
        globals()[recipe](case)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_group_is_empty_with_lora_or_with_norms_alone(recipe, make_model):
    method = load_step_file(str(ROOT / f"recipes/{recipe}.py"))
    for kind in ("lora", "norms"):
        model = make_model()
        if kind == "lora":
            add_lora(model.causal_lm, 4, "tiny")
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and (kind == "lora" or p.ndim < 2))
        optimizers = method.make_optimizers(model, settings())
        check_optimizers(optimizers, model, recipe)
        assert all(group["params"] for optimizer in optimizers for group in optimizer.param_groups)
