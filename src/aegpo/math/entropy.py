"""Attention entropy: how widely a query spreads its attention over the keys."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Method = Literal["rows", "lse"]

HIDDEN = -9000.0  # a bias of this or less hides a key: diffusers masks with -10000, which bfloat16 rounds to -9984


def attention_entropy(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    rows: Tensor | None = None,
    method: Method = "rows",
    *,
    mask: Tensor | None = None,
    normalise: bool = False,
) -> Tensor:
    """Entropy in nats of each row of the attention weights, the signal of AEGPO (arXiv 2602.06825).

    With the weights `A = softmax(scale q k^T)` a row's entropy is `-sum_j A_ij log A_ij`. It is 0 where a query
    attends to one key only and log(Nk) where it attends to all alike. A few dozen rows estimate the mean over all of
    them to a small fraction of a per cent, at a small part of the cost.

    * `rows` makes the weights of the rows that are asked for, and no others.
    * `lse` makes no weights at all. Since `log A_ij = scale q_i . k_j - LSE_i`, with LSE the log of the sum of the
      exponentials of a row's logits, the entropy is `LSE_i - scale q_i . (A k)_i`; and `A k` is what fused attention
      returns if the keys are given as values too, the LSE beside it. It is the method for all rows of a long sequence.

    Both are fp32 inside, whatever comes in, under autocast too (fp64 stays fp64); on a GPU, unless one lets torch
    multiply in TF32. What is left is the rounding of the logits: up to 2e-7 times the largest of them for `rows`, five
    times that for `lse`.

    Args:
        q: queries, (B, H, Nq, d), after normalisation and position embedding.
        k: keys, (B, Hk, Nk, d); Hk divides H, and consecutive runs of H / Hk query heads share a key head (arXiv
            2305.13245).
        scale: factor on the logits; by default d ** -0.5.
        rows: 1-D int64, the queries to look at, in this order; by default all.
        method: `rows` or `lse`.
        mask: which keys a query sees, as `scaled_dot_product_attention` takes it: bool (True is seen), or what is
            added to the logits; broadcastable to (B, H, Nq, Nk), Nq counted before `rows`.
        normalise: divide by the logarithm of the number of keys that the query sees, so that 1 is all alike.

    Returns:
        (B, H, Nq) or (B, H, len(rows)), fp32 or fp64; 0 for a query that sees one key or none.

    Raises:
        ValueError: for an unknown `method`; for `lse` with a bias that neither hides a key nor leaves it as it is, and
            for `lse` in fp64 elsewhere than on a CPU.
    """
    batch, heads, _, dim = q.shape
    key_heads, keys = k.shape[1:3]
    assert heads % key_heads == 0, f"{heads} query heads cannot share {key_heads} key heads"
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = None if mask is None else _bias(mask, dtype)
    if rows is not None:
        q = q.index_select(2, rows)
        bias = bias if bias is None or bias.shape[2] == 1 else bias.index_select(2, rows)
    q, k = q.to(dtype), k.to(dtype)
    factor = dim**-0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        match method:
            case "rows" | "lse" if keys < 2:
                entropy = q.new_zeros(q.shape[:3])
            case "rows":
                stacked = q.reshape(batch, key_heads, -1, dim)  # the query heads of one key head, along the rows
                logits = (stacked @ k.mT * factor).reshape(*q.shape[:3], keys)
                entropy = _of_logits(logits if bias is None else logits + bias)
            case "lse":
                bias = torch.zeros(1, 1, 1, keys, dtype=dtype, device=q.device) if bias is None else bias
                if not ((bias == 0) | (bias <= HIDDEN)).all():
                    raise ValueError("method lse takes a mask that hides keys, not one that weighs them; use rows")
                attended, lse = _fused(q, k.repeat_interleave(heads // key_heads, 1), factor, bias)
                entropy = lse - factor * (q * attended).sum(-1)
            case _:
                raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if bias is None:
        return entropy / math.log(max(keys, 2)) if normalise else entropy
    seen = (bias > HIDDEN).expand(*bias.shape[:-1], keys).sum(-1).expand(entropy.shape)
    entropy = torch.where(seen > 1, entropy, 0.0)
    return entropy / seen.clamp(min=2).to(dtype).log() if normalise else entropy


def _of_logits(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in one pass: with e = exp(logits - max), log(sum e) - sum(e (log e)) / sum e.

    Both terms are at least 0, so nothing cancels; and it is cheaper than the softmax and its logarithms.
    """
    below = (logits - logits.amax(-1, keepdim=True)).clamp(min=math.log(torch.finfo(logits.dtype).tiny))
    weights = below.exp()
    total = weights.sum(-1)
    return total.log() - (weights * below).sum(-1) / total


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the logits, with four dimensions."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    return bias.to(dtype)[(None,) * (4 - mask.ndim)]


def _fused(q: Tensor, k: Tensor, scale: float, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What each query attends to among the keys themselves, (B, H, N, d), and its log-sum-exp, (B, H, N).

    `scaled_dot_product_attention` keeps the log-sum-exp to itself; these are the operators it calls.

    Raises:
        ValueError: for float64 elsewhere than on a CPU, for which there is no such operator.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, attn_mask=bias, scale=scale)
    if q.dtype == torch.float64:
        raise ValueError("method lse is float64 on a CPU only; use rows")
    keys = k.shape[2]
    bias = F.pad(bias, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)  # that operator wants aligned rows
    attended, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, bias, True, scale=scale)
    return attended, lse[..., : q.shape[2]]
