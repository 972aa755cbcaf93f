"""Low-rank adapters on a diffusers transformer (arXiv 2106.09685), by peft."""

from typing import Any

import torch
from peft import LoraConfig
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


def lora_weights(transformer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's weights and its settings, as diffusers' `save_lora_weights` takes them."""
    settings = transformer.peft_config[ADAPTER].to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return get_peft_model_state_dict(transformer, adapter_name=ADAPTER), settings
