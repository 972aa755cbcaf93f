"""The weights under a low-rank adapter in 8 or 4 bits, by bitsandbytes (arXiv 2208.07339, 2305.14314)."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from aegpo.models.blocks import repeated


def quantize(network: nn.Module, how: Literal["none", "int8", "nf4"], dtype: torch.dtype) -> None:
    """Replace the linear layers inside a network's blocks by ones whose weights are quantized when they are moved.

    Args:
        network: on the CPU, in full or half precision.
        how: `int8` or `nf4`.
        dtype: what they compute in.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"model.quantize: {how} needs bitsandbytes; pip install 'aegpo[8bit]', or set it none")
    import bitsandbytes as bnb

    def replaced(layer: nn.Linear) -> Any:
        size = (layer.in_features, layer.out_features, layer.bias is not None)
        if how == "nf4":
            new: Any = bnb.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=dtype)
            new.weight = bnb.nn.Params4bit(layer.weight.data, False, quant_type="nf4", module=new)  # pyright: ignore[reportCallIssue]
        else:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, False, has_fp16_weights=False)  # pyright: ignore[reportCallIssue]
        new.bias = layer.bias
        return new

    for block in repeated(network).values():
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, replaced(module))
    network.is_loaded_in_4bit = how == "nf4"  # type: ignore[assignment]  # by which peft chooses its own layers
    network.is_loaded_in_8bit = how == "int8"  # type: ignore[assignment]
