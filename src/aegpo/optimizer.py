"""The optimizer that a config asks for."""

from importlib.util import find_spec
from typing import Any

import torch

from aegpo.config import Config
from aegpo.models.base import Denoiser


def make_optimizer(config: Config, model: Denoiser) -> torch.optim.Optimizer:
    """AdamW over the trained weights; raises ValueError where that of 8 bits is not installed."""
    how = config.optimizer
    settings: dict[str, Any] = {"lr": how.lr, "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay}
    if how.kind == "adamw":
        return torch.optim.AdamW(model.trainable.values(), **settings)
    if find_spec("bitsandbytes") is None:
        raise ValueError("optimizer.kind: adamw_8bit needs bitsandbytes; pip install 'aegpo[8bit]', or choose adamw")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.trainable.values(), **settings)
