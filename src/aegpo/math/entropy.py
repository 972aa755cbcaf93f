"""Attention entropy: how widely a query spreads its attention over the keys."""

import torch
from torch import Tensor


def attention_entropy(q: Tensor, k: Tensor, scale: float | None = None, rows: Tensor | None = None) -> Tensor:
    """Entropy in nats of each row of the attention weights, the signal of AEGPO (arXiv 2602.06825).

    With the weights `A = softmax(scale q k^T)` a row's entropy is `-sum_j A_ij log A_ij`. It is 0 where a query
    attends to one key only and log(Nk) where it attends to all alike. The logits and the softmax are fp32 whatever
    comes in, under autocast too (fp64 stays fp64). A few dozen random rows estimate the mean over all of them to a
    small fraction of a per cent, at a small part of the cost.

    Args:
        q: queries, (B, H, Nq, d), after normalisation and position embedding.
        k: keys, (B, Hk, Nk, d); Hk divides H, and consecutive runs of H / Hk query heads share a key head (arXiv
            2305.13245).
        scale: factor on the logits; by default d ** -0.5.
        rows: 1-D int64, the queries to look at, in this order; by default all.

    Returns:
        (B, H, Nq) or (B, H, len(rows)), fp32 or fp64.
    """
    batch, heads, _, dim = q.shape
    key_heads = k.shape[1]
    assert heads % key_heads == 0, f"{heads} query heads cannot share {key_heads} key heads"
    if rows is not None:
        q = q.index_select(2, rows)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).reshape(batch, key_heads, -1, dim)  # the query heads of one key head, stacked along the rows
    with torch.autocast(q.device.type, enabled=False):
        logits = grouped @ k.to(dtype).transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    log_weights = logits.log_softmax(dim=-1)
    return -(log_weights.exp() * log_weights).sum(dim=-1).reshape(batch, heads, -1)
