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

    Interim: SD3 only.
    """

    def __init__(
        self,
        network: Any,
        *,
        rows: int = 64,
        queries: str = "image",
        keys: str = "all",
        layers: Any = (),
        half: str = "both",
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.rows, self.queries, self.keys, self.half = network, rows, queries, keys, half
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
        image = IMAGE_TOKENS
        if self.half == "conditional":
            query, key = query.chunk(2)[1], key.chunk(2)[1]
        rows = torch.linspace(0, image - 1, min(self.rows, image)).round().long()
        if self.keys == "text":
            key = key[:, :, image:]
        self._layers.append(attention_entropy(query, key, scale=scale, rows=rows).mean((1, 2)))

    def entropy(self) -> Tensor:
        """Mean over heads and rows since the last call, in nats; float32 (layers, B)."""
        layers, self._layers = self._layers, []
        return torch.stack(layers)


IMAGE_TOKENS = 16
