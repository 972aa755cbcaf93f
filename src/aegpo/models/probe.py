"""Reads attention entropy off a network while it runs (arXiv 2602.06825), without touching what it computes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aegpo.math.entropy import attention_entropy


class AttentionProbe(TorchFunctionMode):
    """Within it, every `scaled_dot_product_attention` of the network leaves its row entropy behind.

    Queries and keys are seen as the attention itself sees them: after their norms and position codes. Queries are image
    tokens, evenly spaced; keys are all tokens.

    Args:
        image_tokens: how many query rows stand for the image; they come first.
        rows: how many of them are read, at most.
    """

    def __init__(self, image_tokens: int, rows: int = 64) -> None:
        super().__init__()
        self._rows = torch.linspace(0, image_tokens - 1, min(rows, image_tokens)).round().long()
        self._layers: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._read(*args, **(kwargs or {}))
        return output

    @torch.no_grad()
    def _read(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> None:
        rows = self._rows.to(query.device)
        self._layers.append(attention_entropy(query, key, scale=scale, rows=rows).mean((1, 2)))

    def entropy(self) -> Tensor:
        """Mean over heads and rows since the last call, in nats; float32 (layers, B)."""
        layers, self._layers = self._layers, []
        return torch.stack(layers)
