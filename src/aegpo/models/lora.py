"""Low-rank adapters on a diffusers network (arXiv 2106.09685), by peft; in float32."""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from aegpo.config import Lora

ADAPTER = "default"


def add_lora(network: Any, lora: Lora, targets: tuple[str, ...], seed: int) -> None:
    """Add a fresh float32 adapter, which at first changes nothing, and make it the only thing that is trained.

    Args:
        network: a diffusers model, where it is to stay.
        lora: rank, alpha, and the layers if they are not `targets`.
        targets: the ends of the names of the linear layers to adapt; one that this network lacks is left out.
        seed: of its weights.

    Raises:
        ValueError: a target of the settings names no layer.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(_ends(name, target) for name in linear):
            raise ValueError(f"model.lora.targets: no linear layer is named {target!r}; for example {linear[-1]!r}")
    wanted = lora.targets or targets
    adapted = [name for name in linear if any(_ends(name, target) for target in wanted)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=adapted, init_lora_weights="gaussian"),
            adapter_name=ADAPTER,
        )
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in network.modules():
        if isinstance(module, LoraLayer):
            whole = type(module.base_layer) is nn.Linear and module.base_layer.weight.dtype == torch.float32
            module.forward = MethodType(_merged if whole else _beside, module)  # type: ignore[method-assign]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def _beside(layer: Any, x: Tensor) -> Tensor:
    """An adapted layer in half precision: `W x + scale B A x`, the factors rounded to what x is in.

    It is not merged: a small change of a large weight would be rounded away.
    """
    base = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    a, b, scale = _factors(layer)
    if type(base) is nn.Linear and x.dtype == base.weight.dtype == torch.bfloat16:
        return BesideProduct.apply(x, base.weight, base.bias, a, b, scale)
    return base(x) + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _merged(layer: Any, x: Tensor) -> Tensor:
    """An adapted layer in full precision as one product with `W + scale B A`, which is peft's sum but for rounding."""
    if layer.disable_adapters or torch.is_autocast_enabled(x.device.type):
        return _beside(layer, x)
    a, b, scale = _factors(layer)
    if not torch.is_grad_enabled():
        return F.linear(x, torch.addmm(layer.base_layer.weight, b, a, alpha=scale), layer.base_layer.bias)
    return MergedProduct.apply(x, layer.base_layer.weight, layer.base_layer.bias, a, b, scale)


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


class BesideProduct(torch.autograd.Function):
    """`x W^T + bias + scale x A^T B^T` in half precision, each product added to what is there instead of to a copy.

    Gradients are for x and, in float32, for the factors. A forward keeps x and its product with A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x (..., in), weight (out, in), bias (out,), a (rank, in), b (out, rank); returns (..., out)."""
        rows, a, b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.T
        product = F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return product.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`'s arguments from that of what it returned."""
        rows, weight, a, b, low = ctx.saved_tensors
        slope = slopes[0].flatten(0, -2)
        thin, to_x = slope @ b, None
        if ctx.needs_input_grad[0]:
            to_x = (slope @ weight).addmm_(thin, a, alpha=ctx.scale).reshape(ctx.shape)
        return to_x, None, None, ctx.scale * (thin.T @ rows).float(), ctx.scale * (slope.T @ low).float(), None


def lora_weights(network: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's weights, by their names in the network, and its settings, as `save_lora_weights` takes them."""
    settings = network.peft_config[ADAPTER].to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return get_peft_model_state_dict(network, weights, adapter_name=ADAPTER), settings


def read_lora(file: Path) -> tuple[dict[str, Tensor], float]:
    """The weights in a file that diffusers' `save_lora_weights` wrote, and alpha, which stands in its header."""
    with safe_open(file, "pt") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (it is no mapping)
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    [alpha] = [value for key, value in settings.items() if key.endswith(".lora_alpha")]
    return weights, alpha
