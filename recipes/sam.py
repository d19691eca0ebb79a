"""SAM, sharpness-aware minimisation: the gradient is taken at the worst point within RHO of the weights.

Paper: Foret et al., arXiv:2010.01412, equation 2 and 3.
Cost: a step takes twice the time; a second copy of the trained weights in memory. Both passes have the same dropout.
Expect: python train.py tiny --max-steps 20 --step-file recipes/sam.py: eval/loss 4.556.
"""

import torch

from data.base.errors import UserError
from loop.step import forward_backward as gradient

RHO = 0.05  # in units of the weights, over all parameters together


def forward_backward(model, batch, accelerator, config) -> torch.Tensor:
    """As that of loop/step.py, but for the point at which the gradient is taken."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained[0].dtype == torch.bfloat16:
        raise UserError("sam.py needs weights in fp32: bf16 would round its step of RHO away (--memory 24g has them)")
    device = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(device):  # the second pass draws the same dropout
        loss_sums = gradient(model, batch, accelerator, config)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])  # all ranks
    with torch.no_grad():
        weights = [parameter.clone() for parameter in trained]
        for parameter in trained:
            parameter.add_(parameter.grad * (RHO / (norm + 1e-12)))
            parameter.grad = None
    gradient(model, batch, accelerator, config)
    with torch.no_grad():
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.copy_(weight)
    return loss_sums
