"""Whether rows laid end to end reach each other: asked of the model itself, on its device, before the first step."""

import torch
from accelerate import Accelerator

from data.base.console import warn
from data.base.errors import UserError
from data.batches import collate
from data.encode import Example
from loop.distributed import gather, reshard, to_device

FIRST, SECOND = 70, 8  # tokens of two rows; the recurrent layers go in chunks of 64
NOISE = 4  # times what equal forwards differ by, which is 0 almost everywhere


def check_rows_are_apart(model, accelerator: Accelerator) -> None:
    """Raises UserError if a row's losses move when the row before it is another one. Recurrent layers whose kernels do
    that go on row by row. All ranks."""
    if not rows_reach_each_other(model, accelerator):
        return
    kinds = {type(layer) for layer in model.modules() if getattr(layer, "by_kernels", False)}
    for kind in kinds:
        kind.by_kernels = False
    if not kinds or rows_reach_each_other(model, accelerator):
        raise UserError(
            "rows that are laid end to end reach each other in this model: the second row's losses depend on the "
            "first. Nothing is trained; another version of transformers or torch may keep them apart"
        )
    warn("the kernels of the recurrent layers do not keep rows apart here: they go on row by row, which is slower")


@torch.no_grad()
def rows_reach_each_other(model, accelerator: Accelerator) -> bool:
    """Perturbs the first of two rows and watches the losses of the second. All ranks; the same on all of them."""
    ids = torch.arange(1, 1 + FIRST + SECOND)
    second = Example(ids[FIRST:], 1, 1, "second")
    was_training = model.training
    model.eval()

    def losses(first: torch.Tensor) -> torch.Tensor:
        batch = to_device(collate([Example(first, FIRST, FIRST, "first"), second]), accelerator.device)
        return model(**batch.inputs)

    other, one, *again = [losses(first) for first in (ids[:FIRST].flip(0), *3 * [ids[:FIRST]])]
    model.train(was_training)
    reshard(model)
    moved, *noise = (float((one - found).abs().max()) for found in (other, *again))
    return any(gather(moved > NOISE * max(noise)))  # not if they are NaN, which the run itself deals with
