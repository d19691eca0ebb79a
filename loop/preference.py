"""Steps that compare replies: recipes/dpo.py and recipes/kto.py.

Their loss is a function of log-ratios: how much likelier each reply is than before training, in nats. The derivative by
a log-ratio is the weight of that reply's cross-entropy. So a step is one pass without a gradient, one small sum over
ranks, and one pass as for any other loss. The two replies of a pair may lie in different micro-batches and on different
ranks.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import numpy
import torch

from loop.evaluate import Measure
from loop.score import Scored, mean

GOOD, BAD, OTHER = range(3)  # columns: the good reply of a unit, the bad one, that of another prompt
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def log_ratios(model, batch, accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """(units, 3) sums over the targets of each reply of log p(now) - log p(before training), and (units, 3) numbers of
    these targets, 0 where a unit has no such reply. Of the global batch, the same on all ranks."""
    found = torch.zeros(2, batch.num_units, 3, device=accelerator.device)
    for micro_batch in [*batch.micro_batches, *batch.without_gradient]:
        losses = model(**micro_batch.inputs)
        place = micro_batch.units, column_of(micro_batch)
        # First the difference of each target, then the sum, which keeps more digits than the other way.
        found[0][place] = micro_batch.by_row(micro_batch.reference - losses)
        found[1][place] = micro_batch.by_row(torch.ones_like(losses))
    found = accelerator.reduce(found, "sum")  # each place is of one rank, so this is exact
    return found[0], found[1]


def column_of(micro_batch) -> torch.Tensor:
    return torch.where(micro_batch.labels == 0, OTHER, (micro_batch.labels < 0).long())


def with_weights(loss_of: LossOf, ratios: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_of(ratios, counts) of each unit, (units,), and by how much their sum falls with each log-likelihood,
    (units, 3): the weights of the replies' summed cross-entropies."""
    with torch.enable_grad():
        ratios = ratios.detach().requires_grad_()
        losses = loss_of(ratios, counts)
    (slopes,) = torch.autograd.grad(losses.sum(), ratios)
    return losses.detach(), -slopes


def weighted_backward(model, batch, accelerator, weights: torch.Tensor) -> torch.Tensor:
    """As `forward_backward` of loop/step.py, for the sum of each reply's cross-entropy times its weight, (units, 3).
    What it returns is of the good replies, not weighted."""
    loss_sums = []
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        with nullcontext() if number == len(batch.micro_batches) else accelerator.no_sync(model):
            losses = model(**micro_batch.inputs)
            weight = weights[micro_batch.units, column_of(micro_batch)][micro_batch.row]
            accelerator.backward((losses * weight).sum() * accelerator.num_processes)
        good = (micro_batch.labels > 0)[micro_batch.row] * losses
        is_think = micro_batch.is_think
        loss_sums.append(torch.stack([(good * is_think).sum(), (good * ~is_think).sum()]).detach())
    return torch.stack(loss_sums)


def held_out(data, loss_of: LossOf) -> Measure:
    """eval/preference: of the replies that are held out, the loss; accuracy, the share of pairs whose good reply has
    the higher log-ratio (of thumbs: of all combinations of a good and a bad reply; equal ones count half); the margin
    between them in nats; and the mean log-likelihood of a token of both. If both fall, the model unlearns its replies:
    RPO in recipes/dpo.py holds on to the good ones."""
    held = data.held
    rows = [dataclasses.replace(row, own_parts=(("reply", 0, row.num_targets),)) for row in held]
    units = numpy.repeat(range(len(held.units)), [len(unit) for unit in held.units])
    columns = [{1: GOOD, -1: BAD, 0: OTHER}[row.label] for row in held]

    def of(table: list[Scored], first: list[Scored]) -> dict[str, float]:
        ratios, counts, losses = numpy.zeros((3, len(held.units), 3))
        losses[units, columns] = [line.loss_sum for line in table]
        counts[units, columns] = [line.count for line in table]
        ratios[units, columns] = [line.loss_sum for line in first]
        ratios -= losses
        of_units = loss_of(torch.tensor(ratios), torch.tensor(counts))
        good, bad = (ratios[:, column][counts[:, column] > 0] for column in (GOOD, BAD))
        is_paired = len(good) == len(bad) == len(held.units)
        apart = good - bad if is_paired else (good[:, None] - bad).ravel()
        tokens = counts.sum(0)
        return {
            "loss": float(of_units.mean()),
            "accuracy": mean(float((apart > 0).sum() + 0.5 * (apart == 0).sum()), len(apart)),
            "margin": mean(float(apart.sum()), len(apart)),
            "good_log_likelihood": mean(-float(losses[:, GOOD].sum()), tokens[GOOD]),
            "bad_log_likelihood": mean(-float(losses[:, BAD].sum()), tokens[BAD]),
        }

    return Measure("eval/preference", "preference", rows, of, needs_first=True)
