"""Frozen weights in 4 bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314), 4.13 bits a number.

A weight is made again for each product, forward and backward, in the product's type, and nothing of it is kept. What is
trained beside it, and what is exported, is not in 4 bits.
"""

import torch
import torch.nn.functional as F

BLOCK, GROUP = 64, 256  # numbers that share a scale, scales that share theirs
# Quantiles of a normal distribution (appendix E of the paper).
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
          1.0)  # fmt: skip


class NF4Linear(torch.nn.Module):
    """A frozen linear layer. Its tensors are no part of the state dict: a run makes them from the model's folder."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.bits = bits_of(linear.weight)  # to tell the same weights again
        pairs = torch.tensor([(high, low) for high in LEVELS for low in LEVELS], device=linear.weight.device)
        tensors = {"pairs": pairs} | quantise(linear.weight.detach())
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @torch.compiler.disable  # a graph of forward and backward would keep the weight, to make it only once
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        product = Product.apply(x.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """(out_features, in_features)"""
        scales = (self.scales * self.groups[:, None]).add_(self.middle).to(dtype).flatten()
        numbers = self.pairs.to(dtype)[self.codes.int()].view(-1, BLOCK)
        weight = numbers.mul_(scales[: len(numbers), None]).flatten()
        return weight[: self.out_features * self.in_features].view(self.out_features, self.in_features)


class Product(torch.autograd.Function):
    """x @ weight.T"""

    @staticmethod
    def forward(ctx, x, linear: NF4Linear):
        ctx.linear = linear
        return F.linear(x, linear.weight_in(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.weight_in(grad.dtype), None


def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes (numbers / 2) uint8, two numbers each; scales (groups, GROUP) int8; groups (groups,) and middle () fp32: a
    scale is middle + scales * groups."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    middle = (largest.amax() + largest.amin()) / 2  # a mean would depend on the number of threads
    apart = F.pad(largest - middle, (0, -len(largest) % GROUP)).view(-1, GROUP)
    groups = (apart.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    scales = (apart / groups[:, None]).round().to(torch.int8)
    own = (scales * groups[:, None] + middle).flatten()[: len(blocks), None]
    levels = torch.tensor(LEVELS, device=weight.device)
    codes = torch.bucketize(blocks / own, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    return {"codes": codes[:, 0] << 4 | codes[:, 1], "scales": scales, "groups": groups, "middle": middle}


@torch.no_grad()
def bits_of(weight: torch.Tensor) -> torch.Tensor:
    """(), the sum of its numbers taken as integers."""
    return weight.view({2: torch.int16, 4: torch.int32}[weight.itemsize]).sum(dtype=torch.int64)


def check_same_weights(causal_lm, base) -> None:
    """Raises ValueError if base does not have the weights that causal_lm's were made of."""
    for name, layer in causal_lm.named_modules():
        if isinstance(layer, NF4Linear):
            name = name.removesuffix(".base_layer")
            if int(layer.bits) != int(bits_of(base.get_submodule(name).weight)):
                raise ValueError(f"the weights of the model have changed since the run began: {name}")


def quantise_frozen(causal_lm) -> None:
    """Of a model with LoRA: the weights beside the updates in 4 bits, the updates in fp32."""
    for layer in causal_lm.modules():
        if hasattr(layer, "lora_A"):
            layer.base_layer = NF4Linear(layer.base_layer)
            for update in (*layer.lora_A.values(), *layer.lora_B.values()):
                update.weight = torch.nn.Parameter(update.weight.detach().float())


def layers_in_4_bits(model) -> list[NF4Linear]:
    return [layer for layer in model.modules() if isinstance(layer, NF4Linear)]


def tensors_in_4_bits(model) -> list[torch.Tensor]:
    return [buffer for layer in layers_in_4_bits(model) for buffer in layer.buffers()]
