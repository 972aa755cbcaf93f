"""A low-rank adapter under the names by which ComfyUI knows the layers, with its scale beside it.

ComfyUI (`comfy/lora.py`, `comfy/weight_adapter/lora.py`) adds `alpha / rank` times the factors' product to a weight,
alpha being a tensor beside the factors, and the bare product where there is none. It does not read the header of the
file, where diffusers keeps alpha.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WAN_ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}
WAN_LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "net.0.proj": "0", "net.2": "2"}
WAN_LAYER = re.compile(r"blocks\.(\d+)\.(?:(attn[12])\.(to_[qkv]|to_out\.0)|ffn\.(net\.0\.proj|net\.2))")


def for_comfyui(weights: Mapping[str, Tensor], family: str, alpha: float) -> dict[str, Tensor]:
    """The adapter as ComfyUI reads it.

    Args:
        weights: the factors, named as in diffusers' file: `transformer.LAYER.lora_A.weight` and `.lora_B.weight`.
        family: of the network, by the name of its adapter in this room.
        alpha: by which the factors' product is scaled, over the rank.

    Raises:
        ValueError: a layer has no name in ComfyUI that we are sure of.
    """
    named: dict[str, Tensor] = {}
    down, up = ("lora_down", "lora_up") if family == "unet" else ("lora_A", "lora_B")
    for key in (key for key in weights if key.endswith(".lora_A.weight")):
        layer = key.removesuffix(".lora_A.weight")
        name = layer_name(family, layer.partition(".")[2])
        named[f"{name}.{down}.weight"] = weights[key]
        named[f"{name}.{up}.weight"] = weights[f"{layer}.lora_B.weight"]
        named[f"{name}.alpha"] = torch.tensor(float(alpha))
    return named


def layer_name(family: str, layer: str) -> str:
    """What ComfyUI calls a layer, given what diffusers calls it; raises ValueError as `for_comfyui` does."""
    match family:
        case "sd3" | "flux":
            return f"transformer.{layer}"
        case "qwen_image":  # as transformer.LAYER too, but diffusers reads an alpha beside this name only
            return f"diffusion_model.{layer}"
        case "flux2_klein" if "transformer_blocks." in layer:
            return f"transformer.{layer}"
        case "unet":
            return f"lora_unet_{layer.replace('.', '_')}"
        case "wan" if found := WAN_LAYER.fullmatch(layer):
            block, attention, projection, feed = found.groups()
            part = f"{WAN_ATTENTION[attention]}.{WAN_LAYERS[projection]}" if attention else f"ffn.{WAN_LAYERS[feed]}"
            return f"diffusion_model.blocks.{block}.{part}"
    raise ValueError(f"--comfyui: no name is known that ComfyUI has for the adapted layer {layer} of {family}")
