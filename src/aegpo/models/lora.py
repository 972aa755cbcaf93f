"""Low-rank adapters on a diffusers transformer (arXiv 2106.09685), by peft; in float32, computed merged."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from aegpo.config import Lora

ADAPTER = "default"


def add_lora(transformer: Any, lora: Lora, targets: tuple[str, ...], seed: int) -> None:
    """Add a fresh float32 adapter, which at first changes nothing, and make it the only thing that is trained.

    Raises:
        ValueError: a target names no layer.
    """
    wanted = lora.targets or targets
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"model.lora.targets: no linear layer is named {target!r}; for example {names[-1]!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(wanted), init_lora_weights="gaussian"),
            adapter_name=ADAPTER,
        )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in transformer.modules():
        if isinstance(module, Linear) and module.weight.dtype == torch.float32:
            module.forward = partial(_merged, module)


def _merged(layer: Linear, x: Tensor) -> Tensor:
    """An adapted layer as one product with `W + scale B A`, which is peft's sum of three but for its rounding.

    Not so in half precision, where a small change of a large weight would be rounded away.
    """
    if layer.disable_adapters or torch.is_autocast_enabled(x.device.type):
        return Linear.forward(layer, x)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return MergedProduct.apply(x, layer.weight, layer.bias, a, b, layer.scaling[ADAPTER])


class MergedProduct(torch.autograd.Function):
    """`x (W + scale B A)^T + bias`, with gradients for x and the adapter's two factors, and none for W.

    Beside the product itself a forward keeps nothing but x. The way back makes the factors' gradients from thin
    products, as peft's does, and x's from one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x (..., in), weight (out, in), bias (out,), a (rank, in), b (out, rank); returns (..., out)."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`'s arguments from that of what it returned."""
        x, weight, a, b = ctx.saved_tensors
        slope, rows, to_x = slopes[0].flatten(0, -2), x.flatten(0, -2), None
        if ctx.needs_input_grad[0]:
            to_x = (slope @ torch.addmm(weight, b, a, alpha=ctx.scale)).reshape(x.shape)
        to_a = ctx.scale * ((slope @ b).T @ rows)
        to_b = ctx.scale * (slope.T @ (rows @ a.T))
        return to_x, None, None, to_a, to_b, None


def lora_weights(transformer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's weights and its settings, as diffusers' `save_lora_weights` takes them."""
    settings = transformer.peft_config[ADAPTER].to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER), settings
